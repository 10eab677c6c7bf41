"""The cross-entropy with its gradient in the forward pass, 6 NVD, or 4 with a frozen head: a hybrid.

The library makes the logits of a chunk of tokens over the whole vocabulary, in float32. A kernel, one program a token,
turns them into statistics and into the gradient, and writes that in the operands' dtype: it reads a row from memory
once (the second time it stands in the L2 cache), and smoothing, bias, scale and softcap cost it nothing but arithmetic.
Then the library multiplies out. The gradient of the input is complete with its chunk; that of the weight accumulates
over the chunks in float32, and is rounded once; where one chunk holds all tokens there is nothing to accumulate.

What bounds the chunks, on an H200 (about 790 TFLOP/s in large bfloat16 products, 4.8 TB/s), beside the three products,
6 D operations a logit; derived, not yet measured:

- Reading and writing the logits, 4 + 4 + 2 bytes each: 7 % at D = 4096, 12 % at D = 2304.
- A chunk of logits reads the weight, 2 V D bytes, for 2 C V D operations: below C = 165 tokens memory sets the pace,
  on an H100 below 236. Hence logits_tokens = 512.
- Accumulating the gradient of the weight moves 8 V D bytes a chunk of M tokens, for 6 M V D operations: 219 / M of
  their time, 11 % at gradient_tokens = 2048 if none of it hides behind them. Hence two sizes: float32 logits of few
  tokens, their narrow gradients of many. Together 6 KiB an entry; more tokens would be faster, but that is what the
  logits of 2048 tokens take.

A frozen head needs no second size: 3 KiB an entry, 4 NVD. A running maximum with a rescaled accumulator, over slabs of
S entries, would need as few operations, but rescale and add to an (N, D) float32 accumulator with every slab,
16 N D bytes: 658 / S of the time of its products, where the chunks pay nothing. Smoothing is one addition a logit, in a
kernel that waits for memory: its rank-one form would save nothing.

For all tokens at once, without accumulating, either the logits must be kept or computed twice (8 NVD): the normaliser
of a token is only known after its last entry. That other way is backward.py, and serves every other loss.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..loss import token_loss
from ..rows import Rows
from ..sizes import sizes
from ..statistics import GradientDtypes, Gradients, statistics_dtype
from ..sums import at, empty, finish, float16_scale, multiply_, slices, zeros
from ..tile import addmm_
from .launch import cdiv, configuration, dense, launch
from .primitives import anchor, capped


# What changes from chunk to chunk is not compiled in: where vectors start, and how far apart the statistics are.
@triton.jit(
    do_not_specialize=["stats_stride"],
    do_not_specialize_on_alignment=["target", "token_weight", "label_smoothing", "stats"],
)
def softmax_kernel(
    products,  # (N, V), x W^T
    bias,  # (V,) or None
    target,  # (N,)
    token_weight,  # (N,)
    label_smoothing,  # (N,) or None
    stats,  # (4, N): largest, logsumexp relative to it, picked, mean relative to it
    gradient,  # (N, V), may be products
    V,
    stats_stride,
    products_stride_n,
    gradient_stride_n,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write a token's statistics, and its weighted loss's gradient with respect to the logits before the softcap."""
    DTYPE: tl.constexpr = products.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    products += row * products_stride_n
    gradient += row * gradient_stride_n
    entries = tl.arange(0, BLOCK_V)

    # Lane by lane, so that the loop reduces nothing across threads.
    largest = tl.full((BLOCK_V,), float("-inf"), DTYPE)
    total = tl.zeros((BLOCK_V,), DTYPE)
    for first in range(0, V, BLOCK_V):
        inside = first + entries < V
        z, _ = _logits(products, bias, first + entries, inside, SOFTCAP, LOGIT_SCALE)
        z = tl.where(inside, z, float("-inf"))
        new = tl.maximum(largest, z)
        total = total * tl.exp(largest - anchor(new)) + tl.exp(z - anchor(new))
        largest = new
    largest_of_all = tl.max(largest, 0)
    top = anchor(largest_of_all)
    total_of_all = tl.sum(total * tl.exp(largest - top), 0)
    logsumexp = tl.log(total_of_all)

    id = tl.load(target + row)
    valid = (id >= 0) & (id < V)
    picked, _ = _logits(products, bias, tl.where(valid, id, 0), valid, SOFTCAP, LOGIT_SCALE)
    tl.store(stats + row, largest_of_all)
    tl.store(stats + stats_stride + row, logsumexp)
    tl.store(stats + 2 * stats_stride + row, tl.where(valid, picked, 0.0))

    # The derivative of loss.token_loss with respect to the logits.
    weight = tl.load(token_weight + row)
    of_z_loss = 2 * Z_LOSS * (top + logsumexp) * weight
    of_exp = (weight + of_z_loss) / total_of_all
    of_target = -weight
    of_all = 0.0
    if label_smoothing is not None:
        smoothing = tl.load(label_smoothing + row)
        of_target = weight * (smoothing - 1)
        of_all = -weight * smoothing / V
    of_target -= of_z_loss
    tl.debug_barrier()  # all threads have read the target's logit, which the next lines may overwrite
    sums = tl.zeros((BLOCK_V,), DTYPE)
    for first in range(0, V, BLOCK_V):
        inside = first + entries < V
        z, slope = _logits(products, bias, first + entries, inside, SOFTCAP, LOGIT_SCALE)
        relative = tl.where(inside, z - top, 0.0)
        sums += relative
        dz = of_exp * tl.exp(relative) + of_all + tl.where(first + entries == id, of_target, 0.0)
        if Z_LOSS != 0:  # given back last: see loss.py
            dz += tl.where(first + entries == id, of_z_loss, 0.0)
        tl.store(gradient + first + entries, (dz * slope).to(gradient.dtype.element_ty), inside)
    tl.store(stats + 3 * stats_stride + row, tl.sum(sums, 0) / V)


