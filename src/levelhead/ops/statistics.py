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
    Three are relative to the largest logit. A loss, a log-probability or an entropy is made of differences, which
    then keep their digits however far from 0 the logits are: take them from the properties, not from ``logsumexp``,
    ``mean`` and ``expected``, which are rounded as the logits themselves are. With ``p = softmax(z)`` and ``V``
    vocabulary entries:

    Attributes:
        relative_logsumexp: ``log sum_v exp(z_v - max)``, in [0, log V]. Shape ``(...)``.
        picked: ``z`` at the given ids; 0 where an id lies outside the vocabulary. Shape of ``picks``.
        relative_mean: ``(1/V) sum_v (z_v - max)``, what label smoothing needs. Shape ``(...)``.
        relative_expected: ``sum_v p_v (z_v - max)``. Shape ``(...)``.
        max: the largest logit. Shape ``(...)``.
        argmax: the id of the largest logit, the smallest such id in a tie; int64. Shape ``(...)``.

    ``max`` and ``argmax`` are not differentiable: to a gradient ``max`` is a constant, and a relative statistic has
    the gradient of the absolute one. All but ``argmax`` are float32, or float64 for float64 logits.
    """

    relative_logsumexp: Tensor
    picked: Tensor
    relative_mean: Tensor
    relative_expected: Tensor
    max: Tensor
    argmax: Tensor

    @property
    def logsumexp(self) -> Tensor:
        """``log sum_v exp z_v``, the normaliser, shape ``(...)``; nats, float32 or float64."""
        return self.max + self.relative_logsumexp

    @property
    def mean(self) -> Tensor:
        """``(1/V) sum_v z_v``, shape ``(...)``; nats, float32 or float64."""
        return self.max + self.relative_mean

    @property
    def expected(self) -> Tensor:
        """``sum_v p_v z_v``, shape ``(...)``; nats, float32 or float64."""
        return self.max + self.relative_expected

    @property
    def log_probs(self) -> Tensor:
        """``log p`` at the given ids, shape of ``picks``; nats, float32 or float64.

        Meaningless where an id lies outside the vocabulary.
        """
        largest, logsumexp = self.max, self.relative_logsumexp
        if self.picked.dim() > largest.dim():
            largest, logsumexp = largest[..., None], logsumexp[..., None]
        return (self.picked - largest) - logsumexp

    @property
    def entropy(self) -> Tensor:
        """``-sum_v p_v log p_v``, at least 0, shape ``(...)``; nats, float32 or float64.

        NaN, as in torch, where all logits are -inf: there are no probabilities.
        """
        return _nan_without_mass(self.relative_logsumexp) - self.relative_expected

    @property
    def confidence(self) -> Tensor:
        """``max_v p_v``, the largest probability, at most 1, shape ``(...)``; float32 or float64.

        NaN, as in torch, where all logits are -inf. It has no gradient, because ``max`` has none: pick ``argmax`` and
        take ``log_probs`` for one.
        """
        return (-_nan_without_mass(self.relative_logsumexp.detach())).exp()


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
    if not a_size or not b_size:  # nothing has no largest logit to be relative to
        return a if a_size else b
    b_wins = (b.max > a.max) | ((b.max == a.max) & (b.argmax < a.argmax))
    largest = torch.maximum(a.max, b.max)
    a, b = _relative_to(largest, a), _relative_to(largest, b)
    logsumexp = torch.logaddexp(a.relative_logsumexp, b.relative_logsumexp)
    a_share, b_share = a_size / (a_size + b_size), b_size / (a_size + b_size)
    return LogitStats(
        relative_logsumexp=logsumexp,
        picked=a.picked + b.picked,
        relative_mean=a.relative_mean * a_share + b.relative_mean * b_share,
        relative_expected=(
            _mass(a, logsumexp) * a.relative_expected + _mass(b, logsumexp) * b.relative_expected
        ),
        max=largest,
        argmax=torch.where(b_wins, b.argmax, a.argmax),
    )


def anchor(largest: Tensor) -> Tensor:
    """Return what logits are relative to: the largest, or 0 where all are -inf, masked out, as -inf - -inf is NaN."""
    return largest.masked_fill(largest == -torch.inf, 0)


def _nan_without_mass(relative_logsumexp: Tensor) -> Tensor:
    """Return the statistic, NaN where it is -inf: all logits are."""
    return relative_logsumexp.masked_fill(relative_logsumexp == -torch.inf, torch.nan)


def _relative_to(largest: Tensor, part: LogitStats) -> LogitStats:
    """Return the statistics of a part relative to the largest logit of the union."""
    offset = anchor(part.max) - anchor(largest)
    return part._replace(
        relative_logsumexp=part.relative_logsumexp + offset,
        relative_mean=part.relative_mean + offset,
        relative_expected=part.relative_expected + offset,
    )


def _mass(part: LogitStats, logsumexp: Tensor) -> Tensor:
    """Return the probability of a part in the union; 0, not NaN, where the entries of both are masked out."""
    masked_out = part.relative_logsumexp == -torch.inf
    return (part.relative_logsumexp - logsumexp).exp().masked_fill(masked_out, 0)
