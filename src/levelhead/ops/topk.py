"""The k largest logits of each token, found while the logits pass through a bounded buffer."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, tile
from .chunked import _head_tiles, _tile_shape, _view
from .statistics import anchor, statistics_dtype
from .sums import slices


class TopK(NamedTuple):
    """The largest logits of each token, and what makes probabilities of them.

    Attributes:
        values: logits, descending, shape ``(..., k)``; nats; float32, or float64 for float64 inputs.
        indices: their ids, the smaller first in a tie, shape ``(..., k)``; int64.
        relative_logsumexp: ``log sum_v exp(z_v - max)`` over the whole vocabulary, shape ``(...)``; relative to the
            largest logit, as in :class:`levelhead.LogitStats`.
    """

    values: Tensor
    indices: Tensor
    relative_logsumexp: Tensor

    @property
    def logsumexp(self) -> Tensor:
        """``log sum_v exp z_v`` over the whole vocabulary, shape ``(...)``; nats, in the dtype of ``values``."""
        return self.values[..., 0] + self.relative_logsumexp

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities over the whole vocabulary, shape ``(..., k)``; nats, in the dtype of ``values``."""
        return (self.values - self.values[..., :1]) - self.relative_logsumexp[..., None]


@torch.no_grad()
def linear_topk(
    input: Tensor,
    linear_weight: Tensor,
    k: int,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
) -> TopK:
    """The ``k`` largest logits ``z = softcap * tanh(logit_scale * (input @ linear_weight.T + linear_bias) / softcap)``.

    What a teacher leaves behind for its student. One pass over the vocabulary; the logits stand in a buffer of an
    eighth of the weight, or 31.5 MiB. Not differentiable: take the logits of the ids it finds from
    :func:`linear_logit_stats`.

    Precision: products accumulate in float32 (float64 for float64 inputs) whatever the input.

    Args:
        input: hidden states, shape ``(..., D)``, any strides; float16, bfloat16, float32 or float64.
        linear_weight: the output embedding, shape ``(V, D)``.
        k: how many, in [1, V].
        linear_bias: shape ``(V,)``; -inf masks an entry out.
        softcap: bound of the logits, ``> 0``; None for none; a number or of shape ``()``.
        logit_scale: factor on projection and bias, the inverse of a temperature; a number or of shape ``()``.

    Returns:
        TopK; of equal logits those with the smallest ids. A token whose hidden state is not finite gets NaN.

    Raises:
        TypeError: what is no dense tensor, or no number; a dtype that is not supported, or dtypes that do not go
            together.
        ValueError: shapes or devices that do not go together; an option out of its range; a DTensor.

    References:
        Shum et al. 2024, https://arxiv.org/abs/2408.12168, for what a teacher's five largest are good for.

    Example:
        >>> import torch
        >>> from levelhead.ops import linear_topk
        >>> top = linear_topk(torch.eye(2), torch.tensor([[0.0, 9.0], [7.0, 9.0], [8.0, 1.0]]), k=2)
        >>> top.indices
        tensor([[2, 1],
                [0, 1]])
    """
    checks.check_linear(input, linear_weight, linear_bias)
    checks.check_options(softcap, logit_scale, None, input)
    softcap = None if softcap is None else float(softcap)
    if checks.any_dtensor(input, linear_weight, linear_bias):
        raise ValueError(
            "linear_topk takes no DTensors; give plain tensors, as to_local() or full_tensor() make them"
        )
    if type(k) is not int or not 1 <= k <= len(linear_weight):
        raise ValueError(f"k must be a whole number from 1 to V = {len(linear_weight)}, got {k!r}")
    tokens = input.shape[:-1]
    x = input.reshape(math.prod(tokens), input.shape[-1])
    dtype = statistics_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        top = _chunked(x, linear_weight, k, linear_bias, softcap, float(logit_scale), dtype)
    return TopK(
        top.values.reshape(*tokens, k),
        top.indices.reshape(*tokens, k),
        top.relative_logsumexp.reshape(tokens),
    )


def merge_topk(a: TopK, b: TopK, k: int) -> TopK:
    """Merge the ``k`` largest of two disjoint sets of vocabulary entries into those of their union.

    Associative and commutative, as :func:`levelhead.ops.merge` is.

    Args:
        a: those of the first set, in order, ids as ids of the whole vocabulary.
        b: those of the second set.
        k: how many to keep.

    Returns:
        TopK of min(k, all that there are) entries.
    """
    values, indices = _ordered(
        torch.cat([a.values, b.values], -1), torch.cat([a.indices, b.indices], -1)
    )
    union = TopK(values[..., :k], indices[..., :k], a.relative_logsumexp)
    parts = (part.relative_logsumexp + (_anchor(part) - _anchor(union)) for part in (a, b))
    return union._replace(relative_logsumexp=torch.logaddexp(*parts))


def _anchor(top: TopK) -> Tensor:
    """Return what its logsumexp is relative to; 0 for no entry at all, of which it is -inf."""
    return anchor(top.values[..., :1].sum(-1))


def _chunked(
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    k: int,
    linear_bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
    dtype: torch.dtype,
) -> TopK:
    tokens, entries = _tile_shape(input, linear_weight, dtype, buffers=1)
    buffer = torch.empty(tokens * entries, dtype=dtype, device=input.device)
    parts = []
    for rows in slices(max(len(input), 1), tokens):
        x = input[rows]
        top = _empty(len(x), dtype, x.device)
        for columns, weight, bias in _head_tiles(input, linear_weight, linear_bias, entries):
            t = tile.fill_(_view(buffer, x, weight), x, weight, bias, softcap, logit_scale)
            part = _tile_topk(tile.logits(t, softcap, out=t), k, columns.start)
            top = merge_topk(top, part, k)
        parts.append(top)
    return TopK(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _empty(tokens: int, dtype: torch.dtype, device: torch.device) -> TopK:
    """The k largest of no entry at all, the neutral element of :func:`merge_topk`."""
    none = torch.empty(tokens, 0, dtype=dtype, device=device)
    return TopK(none, none.long(), torch.full((tokens,), -torch.inf, dtype=dtype, device=device))


def _tile_topk(z: Tensor, k: int, first: int) -> TopK:
    """The k largest, or all, of a tile (T, S) that begins with the id ``first``; overwrites it."""
    kept = min(k, z.shape[1])
    # One more than is kept tells where the last one is tied with one that is left out.
    values, indices = z.topk(min(kept + 1, z.shape[1]), dim=1)
    if values.shape[1] > kept:
        tied = values[:, kept - 1] == values[:, kept]
        if tied.any():  # among equals topk takes any, a stable sort the first
            found = z[tied].sort(dim=1, descending=True, stable=True)
            values[tied], indices[tied] = (t[:, : kept + 1] for t in found)
    values, indices = _ordered(values[:, :kept], indices[:, :kept] + first)
    return TopK(values, indices, tile.relative(z, values[:, 0], out=z).exp_().sum(1).log())


def _ordered(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by value, descending, and equals by id, ascending."""
    indices, order = indices.sort(-1)
    values, by_value = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, indices.gather(-1, by_value)
