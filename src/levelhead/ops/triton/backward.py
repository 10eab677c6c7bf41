"""The gradient of any loss of the statistics, 6 NVD: the logits once more, then two products.

The vocabulary is gone through in slabs. A kernel recomputes a slab's logits, turns each tile into the gradient while
it stands in registers, and writes it in the operands' dtype, (N, slab). Then the library multiplies: the slab's rows of
the weight gradient are complete, over all tokens at once, and are rounded once; the gradient of the input accumulates
over the slabs in float32. Every element has one owner at a time: no atomics, no locks, the same bits every time.

One fused kernel for all of it would have to add each tile's share to a gradient that does not fit on the chip, in
memory, under a lock. (Cut Cross-Entropy's exact backward, which does, takes 324 ms on an A100 for N = 8192, V = 256000,
D = 2304, by its paper: 29 % of the matrix rate.) Here the accumulation moves
8 N D bytes a slab beside 6 N D S operations of S entries: on an H200 (about 790 TFLOP/s in large bfloat16 products,
4.8 TB/s) 219 / S of their time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import Rows
from ..sizes import sizes
from ..statistics import GradientDtypes, Gradients, StatsGradient, anchor, statistics_dtype
from ..sums import at, empty, finish, multiply_, slices
from ..tile import addmm_
from .launch import cdiv, configuration, dense, launch, precision
from .primitives import capped, finite, grouped, logits_before_softcap


@triton.jit(do_not_specialize=["N", "first_id", "K"])
def gradient_kernel(
    x,  # (N, D)
    weight,  # (V, D)
    bias,  # (V,) or None
    maximum,  # (N,), finite where all logits are -inf
    coefficients,  # (3, N): with r = z - maximum, of exp(r), of r exp(r), and what every entry gets
    picks,  # (N, K), ids of the whole vocabulary
    grad_picked,  # (N, K)
    gradient,  # (N, V), rows of gradient_stride_n
    N,
    V,
    D,
    K,
    first_id,
    x_stride_n,
    x_stride_d,
    weight_stride_v,
    weight_stride_d,
    gradient_stride_n,
    OF_EXPECTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write a tile of the gradient with respect to the logits before the softcap, for entries first_id, ..."""
    DTYPE: tl.constexpr = maximum.dtype.element_ty
    row_tile, column_tile = grouped(
        tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP
    )
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    within = tl.minimum(rows, N - 1)
    a = logits_before_softcap(
        x, weight, bias, within, tl.minimum(columns, V - 1), D,
        x_stride_n, x_stride_d, weight_stride_v, weight_stride_d,
        LOGIT_SCALE, EVEN_D, BLOCK_D, PRECISION, DTYPE,
    )  # fmt: skip
    z, slope = capped(a, SOFTCAP)
    relative = z - tl.load(maximum + within)[:, None]
    exps = tl.exp(relative)
    of_exp = tl.load(coefficients + within)[:, None]
    if OF_EXPECTED:
        of_exp += tl.load(coefficients + N + within)[:, None] * finite(relative)
    dz = exps * of_exp + tl.load(coefficients + 2 * N + within)[:, None]
    first_pick = within.to(tl.int64) * K
    for k in range(0, K):
        own = tl.load(picks + first_pick + k)[:, None] == first_id + columns[None, :]
        dz += tl.where(own, tl.load(grad_picked + first_pick + k)[:, None], 0.0)
    out = gradient + rows.to(tl.int64)[:, None] * gradient_stride_n + columns[None, :]
    mask = (rows < N)[:, None] & (columns < V)[None, :]
    tl.store(out, (dz * slope).to(gradient.dtype.element_ty), mask)


def linear_logit_stats_backward(
    gradient: StatsGradient,  # (N,) and (N, K)
    keep: Tensor,  # (N,) bool, the rows with any gradient
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    picks: Tensor,  # (N, K)
    linear_bias: Tensor | None,  # (V,)
    logsumexp: Tensor,  # (N,), relative to the largest logit
    expected: Tensor,  # (N,), relative to the largest logit
    largest: Tensor,  # (N,)
    softcap: float | None,
    logit_scale: float,
    gradient_dtypes: GradientDtypes,
) -> Gradients:
    """Return the gradients of input, weight and bias; None where not needed."""
    kept, size, dtype = Rows(keep), len(linear_weight), statistics_dtype(input.dtype)
    x, gradient = kept.take(input), gradient.map(kept.take)
    # Above an infinite one the probability of every entry is 0.
    largest = anchor(kept.take(largest, fill=torch.inf)).contiguous()
    coefficients = _coefficients(gradient, kept.take(logsumexp), kept.take(expected), size)
    ids = kept.take(picks if gradient.picked is not None else picks[:, :0]).contiguous()
    grad_picked = ids if gradient.picked is None else gradient.picked.contiguous()
    bias = dense(linear_bias)
    block = configuration("gradient", x)
    dx = empty(x, gradient_dtypes[0], dtype)
    dw = empty(linear_weight, gradient_dtypes[1], gradient_dtypes[1])
    db = empty(linear_weight.new_empty(size), gradient_dtypes[2], dtype)
    slabs = list(slices(size, _slab_entries(x, size), sizes().entry_alignment))
    buffer = x.new_empty(len(x), slabs[0].stop)
    for columns in slabs:
        weight = linear_weight[columns].to(x.dtype)  # a copy under autocast only
        da = buffer[:, : len(weight)]
        launch(
            gradient_kernel,
            cdiv(len(x), block["BLOCK_N"]) * cdiv(len(weight), block["BLOCK_V"]),
            x, weight, at(bias, columns), largest, coefficients, ids, grad_picked, da,
            *da.shape, x.shape[1], ids.shape[1], columns.start,
            *x.stride(), *weight.stride(), da.stride(0),
            OF_EXPECTED=gradient.expected is not None, SOFTCAP=softcap, LOGIT_SCALE=logit_scale,
            EVEN_D=x.shape[1] % block["BLOCK_D"] == 0, PRECISION=precision(x.dtype), **block,
        )  # fmt: skip
        if dx is not None:
            addmm_(dx, da, weight, alpha=logit_scale, beta=int(columns.start > 0))
        if dw is not None:
            multiply_(dw[columns], da.T, x, alpha=logit_scale)
        if db is not None:
            db[columns] = logit_scale * da.sum(0, dtype=dtype)
    return finish((dx, dw, db), gradient_dtypes, kept)


def _coefficients(
    gradient: StatsGradient, logsumexp: Tensor, expected: Tensor, vocabulary: int
) -> Tensor:
    """Return, with r = z - max, what multiplies exp(r) and r exp(r), and what every entry gets, (3, N)."""
    nothing = torch.zeros_like(expected)
    of_logsumexp, of_expected, of_mean = (
        nothing if field is None else field
        for field in (gradient.logsumexp, gradient.expected, gradient.mean)
    )
    of_p = of_logsumexp + of_expected * (1 - expected)
    total = logsumexp.exp()
    return torch.stack([of_p / total, of_expected / total, of_mean / vocabulary])


def _slab_entries(x: Tensor, vocabulary: int) -> int:
    """Return how many entries a slab has, so that its gradient (N, slab) fits the budget."""
    entries = int(sizes().gradient_share * vocabulary * x.shape[1]) // max(len(x), 1)
    return max(sizes().gradient_entries, entries)
