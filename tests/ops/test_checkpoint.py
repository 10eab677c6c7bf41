"""In an activation checkpoint, or with saved tensors elsewhere, every use of a graph gives the dense gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import levelhead

D, V, N = 8, 37, 9
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
Head = Callable[..., Tensor]


def _tensors() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=random, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, D, generator=random, dtype=torch.float64).requires_grad_()
    return x, weight, torch.randint(V, (N,), generator=random)


X, W, T = _tensors()


def _fused(x: Tensor, weight: Tensor, *, reduction: Any) -> Tensor:
    options: Any = {"label_smoothing": 0.1, "reduction": reduction}
    return levelhead.linear_cross_entropy(x.tanh(), weight, T, **options).sum()


def _dense(x: Tensor, weight: Tensor, *, reduction: str) -> Tensor:
    options: Any = {"label_smoothing": 0.1, "reduction": reduction}
    return F.cross_entropy(x.tanh() @ weight.T, T, **options).sum()


def _on_cpu(head: Head, *args: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return head(*args)


def _copies(head: Head, *args: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        return head(*args)


AROUND: dict[str, Any] = {
    "checkpoint": partial(checkpoint, use_reentrant=False),
    "no early stop": partial(checkpoint, use_reentrant=False, early_stop=False),
    "save_on_cpu": _on_cpu,
    "copies": _copies,
}


def _one_by_one(loss: Tensor) -> list[Tensor]:
    first = torch.autograd.grad(loss, X, retain_graph=True)
    return [*first, *torch.autograd.grad(loss, W)]


def _again_and_again(loss: Tensor) -> list[Tensor]:
    factors = [torch.tensor(f, dtype=torch.float64) for f in (1.0, 3.0, -0.5)]
    return [g for f in factors for g in torch.autograd.grad(loss, (X, W), f, retain_graph=True)]


def _with_a_graph(loss: Tensor) -> list[Tensor]:
    return [g.detach() for g in torch.autograd.grad(loss, (X, W), create_graph=True)]


USES = [_one_by_one, _again_and_again, _with_a_graph]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("around", AROUND)
@REDUCTIONS
def test_gradients_are_the_dense_ones(reduction: str, around: str, use: Any) -> None:
    loss = AROUND[around](partial(_fused, reduction=reduction), X, W)
    torch.testing.assert_close(use(loss), use(_dense(X, W, reduction=reduction)))


@pytest.mark.parametrize("around", AROUND)
@REDUCTIONS
def test_a_second_derivative_is_refused(reduction: str, around: str) -> None:
    loss = AROUND[around](partial(_fused, reduction=reduction), X, W)
    (gradient,) = torch.autograd.grad(loss, X, create_graph=True)
    with pytest.raises(RuntimeError, match="levelhead does not implement double backward"):
        gradient.square().sum().backward()
