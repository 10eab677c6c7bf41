"""ATen implementation: any device, any floating dtype; logits stand only in a bounded buffer, used again and again.

NVD below is one multiply-add per token, vocabulary entry and hidden unit.

``linear_logit_stats`` (2 NVD) and its backward (6 NVD) visit tiles of tokens x vocabulary. A tile's statistics
are merged into its tokens'; its gradient is formed in place and multiplied out at once. Each tile of the weight
gradient accumulates over all tokens before it is rounded, once.

``linear_cross_entropy`` (6 NVD, forward and backward together) visits chunks of tokens x the whole vocabulary, so
that the softmax is known while the logits still stand in the buffer. The weight gradient accumulates over
the chunks in (V, D) float32; for float32 and float16 weights that is the result itself, no second buffer.

Products accumulate in float32 (float64 for float64). An accelerator multiplies narrow operands as they are, into
a float32 result; a CPU multiplies float32 copies, made tile by tile.

The rank-one form of smoothing is not used: it would save two passes over a buffer that stands in cache, beside
three products that take nearly all the time.
"""

from collections.abc import Iterator
from operator import itemgetter

import torch
from torch import Tensor

from . import tile
from .loss import picks, token_loss, token_loss_backward
from .rows import Rows
from .sizes import sizes
from .statistics import (
    GradientDtypes,
    Gradients,
    LogitStats,
    StatsGradient,
    empty_set,
    merge,
    statistics_dtype,
)
from .sums import at, finish, float16_scale, slices, zeros


def linear_logit_stats(
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    picks: Tensor,  # (N, K)
    linear_bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
) -> LogitStats:
    """Return the statistics of the logits, fields of shape (N,) and (N, K)."""
    dtype = statistics_dtype(input.dtype)
    tokens, entries = _tile_shape(input, linear_weight, dtype, buffers=2)
    t_buffer, scratch = torch.empty(2, tokens * entries, dtype=dtype, device=input.device)
    parts = []
    for rows in slices(max(len(input), 1), tokens):
        x, ids, stats = input[rows], picks[rows], empty_set(picks[rows], dtype)
        for columns, weight, bias in _head_tiles(input, linear_weight, linear_bias, entries):
            t = tile.fill_(_view(t_buffer, x, weight), x, weight, bias, softcap, logit_scale)
            there = tile.local(ids, columns.start, weight.shape[0])
            part = tile.stats(t, softcap, there, columns.start, _view(scratch, x, weight))
            stats = merge(stats, columns.start, part, len(weight))
        parts.append(stats)
    return LogitStats(*(torch.cat(field) for field in zip(*parts, strict=True)))


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
    kept, size = Rows(keep), len(linear_weight)
    input, picks, gradient = kept.take(input), kept.take(picks), gradient.map(kept.take)
    total, expected = kept.take(logsumexp).exp(), kept.take(expected)
    largest = kept.take(largest, fill=torch.inf)  # above it the probability of every entry is 0
    dtype = statistics_dtype(input.dtype)
    buffers = 2 if gradient.expected is None else 3
    tokens, entries = _tile_shape(input, linear_weight, dtype, buffers=buffers)
    buffer = torch.empty(buffers, tokens * entries, dtype=dtype, device=input.device)
    dx = zeros(input, gradient_dtypes[0], dtype)
    dw = zeros(linear_weight, gradient_dtypes[1], gradient_dtypes[1])
    db = zeros(linear_weight.new_empty(size), gradient_dtypes[2], dtype)
    for columns, weight, bias in _head_tiles(input, linear_weight, linear_bias, entries):
        # A tile of dw has one owner: it accumulates here, over all tokens, and is rounded once.
        dw_tile = None if dw is None else dw[columns].to(dtype)
        for rows in slices(len(input), tokens):
            x, ids, g = input[rows], picks[rows], gradient.map(itemgetter(rows))
            t, r, p = (_view(buffer[i], x, weight) for i in (0, 1, -1))
            tile.fill_(t, x, weight, bias, softcap, logit_scale)
            tile.relative(tile.logits(t, softcap, out=r), largest[rows], out=r)
            da = tile.gradient_(
                torch.exp(r, out=p), t, tile.local(ids, columns.start, weight.shape[0]), g,
                total[rows], size, softcap, r, expected[rows],
            )  # fmt: skip
            tile.multiply_out_(da, x, weight, logit_scale, at(dx, rows), dw_tile, at(db, columns))
        if dw is not None and dw_tile is not None and dw.dtype != dtype:
            dw[columns] = dw_tile
    return finish((dx, dw, db), gradient_dtypes, kept)


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
    kept, size = Rows(token_weight != 0), len(linear_weight)
    input, target, token_weight = (kept.take(t) for t in (input, target, token_weight))
    smoothing = None if label_smoothing is None else kept.take(label_smoothing)
    dtype = statistics_dtype(input.dtype)
    buffers = 1 if softcap is None else 2  # the derivative of a softcap needs the logits once more
    tokens = chunk_tokens(len(input), linear_weight, dtype, buffers=buffers)
    buffer = torch.empty(buffers, tokens * size, dtype=dtype, device=input.device)
    dx = zeros(input, gradient_dtypes[0], dtype)
    dw = zeros(linear_weight, gradient_dtypes[1], dtype)
    db = zeros(linear_weight.new_empty(size), gradient_dtypes[2], dtype)
    scale = float16_scale(token_weight) if input.dtype == torch.float16 else None
    losses = [token_weight[:0]]
    for rows in slices(len(input), tokens):
        x, w, eps = input[rows], token_weight[rows], at(smoothing, rows)
        there = tile.local(picks(target[rows], z_loss), 0, size)
        t, exps = _view(buffer[0], x, linear_weight), _view(buffer[-1], x, linear_weight)
        for columns, weight, bias in _head_tiles(input, linear_weight, linear_bias, size):
            tile.fill_(t[:, columns], x, weight, bias, softcap, logit_scale)
        picked, mean, largest, total = tile.softmax(t, softcap, there, out=exps)
        logsumexp = total.log()
        loss = w * token_loss(largest, logsumexp, picked[:, 0], mean, eps, z_loss)
        losses.append(loss.masked_fill(w == 0, 0))  # where it is infinite or NaN, too
        g = token_loss_backward(w if scale is None else w * scale, largest, logsumexp, eps, z_loss)
        da = tile.gradient_(exps, t, there, g, total, size, softcap)
        for columns, weight, _ in _head_tiles(input, linear_weight, None, size):
            tile.multiply_out_(
                da[:, columns], x, weight, logit_scale,
                at(dx, rows), at(dw, columns), at(db, columns),
            )  # fmt: skip
    if scale is not None:
        dx, dw, db = (None if g is None else g.div_(scale) for g in (dx, dw, db))
    return torch.cat(losses).sum(), finish((dx, dw, db), gradient_dtypes, kept)


