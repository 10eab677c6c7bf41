"""torch's own samples of its cross-entropies: each is right within the project's error budget, or refused in words."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.ops.test_error_budget import within_budget
from tests.problems import assert_equal
from torch import Tensor

import levelhead

_TORCH = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations",
    reason="torch's samples need expecttest, of the dependency group `test`",
    exc_type=ImportError,
)

# What is refused, in the order in which it is looked for, and how.
REFUSED: dict[str, tuple[Any, str]] = {
    "class weights": (
        TypeError,
        "unexpected keyword argument 'weight'",
    ),  # token_weight=weight[target]
    "probabilities": (TypeError, "must hold integer ids, .*class probabilities are not supported"),
    "a head of more dimensions": (ValueError, r"linear_weight must have shape \(V, D\)"),
    "classes in the middle": ((TypeError, ValueError), "must have shape|class probabilities"),
}
OPERATORS = [
    op for op in _TORCH.op_db if op.name.endswith(".cross_entropy") or "linear_cross" in op.name
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _samples(op: Any, dtype: torch.dtype) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
    """Yield input, weight and target with the options that are not of torch's implementation."""
    torch.manual_seed(0)
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        tensors = [sample.input, *sample.args]
        if len(tensors) == 2:  # logits: those of a head that is the identity
            classes = sample.input.shape[1]
            tensors.insert(1, torch.eye(classes, dtype=dtype, requires_grad=True))
        options = {name: value for name, value in sample.kwargs.items() if name != "options"}
        yield tensors, options


def _why_refused(x: Tensor, weight: Tensor, target: Tensor, options: dict[str, Any]) -> str | None:
    if "weight" in options:
        return "class weights"
    if weight.dim() != 2:
        return "a head of more dimensions"
    if x.dim() > 2:
        return "classes in the middle"
    return "probabilities" if target.is_floating_point() else None


def _dense(x: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    z = F.linear(x, weight, options.pop("linear_bias", None))
    return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), target, **options)


def _copies(
    dtype: torch.dtype, tensors: list[Tensor], options: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Any], list[Tensor]]:
    """Return the arguments in another dtype, and those of them that have gradients."""
    leaves = []

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        leaves.append(value.detach().to(dtype).requires_grad_())
        return leaves[-1]

    tensors = [copy(tensor) for tensor in tensors]
    return tensors, {name: copy(value) for name, value in options.items()}, leaves


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.formatted_name)
def test_every_sample_is_right_or_refused(op: Any, dtype: torch.dtype) -> None:
    found: Counter[str] = Counter()
    for tensors, options in _samples(op, dtype):
        why = _why_refused(*tensors, options)
        found[why or "right"] += 1
        if why is not None:
            error, text = REFUSED[why]
            with pytest.raises(error, match=text):
                levelhead.linear_cross_entropy(*tensors, **options)
            continue
        runs = []
        for function, wide in (
            (levelhead.linear_cross_entropy, dtype),
            (_dense, torch.float64),
            (_dense, dtype),
        ):
            args, others, leaves = _copies(wide, tensors, options)
            loss = function(*args, **others)
            runs.append([loss, *torch.autograd.grad(loss, leaves, torch.ones_like(loss))])
        if dtype == torch.float64:
            assert_equal(runs[0], runs[1])
            continue
        for actual, truth, yardstick in zip(*runs, strict=True):
            within_budget(f"{tensors}, {options}", actual, truth, yardstick)
    assert found["right"]
    assert found.keys() <= {"right", *REFUSED}
