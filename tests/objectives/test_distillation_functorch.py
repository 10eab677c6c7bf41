"""torch.func serves the distillation loss as it does the dense formula; what has no derivative is refused."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vjp, vmap

from levelhead.objectives import distillation_loss
from levelhead.objectives.distillation import Normalisation

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
NORMALISATIONS = get_args(Normalisation)

random = torch.Generator().manual_seed(0)
X = torch.randn(3, 4, 5, generator=random, dtype=torch.float64)
HEADS = torch.randn(3, 11, 5, generator=random, dtype=torch.float64)
TOP = torch.randn(3, 4, 11, generator=random, dtype=torch.float64).log_softmax(-1).topk(3)
IDS, LOG_PROBS = TOP.indices, TOP.values
x, w, ids, log_probs = X[0], HEADS[0], IDS[0], LOG_PROBS[0]


def ours(normalisation: Any, reduction: Any = "sum") -> Loss:
    return lambda *tensors: distillation_loss(
        *tensors, normalisation=normalisation, reduction=reduction
    )


def dense(normalisation: str, reduction: str = "sum") -> Loss:
    def loss(x: Tensor, w: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
        student, teacher = (x @ w.T).softmax(-1).gather(-1, ids), log_probs.exp()
        if normalisation == "other":
            student, teacher = (torch.cat([p, 1 - p.sum(-1, True)], -1) for p in (student, teacher))
        else:
            teacher = teacher / teacher.sum(-1, True)
        if normalisation == "renormalised":
            student = student / student.sum(-1, True)
        losses = (teacher * (teacher / student).log()).sum(-1)
        return losses.sum() if reduction == "sum" else losses

    return loss


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "grad": lambda f: grad(f("sum"), (0, 1))(x, w, ids, log_probs),
    "vjp": lambda f: vjp(lambda x, w: f("none")(x, w, ids, log_probs), x, w)[1](
        torch.ones(4).to(x)
    ),
    "vmap": lambda f: vmap(f("none"), (0, None, 0, 0))(X, w, IDS, LOG_PROBS),
    "vmap over heads": lambda f: vmap(f("sum"), (None, 0, None, None))(x, HEADS, ids, log_probs),
    "gradients of samples": lambda f: vmap(grad(f("sum"), (0, 1)), (0, None, 0, 0))(
        X, w, IDS, LOG_PROBS
    ),
    "grad of vmap": lambda f: grad(
        lambda x, w: vmap(f("sum"), (0, None, 0, 0))(x, w, IDS, LOG_PROBS).sum(), (0, 1)
    )(X, w),
    "jacrev": lambda f: jacrev(f("none"), (0, 1))(x, w, ids, log_probs),
    "compiled": lambda f: torch.compile(grad(f("sum"), (0, 1)), backend="aot_eager")(
        x, w, ids, log_probs
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_a_transformed_loss_is_the_dense_one(normalisation: str, name: str) -> None:
    got, want = (
        TRANSFORMS[name](lambda reduction, of=of: of(normalisation, reduction))
        for of in (ours, dense)
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("argument", [0, 1])
def test_a_tangent_is_refused(normalisation: str, argument: int) -> None:
    tensors = [x, w, ids, log_probs]
    loss = ours(normalisation)

    def of_one(tensor: Tensor) -> Tensor:
        return loss(*tensors[:argument], tensor, *tensors[argument + 1 :])

    one = tensors[argument]
    with pytest.raises(RuntimeError, match="does not implement forward-mode differentiation"):
        jvp(of_one, (one,), (one,))
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="does not implement forward-mode differentiation"),
    ):
        of_one(forward_ad.make_dual(one, one))


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_a_second_derivative_is_refused(normalisation: str) -> None:
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(
        ours(normalisation)(leaf, w, ids, log_probs), leaf, create_graph=True
    )
    with pytest.raises(RuntimeError, match="does not implement double backward"):
        first.square().sum().backward()
    with pytest.raises(RuntimeError, match="does not implement double backward"):
        grad(lambda x: grad(ours(normalisation))(x, w, ids, log_probs).square().sum())(x)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_a_batch_of_upstream_gradients(normalisation: str) -> None:
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    got, want = (
        torch.autograd.grad(
            of(normalisation, "none")(*leaves, ids, log_probs),
            leaves,
            torch.eye(4).to(x),
            is_grads_batched=True,
        )
        for of in (ours, dense)
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
