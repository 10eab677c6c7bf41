"""FLOP formulas of the operators for torch.utils.flop_counter; one multiply-add is two operations.

torch.utils.flop_counter imports triton, which `import levelhead` must not. So the formulas are registered at once if
that module is loaded, and otherwise when it is first imported. Nothing simpler serves: a FlopCounterMode copies the
formulas when it is made, so registering them at the first call of an operator would be too late.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from .arguments import named

_COUNTER = "torch.utils.flop_counter"


def _product(input: Sequence[int], linear_weight: Sequence[int]) -> int:
    return 2 * input[0] * input[1] * linear_weight[0]


def _products(output_mask: Sequence[bool]) -> int:
    """Count the logits themselves and the gradients of input and weight; that of the bias is no product."""
    return 1 + output_mask[0] + output_mask[1]


def _linear_logit_stats(*args: Any, **_: Any) -> int:
    call = named("linear_logit_stats", args)
    return _product(call.input, call.linear_weight)


def _linear_logit_stats_backward(*args: Any, **_: Any) -> int:
    call = named("linear_logit_stats_backward", args)
    return _product(call.input, call.linear_weight) * _products(call.output_mask)


def _linear_cross_entropy(*args: Any, **_: Any) -> int:
    call = named("linear_cross_entropy", args)
    return _product(call.input, call.linear_weight) * _products(call.output_mask)


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.levelhead
    register_flop_formula(ops.linear_logit_stats)(_linear_logit_stats)
    register_flop_formula(ops.linear_logit_stats_backward)(_linear_logit_stats_backward)
    register_flop_formula(ops.linear_cross_entropy)(_linear_cross_entropy)


class _RegisterOnImport:
    """Find torch.utils.flop_counter once, and register the formulas after it is loaded."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register the formulas, now or when torch.utils.flop_counter is first imported."""
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegisterOnImport())
