"""The norm before the output head, found by running the model, and the hidden states it can give.

A norm bounds what reaches the head, whatever the input: `h = gain * u + shift` with ||u|| <= sqrt(D).
Classes, names and formulas of norms differ between architectures (Gemma's gain is one plus its weight),
so the norm is found by what it does: its output is what reaches the head, and on known vectors it gives
what an RMSNorm or a LayerNorm gives.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.patch.heads import language_model
from .head import head_input

_TOLERANCE = 1e-4  # of float32 sums over thousands of units, relative to the largest


@dataclass(frozen=True, eq=False)
class FinalNorm:
    """A norm whose output reaches the head as it is: `gain * u + shift`, where ||u|| <= sqrt(D).

    Attributes:
        module: The norm; called once in a forward.
        gain: (D,) float32.
        shift: (D,) float32; zeros for an RMSNorm.
    """

    module: nn.Module
    gain: Tensor
    shift: Tensor

    @property
    def norm_ceiling(self) -> float:
        """The largest norm of what it can give, `sqrt(D) max|gain| + ||shift||`, but for rounding."""
        largest = self.gain.abs().max() * len(self.gain) ** 0.5 + self.shift.norm()
        return float(largest)


def final_norm(model: nn.Module) -> FinalNorm | None:
    """The RMSNorm or LayerNorm before the head of a language model.

    None if there is none, or if anything comes between it and the head, such as a factor. Runs the
    model on two tokens.

    Raises:
        ValueError: The model has no head that is known.
    """
    inner = language_model(model)
    outputs: list[tuple[nn.Module, Tensor, int]] = []

    def keep(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((module, output, output._version))

    hooks = [module.register_forward_hook(keep) for module in inner.modules()]
    try:
        ids = torch.zeros(1, 2, dtype=torch.long)
        hidden = head_input(inner, {"input_ids": ids, "labels": ids})
    finally:
        for hook in hooks:
            hook.remove()
    calls = [module for module, *_ in outputs]
    for module, output, version in reversed(outputs):
        # A change in place, between the norm and the head, raises the version of all its views.
        same = output.data_ptr() == hidden.data_ptr() and version == hidden._version
        found = _as_norm(module, hidden.shape[-1]) if same and calls.count(module) == 1 else None
        if found is not None:
            return found
    return None


def _as_norm(module: nn.Module, width: int) -> FinalNorm | None:
    """`module` as the norm that it acts as; None if it acts otherwise."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return None
    twin = copy.deepcopy(module).float().cpu()
    generator = torch.Generator().manual_seed(0)
    # Large, so that what a norm adds to the variance does not show; no entry of either unit is zero.
    signs = 100 * (1 - 2 * (torch.arange(width) % 2)).float()
    other = 100 * torch.randn(width, generator=generator)
    try:
        with torch.no_grad():
            shift, at_signs, at_other = (
                twin(x[None, None])[0, 0] for x in (torch.zeros(width), signs, other)
            )
    except Exception:  # no module of one tensor of hidden states
        return None
    for unit in (_rms, _standard):
        gain = (at_signs - shift) / unit(signs)
        want = gain * unit(other) + shift
        if torch.allclose(at_other, want, rtol=0, atol=_TOLERANCE * float(want.abs().max())):
            return FinalNorm(module, gain, shift)
    return None


def _rms(x: Tensor) -> Tensor:
    return x / x.square().mean().sqrt()


def _standard(x: Tensor) -> Tensor:
    return _rms(x - x.mean())