@triton.jit
def _logits(products, bias, entries, inside, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr):
    """Return some logits of a token and their derivative, made of its products with the weight."""
    a = tl.load(products + entries, inside, other=0.0)
    if bias is not None:
        a += tl.load(bias + entries, inside, other=0.0).to(a.dtype)
    return capped(a * LOGIT_SCALE, SOFTCAP)


def linear_cross_entropy(
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    linear_bias: Tensor | None,  # (V,)
    token_weight: Tensor,  # (N,), 0 for ignored tokens
    label_smoothing: Tensor | None,  # (N,)
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    gradient_dtypes: GradientDtypes,
) -> tuple[Tensor, Gradients]:
    """Return sum_i token_weight_i * loss_i and its gradients."""
    kept, size, dtype = Rows(token_weight != 0), len(linear_weight), statistics_dtype(input.dtype)
    x, ids, loss_weight = (kept.take(t).contiguous() for t in (input, target, token_weight))
    smoothing = None if label_smoothing is None else kept.take(label_smoothing).contiguous()
    bias = dense(linear_bias)
    scale = float16_scale(loss_weight) if x.dtype == torch.float16 else None
    gradient_weight = loss_weight if scale is None else loss_weight * scale
    operand = linear_weight.to(x.dtype)  # a copy under autocast only, as a linear layer would make
    wide, frozen = x.dtype == dtype, gradient_dtypes[1] is None
    tokens = sizes().logits_tokens if wide or frozen else sizes().gradient_tokens
    chunks = list(slices(max(len(x), 1), tokens))
    da_buffer = _rows(min(chunks[0].stop, len(x)), size, x.dtype, x.device)
    products = (
        da_buffer if wide else _rows(min(sizes().logits_tokens, len(x)), size, dtype, x.device)
    )
    stats = torch.empty(4, len(x), dtype=dtype, device=x.device)
    dx = empty(x, gradient_dtypes[0], gradient_dtypes[0])
    # One chunk is all there is to sum, rounded once at the end of its product.
    dw = empty(linear_weight, gradient_dtypes[1], dtype if len(chunks) > 1 else gradient_dtypes[1])
    db = zeros(linear_weight.new_empty(size), gradient_dtypes[2], dtype)
    for chunk in chunks:
        da = da_buffer[: len(x[chunk])]
        _fill_(
            da, stats[:, chunk], products, x[chunk], operand, bias, ids[chunk],
            gradient_weight[chunk], at(smoothing, chunk),
            Z_LOSS=z_loss, SOFTCAP=softcap, LOGIT_SCALE=logit_scale,
        )  # fmt: skip
        if dx is not None:
            multiply_(dx[chunk], da, operand, alpha=logit_scale)
        if dw is not None:
            multiply_(dw, da.T, x[chunk], alpha=logit_scale, beta=int(chunk.start > 0))
        if db is not None:
            db.add_(da.sum(0, dtype=dtype), alpha=logit_scale)
    if scale is not None:
        dx, dw, db = (None if g is None else g.div_(scale) for g in (dx, dw, db))
    largest, logsumexp, picked, mean = stats
    loss = loss_weight * token_loss(largest, logsumexp, picked, mean, smoothing, z_loss)
    loss = loss.masked_fill(loss_weight == 0, 0)  # where it is infinite or NaN, too
    return loss.sum(), finish((dx, dw, db), gradient_dtypes, kept)


def _fill_(
    da: Tensor,  # (M, V), operands' dtype
    stats: Tensor,  # (4, M)
    products: Tensor,  # (C, V), float32 at least, overwritten; may be da
    x: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (M,)
    token_weight: Tensor,  # (M,)
    smoothing: Tensor | None,  # (M,)
    **model: Any,
) -> None:
    """Fill in the statistics of M tokens and the gradient of their logits, by way of C tokens' logits at a time."""
    for rows in slices(len(da), sizes().logits_tokens):
        logits = addmm_(products[: len(da[rows])], x[rows], weight.T, beta=0, alpha=1)
        launch(
            softmax_kernel, len(logits), logits, bias, target[rows], token_weight[rows],
            at(smoothing, rows), stats[:, rows], da[rows], len(weight),
            stats.stride(0), logits.stride(0), da.stride(0), **model, **configuration("softmax", x),
        )  # fmt: skip


def _rows(tokens: int, entries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for logits, in rows that start where wide loads want them."""
    aligned = cdiv(entries, sizes().row_alignment) * sizes().row_alignment
    return torch.empty(tokens, aligned, dtype=dtype, device=device)[:, :entries]
