"""A token that is ignored, or weighs nothing, is inert: its hidden state and its smoothing may be NaN."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.problems import IMPLEMENTATIONS
from torch import Tensor
from torch.func import grad, vmap

import levelhead

N, D, V, INERT = 5, 4, 7, 2
_random = torch.Generator().manual_seed(0)
X, W = (torch.randn(n, D, generator=_random).double() for n in (N, V))
TARGET = torch.randint(V, (N,), generator=_random)
UNIFORM = torch.ones(N).double()


def _loss(kind: str, reduction: Any, impl: Any, hidden: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a batch with an inert token, and its leaves."""
    x, target, weight, smoothing = X.clone(), TARGET.clone(), UNIFORM.clone(), UNIFORM * 0.1
    x[INERT], smoothing[INERT] = hidden, hidden
    if kind == "ignored":
        target[INERT] = -100
    else:
        weight[INERT] = 0
    x, w = x.requires_grad_(), W.clone().requires_grad_()
    loss = levelhead.linear_cross_entropy(
        x, w, target, label_smoothing=smoothing, z_loss=0.1,
        token_weight=weight if kind == "weighs 0" else None, reduction=reduction, impl=impl,
    )  # fmt: skip
    return loss.sum(), x, w


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["ignored", "weighs 0"])
def test_what_an_inert_token_holds_reaches_neither_loss_nor_gradients(
    kind: str, reduction: Any, impl: Any
) -> None:
    def run(hidden: float) -> list[Tensor]:
        loss, *leaves = _loss(kind, reduction, impl, hidden)
        two = torch.ones(2).double()
        return [
            loss.detach(),
            *torch.autograd.grad(loss, leaves, retain_graph=True),
            *torch.autograd.grad(loss, leaves, retain_graph=True),  # recomputed, as what follows
            *torch.autograd.grad(loss, leaves, two, is_grads_batched=True, retain_graph=True),
            *(g.detach() for g in torch.autograd.grad(loss, leaves, create_graph=True)),
        ]

    torch.testing.assert_close(run(torch.nan), run(0.0), rtol=0, atol=1e-12)


def _of_weights(weight: Tensor) -> Tensor:
    return levelhead.linear_cross_entropy(X, W, TARGET, token_weight=weight, reduction="sum")


BY_AUTOGRAD: dict[str, Callable[[Tensor], Tensor]] = {
    "autograd": lambda w: torch.autograd.grad(_of_weights(w.requires_grad_()), w)[0],
    "grad": grad(_of_weights),
    "vmap of grad": lambda w: vmap(grad(_of_weights))(w[None])[0],
    "grad of vmap": grad(lambda w: vmap(_of_weights)(w[None]).sum()),
    "jacfwd": torch.func.jacfwd(_of_weights),
    "jacfwd of vmap": torch.func.jacfwd(lambda w: vmap(_of_weights)(w[None]).sum()),
}


@pytest.mark.parametrize("name", BY_AUTOGRAD)
def test_a_weight_of_0_that_is_differentiated_has_its_gradient(name: str) -> None:
    losses = levelhead.linear_cross_entropy(X, W, TARGET, reduction="none")
    torch.testing.assert_close(BY_AUTOGRAD[name](torch.zeros(N).double()), losses)


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_weights_whose_sum_overflows_give_nan(needs_gradient: bool) -> None:
    x = X.float().requires_grad_(needs_gradient)
    huge = torch.full((N,), 1e38)
    loss = levelhead.linear_cross_entropy(x, W.float(), TARGET, token_weight=huge)
    assert loss.isnan()
    if needs_gradient:
        assert torch.autograd.grad(loss, x)[0].isnan().all()
