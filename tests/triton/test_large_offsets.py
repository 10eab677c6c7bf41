"""Tensors of more than 2^31 entries on a GPU: where a 32-bit offset would wrap; small without one."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.ops.test_error_budget import within_budget
from tests.triton.problem import NARROW, RUNS
from torch import Tensor

import levelhead

pytestmark = pytest.mark.parametrize(("impl", "device"), RUNS)


def _needs(gigabytes: int, device: str) -> None:
    if device == "cpu":
        return
    torch.cuda.empty_cache()  # what earlier tests hold is free too
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory, {free / 2**30:.1f} are free")


def _rows(rows: int, columns: int, scale: float, device: str) -> Tensor:
    return torch.randn(rows, columns, dtype=NARROW, device=device).mul_(scale)


def _columns(rows: int, columns: int, scale: float, device: str) -> Tensor:
    return _rows(columns, rows, scale, device).T


def _blocks(length: int, size: int) -> Iterator[slice]:
    yield from (slice(start, min(start + size, length)) for start in range(0, length, size))


def _logits(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the logits of a few tokens in a dtype's arithmetic, a block of the vocabulary at a time."""
    blocks = _blocks(len(weight), 2**28 // (8 * weight.shape[1]) + 1)
    return torch.cat([x.to(dtype) @ weight[block].to(dtype).T for block in blocks], 1)


def _ends(length: int, device: str, around: int = 0) -> Tensor:
    """Return the first, the last and, if they are there, the rows around a place."""
    places = torch.cat(
        [torch.arange(8), torch.arange(8) - 8 + length, torch.arange(8) - 4 + around]
    )
    return places[(places >= 0) & (places < length)].unique().to(device)


# (N, D, V), how input and weight lie in memory, GiB. What passes 2^31 is V x D, N x D, and each by rows and columns.
LARGE_OPERANDS = [
    ((40, 4096, 600_000), _rows, _rows, 14),
    ((40, 4096, 600_000), _rows, _columns, 14),
    ((600_000, 4096, 40), _rows, _rows, 14),
    ((600_000, 4096, 40), _columns, _rows, 14),
]


@pytest.mark.parametrize(("sizes", "x_layout", "weight_layout", "gigabytes"), LARGE_OPERANDS)
def test_statistics_of_large_operands(
    sizes: tuple[int, int, int], x_layout: Callable[..., Tensor], weight_layout: Callable[..., Tensor],
    gigabytes: int, impl: str, device: str,
) -> None:  # fmt: skip
    _needs(gigabytes, device)
    n, d, v = sizes if device != "cpu" else (20, 8, 21)
    x, weight = x_layout(n, d, 1, device), weight_layout(v, d, 3 / d**0.5, device)
    some = _ends(n, device)
    picks = _ends(v, device)[-3:].repeat(n, 1)
    stats = levelhead.linear_logit_stats(x, weight, picks, impl=impl)
    true, same = (_logits(x[some], weight, dtype) for dtype in (torch.float64, NARROW))
    fields: dict[str, Callable[[Tensor], Tensor]] = {
        "logsumexp": lambda z: z.logsumexp(1),
        "picked": lambda z: z.gather(1, picks[some]),
        "mean": lambda z: z.mean(1),
        "expected": lambda z: (z.softmax(1) * z).sum(1),
        "max": lambda z: z.amax(1),
    }
    for name, function in fields.items():
        got = getattr(stats, name)[some]
        within_budget(name, got, function(true), function(same.float()))
    chosen = true.gather(1, stats.argmax[some, None])[:, 0]
    within_budget("argmax", chosen, true.amax(1), same.amax(1))


# (N, D, V), reduction, GiB: what passes 2^31 is a chunk of logits, 4096 x V; a slab of them, N x 2048; the weight.
LARGE_LOGITS = [
    ((4096, 64, 600_000), "sum", 14),
    ((2**20 + 77, 64, 4096), "none", 14),
    ((40, 4096, 600_000), "none", 24),
    ((40, 4096, 600_000), "sum", 24),
]


@pytest.mark.parametrize(("sizes", "reduction", "gigabytes"), LARGE_LOGITS)
def test_gradients_of_many_logits(
    sizes: tuple[int, int, int], reduction: Any, gigabytes: int, impl: str, device: str
) -> None:
    _needs(gigabytes, device)
    n, d, v = sizes if device != "cpu" else (20, 8, 21)
    x = _rows(n, d, 1, device).requires_grad_()
    weight = _rows(v, d, 3 / d**0.5, device).requires_grad_()
    target = torch.randint(0, v, (n,), device=device)
    loss = levelhead.linear_cross_entropy(x, weight, target, reduction=reduction, impl=impl)
    dx, dw = torch.autograd.grad(loss.sum(), (x, weight))
    x, weight = x.detach(), weight.detach()

    some = _ends(n, device, around=2**31 // v)
    true, same = (_logits(x[some], weight, dtype) for dtype in (torch.float64, NARROW))
    true, same = (_derivative(z, z.double().logsumexp(1), target[some]) for z in (true, same))
    within_budget(
        "dx", dx[some], _product(true, weight, torch.float64), _product(same, weight, NARROW)
    )

    entries = _ends(v, device, around=2**31 // d)
    logsumexps = _logsumexps(x, weight)
    ids = torch.where(target[:, None] == entries, torch.arange(len(entries), device=device), -1)
    ids = ids.amax(1)  # which of the entries is the target, -1 if none
    for_true, for_same = (
        _derivative(x.to(dtype) @ weight[entries].to(dtype).T, logsumexps, ids)
        for dtype in (torch.float64, NARROW)
    )
    within_budget("dw", dw[entries], for_true.T @ x.double(), for_same.to(NARROW).T @ x)


def _derivative(z: Tensor, logsumexp: Tensor, target: Tensor) -> Tensor:
    """Return the loss's derivative with respect to some of the logits, in float64; target is -1 for none of them."""
    p = (z.double() - logsumexp[:, None]).exp()
    own = torch.arange(z.shape[1], device=z.device) == target[:, None]
    return p - own.double()


def _product(da: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``da W`` of a few tokens in a dtype's arithmetic."""
    if dtype != torch.float64:
        return da.to(dtype) @ weight
    blocks = _blocks(len(weight), 2**28 // (8 * weight.shape[1]) + 1)
    return sum((da[:, block] @ weight[block].double() for block in blocks), start=da.new_zeros(()))


def _logsumexps(x: Tensor, weight: Tensor) -> Tensor:
    """Return the normaliser of every token in float64, 2^27 logits at a time."""
    blocks = _blocks(len(x), 2**27 // len(weight) + 1)
    return torch.cat([_logits(x[block], weight, torch.float64).logsumexp(1) for block in blocks])
