"""In an activation checkpoint the loss is computed twice, unless the checkpoint saves it; eager and compiled."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import levelhead
from levelhead.ops import chunked

D, V, N = 8, 37, 9
OPERATORS = [
    torch.ops.levelhead.linear_cross_entropy.default,
    torch.ops.levelhead.linear_logit_stats.default,
]
AROUND = {
    "plain": {},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, OPERATORS)},
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found = []
    for name in ("linear_cross_entropy", "linear_logit_stats", "linear_logit_stats_backward"):
        function = getattr(chunked, name)

        def spy(*args: Any, _name: str = name, _function: Any = function) -> Any:
            found.append(_name)
            return _function(*args)

        monkeypatch.setattr(chunked, name, spy)
    return found


def _tensors() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=random, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, D, generator=random, dtype=torch.float64).requires_grad_()
    return x, weight, torch.randint(V, (N,), generator=random)


def _values(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [loss, *torch.autograd.grad(3 * loss, tensors)]


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("around", AROUND)
def test_the_loss_is_computed_again_unless_it_is_saved(
    around: str, reduction: str, backend: str | None, calls: list[str]
) -> None:
    torch.compiler.reset()
    x, weight, target = _tensors()

    def head(x: Tensor, weight: Tensor) -> Tensor:
        loss = levelhead.linear_cross_entropy(
            x.tanh(), weight, target, label_smoothing=0.1, reduction=reduction
        )
        return loss.sum()

    def step(x: Tensor, weight: Tensor) -> Tensor:
        return checkpoint(head, x, weight, use_reentrant=False, **AROUND[around])

    run = step if backend is None else torch.compile(step, backend=backend, fullgraph=True)
    actual = _values(run(x, weight), x, weight)
    dense = F.cross_entropy(x.tanh() @ weight.T, target, label_smoothing=0.1, reduction=reduction)
    torch.testing.assert_close(actual, _values(dense.sum(), x, weight))

    backward = ["linear_logit_stats_backward"] * (reduction == "none")
    forward = "linear_logit_stats" if reduction == "none" else "linear_cross_entropy"
    assert calls == [forward] * (2 if around == "plain" else 1) + backward
