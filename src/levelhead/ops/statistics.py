"""The statistics of the logits, and the one rule by which two sets of vocabulary entries merge."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Of input, linear_weight and linear_bias: the dtype to round to (None: not needed), and the gradient.
GradientDtypes = tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics, losses and accumulators for an input's dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LogitStats(NamedTuple):
    """Per-token statistics of the logits ``z`` (tokens x vocabulary), in nats.

    Any loss, distillation target or calibration metric that needs only these never needs the logits.
    With ``p = softmax(z)`` and ``V`` vocabulary entries:

    Attributes:
        logsumexp: ``log sum_v exp z_v``, the normaliser. Shape ``(...)``.
        picked: ``z`` at the given ids; 0 where an id lies outside the vocabulary. Shape of ``picks``.
        mean: ``(1/V) sum_v z_v``, what label smoothing needs. Shape ``(...)``.
        expected: ``sum_v p_v z_v``; the entropy is ``logsumexp - expected``. Shape ``(...)``.
        max: the largest logit; the maximum softmax probability is ``exp(max - logsumexp)``. Shape ``(...)``.
        argmax: the id of the largest logit, the smallest such id in a tie; int64. Shape ``(...)``.

    ``max`` and ``argmax`` are not differentiable. The rest are float32, or float64 for float64 logits.
    """

    logsumexp: Tensor
    picked: Tensor
    mean: Tensor
    expected: Tensor
    max: Tensor
    argmax: Tensor


# What torch.export saves it as: a NamedTuple has no name of its own there.
pytree._register_namedtuple(LogitStats, serialized_type_name="levelhead.LogitStats")


class StatsGradient(NamedTuple):
    """Upstream gradients of the differentiable fields of :class:`LogitStats`; None is zero."""

    logsumexp: Tensor | None
    picked: Tensor | None
    mean: Tensor | None
    expected: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "StatsGradient":
        """Apply a function to every gradient there is."""
        return StatsGradient(*(None if field is None else function(field) for field in self))


def empty_set(picks: Tensor, dtype: torch.dtype) -> LogitStats:
    """Return the statistics of no vocabulary entry at all, the neutral element of :func:`merge`.

    Args:
        picks: ids, shape ``(N, K)``.
        dtype: floating dtype of the statistics.
    """
    nothing = torch.full(picks.shape[:1], -torch.inf, dtype=dtype, device=picks.device)  # (N,)
    zero = torch.zeros_like(nothing)
    # The largest id there is, so that any real entry wins a tie at -inf.
    no_id = torch.full_like(nothing, torch.iinfo(torch.int64).max, dtype=torch.int64)
    picked = torch.zeros(picks.shape, dtype=dtype, device=picks.device)
    return LogitStats(nothing, picked, zero, zero, nothing, no_id)


def merge(a: LogitStats, a_size: int, b: LogitStats, b_size: int) -> LogitStats:
    """Merge the statistics of two disjoint sets of vocabulary entries into those of their union.

    Associative and commutative: a tile, a chunk and a tensor-parallel rank are the same thing to it.
    Ids in ``argmax`` must be ids of the whole vocabulary; each part holds 0 in ``picked`` for ids
    that are not its own.

    Args:
        a: statistics of the first set.
        a_size: its number of vocabulary entries.
        b: statistics of the second set.
        b_size: its number of vocabulary entries.

    Returns:
        LogitStats of both sets, shapes and dtypes as those of ``a``; differentiable as they are.
    """
    logsumexp = torch.logaddexp(a.logsumexp, b.logsumexp)
    a_share = a_size / max(a_size + b_size, 1)
    b_share = b_size / max(a_size + b_size, 1)
    b_wins = (b.max > a.max) | ((b.max == a.max) & (b.argmax < a.argmax))
    return LogitStats(
        logsumexp=logsumexp,
        picked=a.picked + b.picked,
        mean=a.mean * a_share + b.mean * b_share,
        expected=_mass(a, logsumexp) * a.expected + _mass(b, logsumexp) * b.expected,
        max=torch.maximum(a.max, b.max),
        argmax=torch.where(b_wins, b.argmax, a.argmax),
    )


def _mass(part: LogitStats, logsumexp: Tensor) -> Tensor:
    """Return the probability of a part in the union; 0, not NaN, for an empty part of an empty union."""
    share = (part.logsumexp - logsumexp).exp()
    return torch.where(part.logsumexp == -torch.inf, torch.zeros_like(share), share)
