"""A head whose rows are shared by ranks is refused under the transforms of torch, in words."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.func import functionalize, grad, jvp, vmap

import levelhead

X, TARGET = torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)


@pytest.fixture(scope="module")
def head() -> Iterator[DTensor]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield distribute_tensor(torch.randn(7, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
    dist.destroy_process_group()


def _loss(x: Tensor, head: Tensor) -> Tensor:
    return levelhead.linear_cross_entropy(x, head, TARGET)


def _logsumexp(x: Tensor, head: Tensor) -> Tensor:
    return levelhead.linear_logit_stats(x, head, TARGET).logsumexp.sum()


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, head: grad(f)(X, head),
    "grad of the head": lambda f, head: grad(f, argnums=1)(X, head),
    "vmap": lambda f, head: vmap(f, (0, None))(X[None], head),
    "jvp": lambda f, head: jvp(lambda x: f(x, head), (X,), (X,)),
    "functionalize": lambda f, head: functionalize(f)(X, head),
}


@pytest.mark.parametrize("function", [_loss, _logsumexp])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_torch_func_is_refused(head: DTensor, name: str, function: Any) -> None:
    with pytest.raises(RuntimeError, match=r"^levelhead does not run .* torch\.func .*full_tensor"):
        TRANSFORMS[name](function, head)


@pytest.mark.parametrize("function", [_loss, _logsumexp])
def test_a_tangent_is_refused(head: DTensor, function: Any) -> None:
    with forward_ad.dual_level():
        assert function(X, head).isfinite()  # where there is none, nothing is refused
        with pytest.raises(RuntimeError, match="levelhead does not implement forward-mode"):
            function(forward_ad.make_dual(X, X), head)
