"""Check the options of `patch_model`."""

from __future__ import annotations

import math
from numbers import Rational, Real
from typing import Any

from torch import Tensor


def check_options(
    smoothing: Any, temperature: Any, softcap: Any, eval_smoothing: Any, eval_logits: Any
) -> None:
    """Refuse options of `patch_model` that are of a wrong type or out of range.

    Raises:
        TypeError: one is neither a number nor a 0-dim floating-point tensor; `eval_smoothing` is no
            number, `eval_logits` no bool.
        ValueError: one lies outside its range, or is a tensor that requires a gradient.
    """
    check_smoothing("smoothing", smoothing)
    check_positive("temperature", temperature)
    if softcap is not None:
        check_positive("softcap", softcap)
    if not _is_number(eval_smoothing):
        raise TypeError(f"eval_smoothing must be a number in [0, 1], got {_shown(eval_smoothing)}")
    check_smoothing("eval_smoothing", eval_smoothing)
    if not isinstance(eval_logits, bool):
        raise TypeError(f"eval_logits must be True or False, got {_shown(eval_logits)}")


def check_smoothing(name: str, smoothing: Any) -> None:
    """Refuse an argument called `name` that is no share of probability."""
    value = _value(name, smoothing, "in [0, 1]")
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value:g}; a common choice is 0.1")


def check_positive(name: str, option: Any) -> None:
    """Refuse an argument called `name` that is no positive number."""
    value = _value(name, option, "above 0")
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value:g}")


def _value(name: str, option: Any, bounds: str) -> float | None:
    """Return the number that an option stands for; None for a tensor on the meta device, which has no value."""
    if _is_number(option):
        return float(option)
    if not isinstance(option, Tensor) or option.dim() or not option.is_floating_point():
        raise TypeError(
            f"{name} must be a number {bounds} or a 0-dim floating-point tensor, got "
            f"{_shown(option)}"
        )
    if option.requires_grad:
        raise ValueError(
            f"{name} is a tensor that requires a gradient, which the loss of a patched model does "
            f"not give it: it would never be trained. Pass {name}.detach()"
        )
    return None if option.is_meta else option.item()


def _is_number(option: Any) -> bool:
    # Numbers of numpy are fine. True is a mistake, and torch does not take fractions.
    return type(option) is int or (isinstance(option, Real) and not isinstance(option, Rational))


def _shown(option: Any) -> str:
    if isinstance(option, Tensor):
        return f"a tensor of shape {tuple(option.shape)} and dtype {option.dtype}"
    return f"{option!r} of type {type(option).__name__}"