def buffer_budget(linear_weight: Tensor) -> int:
    """Return what all buffers of logits may take together, in bytes."""
    return max(
        sizes().buffer_bytes,
        int(sizes().buffer_share * linear_weight.numel() * linear_weight.itemsize),
    )


def _tile_shape(
    input: Tensor, linear_weight: Tensor, dtype: torch.dtype, *, buffers: int
) -> tuple[int, int]:
    """Return how many tokens and entries a tile has, so that all buffers of that shape fit the budget."""
    tokens = min(sizes().tile_tokens, max(len(input), 1))
    entries = buffer_budget(linear_weight) // (buffers * dtype.itemsize * tokens)
    return tokens, min(max(entries, 1), len(linear_weight))


def chunk_tokens(count: int, linear_weight: Tensor, dtype: torch.dtype, *, buffers: int = 1) -> int:
    """Return how many of ``count`` tokens a chunk has, so that all buffers for the whole vocabulary fit the budget."""
    token_bytes = buffers * dtype.itemsize * len(linear_weight)
    needed = -(-count // max(1, buffer_budget(linear_weight) // token_bytes))
    least, most = sizes(), sizes().chunks
    worthwhile = min(most, count // least.chunk_tokens, count * token_bytes // least.chunk_bytes)
    return max(1, -(-count // max(1, needed, worthwhile)))


def _operand_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype to multiply in: only accelerators have a product of narrow operands with a wide result."""
    return statistics_dtype(input.dtype) if input.device.type == "cpu" else input.dtype


def _head_tiles(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, entries: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield the head in tiles of at most ``entries`` vocabulary entries, in the dtype to multiply in."""
    operand = _operand_dtype(input)
    if linear_weight.dtype != operand:
        row_bytes = operand.itemsize * max(linear_weight.shape[1], 1)
        entries = min(entries, max(1, sizes().cast_bytes // row_bytes))
    for columns in slices(len(linear_weight), entries):
        yield columns, linear_weight[columns].to(operand), at(linear_bias, columns)


def _view(buffer: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the start of a buffer as a tile of logits, (tokens of x, entries of weight)."""
    tokens, entries = x.shape[0], weight.shape[0]
    return buffer[: tokens * entries].view(tokens, entries)
