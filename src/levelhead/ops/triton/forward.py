"""Statistics of the logits, 2 NVD: tiles of logits stand in registers, never in memory.

A program takes BLOCK_N tokens and a share of the vocabulary, and keeps five numbers a token (primitives.py) as it goes
through the tiles of its share. The shares, a few a token, are merged by a second kernel in the order of their entries:
no atomics, no locks, the same bits every time. A third one reads the picked logits, a dot product each.

The alternative, a library product into a bounded buffer and a kernel that reads it, moves 8 more bytes a logit. On an
H200 (about 790 TFLOP/s in large bfloat16 products, 4.8 TB/s) with D = 4096 that is 8 / 4.8e12 s beside 2 D / 790e12 s:
16 % more. Unless a Triton product is slower by more than that, which is not yet measured, it is no slower here, and it
needs no buffer.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sizes import sizes
from ..statistics import LogitStats, statistics_dtype
from ..sums import at, slices
from .launch import cdiv, configuration, dense, launch, precision, processors
from .primitives import (
    capped,
    empty_state,
    grouped,
    logits_before_softcap,
    merge_states,
    tile_state,
)


@triton.jit(do_not_specialize=["N", "first_id", "shares", "tiles_per_share", "field_stride"])
def state_kernel(
    x,  # (N, D)
    weight,  # (V, D)
    bias,  # (V,) or None
    states,  # (5, shares, N) of a larger tensor: size, largest, total, weighted, sum
    best_ids,  # (shares, N)
    N,
    V,
    D,
    first_id,
    shares,
    tiles_per_share,
    field_stride,
    x_stride_n,
    x_stride_d,
    weight_stride_v,
    weight_stride_d,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write the state of BLOCK_N tokens over one share of the vocabulary."""
    row_tile, share = grouped(tl.program_id(0), tl.cdiv(N, BLOCK_N), shares, GROUP)
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    DTYPE: tl.constexpr = states.dtype.element_ty
    state = empty_state(BLOCK_N, DTYPE)
    start = share * tiles_per_share
    stop = tl.minimum(start + tiles_per_share, tl.cdiv(V, BLOCK_V))
    for tile in range(start, stop):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        a = logits_before_softcap(
            x, weight, bias, tl.minimum(rows, N - 1), tl.minimum(columns, V - 1), D,
            x_stride_n, x_stride_d, weight_stride_v, weight_stride_d,
            LOGIT_SCALE, EVEN_D, BLOCK_D, PRECISION, DTYPE,
        )  # fmt: skip
        z, _ = capped(a, SOFTCAP)
        part = tile_state(z, (columns < V)[None, :], first_id + tile * BLOCK_V)
        part_size = tl.minimum(V - tile * BLOCK_V, BLOCK_V)
        state = merge_states(state, (tile - start) * BLOCK_V, part, part_size)
    largest, total, weighted, sums, best = state
    size = tl.minimum(V, stop * BLOCK_V) - start * BLOCK_V
    share_rows = tl.cast(share, tl.int64) * N + rows
    field = field_stride.to(tl.int64)
    mask = rows < N
    tl.store(states + share_rows, size.to(DTYPE), mask)
    tl.store(states + field + share_rows, largest, mask)
    tl.store(states + 2 * field + share_rows, total, mask)
    tl.store(states + 3 * field + share_rows, weighted, mask)
    tl.store(states + 4 * field + share_rows, sums, mask)
    tl.store(best_ids + share_rows, best, mask)


