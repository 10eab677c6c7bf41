"""ATen implementation: any device, any floating dtype; logits stand only in a bounded buffer that is used again and again.

NVD below is one multiply-add per token, vocabulary entry and hidden unit.

``linear_logit_stats`` (2 NVD) and its backward (6 NVD) visit tiles of tokens x vocabulary. A tile's statistics
are merged into its tokens'; its gradient is formed in place and multiplied out at once. Each tile of the weight
gradient accumulates over all tokens before it is rounded, once.

``linear_cross_entropy`` (6 NVD, forward and backward together) visits chunks of tokens x the whole vocabulary, so
that the softmax is known while the logits still stand in the buffer. The weight gradient accumulates over
the chunks in (V, D) float32; for float32 and float16 weights that is the result itself, no second buffer.

Products accumulate in float32 (float64 for float64). An accelerator multiplies narrow operands as they are, into
a float32 result; a CPU multiplies float32 copies, made tile by tile.

Smoothing by its rank-one form would save two passes over the buffer, which here are 0.5 % of the time; the
products are the rest.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import tile
from .loss import token_loss, token_loss_backward
from .reference import GradientDtypes, Gradients
from .rows import Rows
from .statistics import LogitStats, StatsGradient, empty_set, merge

# The memory budget for all buffers of logits: 1/8 of the weight, so that they never matter beside the weight and its
# gradient, and 24 MiB for small heads, which still holds 196 tokens at V = 32000.
_BUDGET_SHARE = 1 / 8
_BUDGET_FLOOR = 24 * 2**20  # bytes
_TILE_TOKENS = 512
_CAST_BYTES = 8 * 2**20  # of a tile of the weight that a CPU casts before it multiplies


def linear_logit_stats(
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    picks: Tensor,  # (N, K)
    linear_bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
) -> LogitStats:
    """Return the statistics of the logits, fields of shape (N,) and (N, K)."""
    dtype, operand, linear_weight = _operands(input, linear_weight)
    tokens = min(_TILE_TOKENS, max(len(input), 1))
    entries = min(len(linear_weight), _fit(linear_weight, dtype, tokens, buffers=2))
    z_buffer, scratch = torch.empty(2, tokens * entries, dtype=dtype, device=input.device)
    parts = []
    for rows in _slices(max(len(input), 1), tokens):
        x, ids = input[rows].to(operand), picks[rows]
        stats = empty_set(ids, dtype)
        for columns, weight, bias in _head_tiles(linear_weight, linear_bias, operand, entries):
            z = _view(z_buffer, x, weight)
            tile.logits_(z, x, weight, bias, softcap, logit_scale)
            part = tile.stats(z, ids, columns.start, _view(scratch, x, weight))
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
    logsumexp: Tensor,  # (N,)
    expected: Tensor,  # (N,)
    softcap: float | None,
    logit_scale: float,
    gradient_dtypes: GradientDtypes,
) -> Gradients:
    """Return the gradients of input, weight and bias; None where not needed."""
    kept = Rows(keep)
    input, picks, gradient = kept.take(input), kept.take(picks), gradient.map(kept.take)
    logsumexp, expected = kept.take(logsumexp, fill=torch.inf), kept.take(expected)
    dtype, operand, linear_weight = _operands(input, linear_weight)
    tokens = min(_TILE_TOKENS, max(len(input), 1))
    buffers = 2 if gradient.expected is None else 3
    entries = min(len(linear_weight), _fit(linear_weight, dtype, tokens, buffers=buffers))
    z_buffer, p_buffer = torch.empty(2, tokens * entries, dtype=dtype, device=input.device)
    dx_dtype, dw_dtype, db_dtype = gradient_dtypes
    dx = _zeros(input, dx_dtype and dtype)
    dw = _zeros(linear_weight, dw_dtype)
    db = _zeros(linear_weight[:, 0], db_dtype and dtype)
    for columns, weight, bias in _head_tiles(linear_weight, linear_bias, operand, entries):
        # A tile of dw has one owner: it accumulates here, over all tokens, and is rounded once.
        dw_tile = None if dw is None else dw[columns].to(dtype)
        for rows in _slices(len(input), tokens):
            x = input[rows].to(operand)
            z, p = _view(z_buffer, x, weight), _view(p_buffer, x, weight)
            tile.logits_(z, x, weight, bias, softcap, logit_scale)
            torch.sub(z, logsumexp[rows, None], out=p).exp_()
            g = gradient.map(lambda field, rows=rows: field[rows])  # type: ignore[misc]
            size, first = len(linear_weight), columns.start
            tile.dlogits_(p, z, picks[rows], first, g, expected[rows], size, softcap)
            tile.multiply_out_(p, x, weight, logit_scale, _at(dx, rows), dw_tile, _at(db, columns))
        if dw is not None and dw_tile is not None and dw.dtype != dtype:
            dw[columns] = dw_tile
    return _finish(kept, dx, dw, db, gradient_dtypes)


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
) -> tuple[Tensor, Tensor, Gradients]:
    """Return sum_i token_weight_i * loss_i, the logsumexp (N,) and the gradients of the sum."""
    kept = Rows(token_weight != 0)
    input, picks, token_weight = map(kept.take, (input, target[:, None], token_weight))
    label_smoothing = None if label_smoothing is None else kept.take(label_smoothing)
    size = len(linear_weight)
    dtype, operand, linear_weight = _operands(input, linear_weight)
    buffers = 1 if softcap is None else 2
    tokens = min(max(len(input), 1), _fit(linear_weight, dtype, size, buffers=buffers))
    z_buffer, *other = torch.empty(buffers, tokens * size, dtype=dtype, device=input.device)
    dx, dw, db = (
        _zeros(like, needed and dtype)
        for like, needed in zip(
            (input, linear_weight, linear_weight[:, 0]), gradient_dtypes, strict=True
        )
    )
    # Where float16 probabilities are multiplied, they get the range that a loss scale would give them.
    boost = _float16_boost(token_weight) if input.dtype == torch.float16 else None
    losses, logsumexps = [token_weight[:0]], [token_weight[:0]]
    for rows in _slices(len(input), tokens):
        x, ids, w = input[rows].to(operand), picks[rows], token_weight[rows]
        eps = _at(label_smoothing, rows)
        z = _view(z_buffer, x, linear_weight)
        for columns, weight, bias in _head_tiles(linear_weight, linear_bias, operand, size):
            tile.logits_(z[:, columns], x, weight, bias, softcap, logit_scale)
        picked, mean, largest = tile.pick(z, ids, 0)[:, 0], z.mean(1), z.amax(1)
        # In place, unless the derivative of the softcap will ask for z.
        exps = _view(other[0], x, linear_weight) if other else z
        torch.sub(z, largest[:, None], out=exps).exp_()
        total = exps.sum(1)
        logsumexp = largest + total.log()
        losses.append(w * token_loss(logsumexp, picked, mean, eps, z_loss))
        logsumexps.append(logsumexp)
        g = token_loss_backward(w if boost is None else w * boost, logsumexp, eps, z_loss)
        g = g._replace(logsumexp=g.logsumexp / total)
        da = tile.dlogits_(exps, z, ids, 0, g, None, size, softcap)
        for columns, weight, _ in _head_tiles(linear_weight, None, operand, size):
            tile.multiply_out_(
                da[:, columns], x, weight, logit_scale,
                _at(dx, rows), _at(dw, columns), _at(db, columns),
            )  # fmt: skip
    if boost is not None:
        dx, dw, db = (None if g is None else g.div_(boost) for g in (dx, dw, db))
    gradients = _finish(kept, dx, dw, db, gradient_dtypes)
    return torch.cat(losses).sum(), kept.put(torch.cat(logsumexps)), gradients


def buffer_budget(linear_weight: Tensor) -> int:
    """Return what all buffers of logits may take together, in bytes."""
    return max(_BUDGET_FLOOR, int(_BUDGET_SHARE * linear_weight.numel() * linear_weight.itemsize))


def _fit(linear_weight: Tensor, dtype: torch.dtype, side: int, *, buffers: int) -> int:
    """Return the other side of the largest tile of which ``buffers`` fit the budget; at least 1."""
    return max(1, buffer_budget(linear_weight) // (buffers * dtype.itemsize * side))


def _operands(input: Tensor, linear_weight: Tensor) -> tuple[torch.dtype, torch.dtype, Tensor]:
    """Return the dtype to accumulate in, the dtype to multiply in, and the weight to take tiles of."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if input.device.type == "cpu":
        return dtype, dtype, linear_weight  # cast tile by tile
    return dtype, input.dtype, linear_weight.to(input.dtype)


