"""Gradients as sums over slices: how the slices are cut, where a sum starts and how it ends."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .rows import Rows
from .sizes import sizes
from .statistics import GradientDtypes, Gradients, statistics_dtype
from .tile import addmm_


def slices(length: int, size: int, multiple: int = 1) -> Iterator[slice]:
    """Yield equal slices, of at most ``size`` rounded up to a ``multiple``; only the last may be shorter.

    Equal, because a short last one would be slow and, of one row, less precise.
    """
    if length:
        equal = -(-length // -(-length // size))
        size = -(-equal // multiple) * multiple
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def at(tensor: Tensor | None, where: slice) -> Tensor | None:
    """Return ``tensor[where]``, or None if ``tensor`` is None."""
    return None if tensor is None else tensor[where]


def zeros(like: Tensor, needed: torch.dtype | None, dtype: torch.dtype | None) -> Tensor | None:
    """Return zeros of the shape of ``like``, to which a gradient is added; None if it is not needed."""
    return None if needed is None else torch.zeros(like.shape, dtype=dtype, device=like.device)


def empty(like: Tensor, needed: torch.dtype | None, dtype: torch.dtype | None) -> Tensor | None:
    """Return memory of the shape of ``like``, which a gradient overwrites; None if it is not needed."""
    return None if needed is None else torch.empty(like.shape, dtype=dtype, device=like.device)


def multiply_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float, beta: float = 0) -> Tensor:
    """``out = beta * out + alpha * a b``, accumulated in float32 at least and rounded once; beta is 0 if narrow."""
    dtype = statistics_dtype(out.dtype)
    if out.dtype == dtype:
        return addmm_(out, a, b, alpha=alpha, beta=beta)
    for rows in slices(len(out), sizes().sum_rows):
        wide = torch.empty_like(out[rows], dtype=dtype)
        out[rows] = addmm_(wide, a[rows], b, alpha=alpha, beta=0)
    return out


def finish(sums: Gradients, dtypes: GradientDtypes, kept: Rows) -> Gradients:
    """Round the sums to the dtypes asked for, and give the rows that were left out their zeros."""
    dx, dw, db = (
        None if total is None else total.to(dtype)
        for total, dtype in zip(sums, dtypes, strict=True)
    )
    return None if dx is None else kept.put(dx), dw, db


def float16_scale(token_weight: Tensor) -> Tensor:
    """Return the power of two that takes the largest weight to [2^13, 2^14).

    Where float16 probabilities are multiplied, they then have the range that a loss scale would give them.
    """
    largest = torch.cat([token_weight.abs(), token_weight.new_zeros(1)]).amax()
    return torch.ldexp(torch.ones_like(largest), 14 - torch.frexp(largest).exponent)