@triton.jit(do_not_specialize=["N", "shares"])
def merge_kernel(
    states,  # (5, shares, N)
    best_ids,  # (shares, N)
    logsumexp,  # (N,), as all that follow; this and the next two relative to the largest logit
    mean,
    expected,
    maximum,
    argmax,
    N,
    V,
    shares,
    BLOCK_N: tl.constexpr,
):
    """Merge the states of all shares of the vocabulary, in their order, and write the statistics."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < N
    field = shares.to(tl.int64) * N
    DTYPE: tl.constexpr = states.dtype.element_ty
    state = empty_state(BLOCK_N, DTYPE)
    size = tl.zeros((BLOCK_N,), DTYPE)
    for share in range(0, shares):
        part = states + tl.cast(share, tl.int64) * N + rows
        part_size = tl.load(part, mask, other=0.0)
        other = (
            tl.load(part + field, mask, other=0.0),
            tl.load(part + 2 * field, mask, other=1.0),
            tl.load(part + 3 * field, mask, other=0.0),
            tl.load(part + 4 * field, mask, other=0.0),
            tl.load(best_ids + tl.cast(share, tl.int64) * N + rows, mask, other=0),
        )
        state = merge_states(state, size, other, part_size)
        size += part_size
    largest, total, weighted, sums, best = state
    # max() drops NaN, the sum does not: a token whose sum is NaN has a NaN among its logits.
    known = sums == sums
    largest = tl.where(known, largest, sums)
    total = tl.where(known, total, sums)
    weighted = tl.where(known, weighted, sums)
    tl.store(logsumexp + rows, tl.log(total), mask)
    tl.store(mean + rows, sums / V, mask)
    # The total is at least 1, the largest entry's, unless all are masked out: then their sum is 0 and not NaN.
    tl.store(expected + rows, weighted / tl.maximum(total, 1.0), mask)
    tl.store(maximum + rows, largest, mask)
    tl.store(argmax + rows, tl.minimum(best, V - 1).to(tl.int64), mask)


@triton.jit(do_not_specialize=["M", "K"])
def pick_kernel(
    x,  # (N, D)
    weight,  # (V, D)
    bias,  # (V,) or None
    picks,  # (N, K), M in all
    picked,  # (N, K)
    M,
    V,
    D,
    K,
    x_stride_n,
    x_stride_d,
    weight_stride_v,
    weight_stride_d,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write BLOCK_M of the picked logits, a dot product each; 0 where an id lies outside the vocabulary."""
    DTYPE: tl.constexpr = picked.dtype.element_ty
    which = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = which < M
    ids = tl.load(picks + which, mask, other=-1)
    inside = (ids >= 0) & (ids < V)
    ids = tl.where(inside, ids, 0)
    products = tl.zeros((BLOCK_M, BLOCK_D), DTYPE)
    for first in range(0, D, BLOCK_D):
        units = first + tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
        wanted = inside[:, None] & (units < D)
        x_part = tl.load(
            x + (which // K)[:, None] * x_stride_n + units * x_stride_d, wanted, other=0.0
        )
        w_part = tl.load(
            weight + ids[:, None] * weight_stride_v + units * weight_stride_d, wanted, other=0.0
        )
        # Narrowed as the operands of the tiles are: under autocast the weight may be wider than the input.
        products += x_part.to(DTYPE) * w_part.to(x.dtype.element_ty).to(DTYPE)
    a = tl.sum(products, 1)
    if bias is not None:
        a += tl.load(bias + ids).to(DTYPE)
    z, _ = capped(a * LOGIT_SCALE, SOFTCAP)
    tl.store(picked + which, tl.where(inside, z, 0.0), mask)


def linear_logit_stats(
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    picks: Tensor,  # (N, K)
    linear_bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
) -> LogitStats:
    """Return the statistics of the logits, fields of shape (N,) and (N, K)."""
    linear_bias = dense(linear_bias)
    tokens, dtype = input.shape[:1], statistics_dtype(input.dtype)
    logsumexp, mean, expected, largest = (input.new_empty(tokens, dtype=dtype) for _ in range(4))
    argmax = input.new_empty(tokens, dtype=torch.int64)
    picked = input.new_empty(picks.shape, dtype=dtype)
    model = {"SOFTCAP": softcap, "LOGIT_SCALE": logit_scale}
    states, best_ids = _states(input, linear_weight, linear_bias, **model)
    block = configuration("merge", input)
    launch(
        merge_kernel, cdiv(len(input), block["BLOCK_N"]), states, best_ids,
        logsumexp, mean, expected, largest, argmax,
        len(input), len(linear_weight), len(best_ids), **block,
    )  # fmt: skip
    block = configuration("pick", input)
    launch(
        pick_kernel, cdiv(picks.numel(), block["BLOCK_M"]), input, linear_weight, linear_bias,
        picks.contiguous(), picked, picks.numel(), *linear_weight.shape, picks.shape[1],
        *input.stride(), *linear_weight.stride(), **model, **block,
    )  # fmt: skip
    return LogitStats(logsumexp, picked, mean, expected, largest, argmax)


def _states(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, **model: Any
) -> tuple[Tensor, Tensor]:
    """Return sizes and states of all shares of the vocabulary, (5, shares, N), and the ids of their largest logits."""
    tokens, hidden = input.shape
    block = configuration("state", input)
    row_tiles = cdiv(tokens, block["BLOCK_N"])
    slabs = list(_slabs(input, linear_weight))
    entries = _share_entries(tokens, slabs, block, sizes().waves * processors(input.device))
    shares = [cdiv(slab.stop - slab.start, entries) for slab in slabs]
    states = input.new_empty(5, sum(shares), tokens, dtype=statistics_dtype(input.dtype))
    best_ids = input.new_empty(sum(shares), tokens, dtype=torch.int32)
    done = 0
    for columns, count in zip(slabs, shares, strict=True):
        weight = linear_weight[columns].to(input.dtype)
        launch(
            state_kernel, row_tiles * count, input, weight, at(linear_bias, columns),
            states[:, done:], best_ids[done:], tokens, len(weight), hidden, columns.start,
            count, entries // block["BLOCK_V"], states.stride(0), *input.stride(), *weight.stride(),
            EVEN_D=hidden % block["BLOCK_D"] == 0, PRECISION=precision(input.dtype),
            **model, **block,
        )  # fmt: skip
        done += count
    return states, best_ids


def _slabs(input: Tensor, linear_weight: Tensor) -> Iterator[slice]:
    """Yield what of the weight is multiplied at a time: all; under autocast, what is narrowed at a time."""
    entries = len(linear_weight)
    if linear_weight.dtype != input.dtype:
        entries = cdiv(sizes().slab_bytes, max(input.shape[1], 1) * input.itemsize)
    return slices(len(linear_weight), entries)


def _share_entries(tokens: int, slabs: list[slice], block: dict[str, int], programs: int) -> int:
    """Return how many entries a share has, whole tiles, so that there are so many programs."""
    row_tiles, tiles = cdiv(tokens, block["BLOCK_N"]), cdiv(slabs[0].stop, block["BLOCK_V"])
    shares = min(tiles, cdiv(programs, max(row_tiles, 1) * len(slabs)))
    return cdiv(tiles, shares) * block["BLOCK_V"]