def _head_tiles(
    weight: Tensor, bias: Tensor | None, operand: torch.dtype, entries: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield the head in tiles of at most ``entries`` vocabulary entries, ready to multiply."""
    if weight.dtype != operand:
        entries = min(entries, max(1, _CAST_BYTES // (weight.shape[1] * operand.itemsize)))
    for columns in _slices(len(weight), entries):
        yield columns, weight[columns].to(operand), None if bias is None else bias[columns]


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _view(buffer: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the start of a buffer as a tile of logits, (tokens of x, entries of weight)."""
    return buffer[: len(x) * len(weight)].view(len(x), len(weight))


def _zeros(like: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else torch.zeros(like.shape, dtype=dtype, device=like.device)


def _at(tensor: Tensor | None, where: slice) -> Tensor | None:
    return None if tensor is None else tensor[where]


def _finish(
    kept: Rows,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    gradient_dtypes: GradientDtypes,
) -> Gradients:
    """Round the accumulators to the dtypes asked for, and give the rows left out their zeros."""
    dx_dtype, dw_dtype, db_dtype = gradient_dtypes
    return (
        None if dx is None else kept.put(dx.to(dx_dtype)),
        None if dw is None else dw.to(dw_dtype),
        None if db is None else db.to(db_dtype),
    )


def _float16_boost(token_weight: Tensor) -> Tensor:
    """Return the power of two that takes the largest token weight to [2^13, 2^14)."""
    largest = torch.cat([token_weight.abs(), token_weight.new_zeros(1)]).amax()
    return torch.ldexp(torch.ones_like(largest), 14 - torch.frexp(largest).exponent)
