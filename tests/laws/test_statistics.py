"""Laws of the statistics of the logits, in float64."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.problems import Problem, assert_equal, problems
from torch import Tensor

from levelhead import LogitStats, linear_logit_stats
from levelhead.ops.statistics import empty_set, merge


def _picks(problem: Problem, k: int) -> Tensor:
    """Ids inside and outside the vocabulary, with repeats."""
    n, v = len(problem.target), len(problem.linear_weight)
    return (torch.arange(n * k).view(n, k) * 7) % (v + 3) - 1


def _dense(problem: Problem, picks: Tensor) -> LogitStats:
    z = problem.logits()
    p = z.softmax(1)
    inside = (picks >= 0) & (picks < z.shape[1])
    picked = torch.where(inside, z.gather(1, picks.clamp(0, z.shape[1] - 1)), 0)
    largest, argmax = z.detach().max(1)
    r = z - largest[:, None]
    return LogitStats(r.logsumexp(1), picked, r.mean(1), (p * r).sum(1), largest, argmax)


def _fused(problem: Problem, picks: Tensor, **changes: Any) -> LogitStats:
    names = ("input", "linear_weight", "linear_bias", "softcap", "logit_scale", "impl")
    options = {name: getattr(problem, name) for name in names} | changes
    return linear_logit_stats(picks=picks, **options)


@given(problems(), st.integers(0, 5))
def test_every_field_equals_the_dense_one(problem: Problem, k: int) -> None:
    picks = _picks(problem, k)
    assert_equal(tuple(_fused(problem, picks)), tuple(_dense(problem, picks)))


@given(problems(), st.integers(1, 5), st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_any_upstream_gradient_of_the_four(problem: Problem, k: int, upstream: list[float]) -> None:
    picks = _picks(problem, k)

    def combined(stats: LogitStats) -> Tensor:
        tokens = torch.linspace(-1, 2, len(problem.target), dtype=torch.float64)
        fields = (stats.logsumexp, stats.picked.sum(1), stats.mean, stats.expected)
        return sum((u * (tokens * f).sum() for u, f in zip(upstream, fields, strict=True)))

    actual = torch.autograd.grad(combined(_fused(problem, picks)), problem.parameters)
    expected = torch.autograd.grad(combined(_dense(problem, picks)), problem.parameters)
    assert_equal(actual, expected)


@given(problems(), st.sampled_from(["logsumexp", "picked", "mean", "expected"]))
def test_one_field_alone_is_differentiable(problem: Problem, field: str) -> None:
    picks = _picks(problem, 2)
    actual, expected = (
        torch.autograd.grad(getattr(stats, field).sum(), problem.parameters, allow_unused=True)
        for stats in (_fused(problem, picks), _dense(problem, picks))
    )
    zero = [torch.zeros_like(p) for p in problem.parameters]
    fill = [
        [z if g is None else g for g, z in zip(gs, zero, strict=True)] for gs in (actual, expected)
    ]
    assert_equal(*fill)


@given(problems())
def test_entropy_from_the_statistics_is_the_entropy(problem: Problem) -> None:
    stats = _fused(problem, _picks(problem, 1))
    entropy = torch.distributions.Categorical(logits=problem.logits()).entropy()
    assert_equal(stats.logsumexp - stats.expected, entropy)


@given(problems())
def test_confidence_from_the_statistics_is_the_largest_probability(problem: Problem) -> None:
    stats = _fused(problem, _picks(problem, 1))
    assert_equal((stats.max - stats.logsumexp).exp(), problem.logits().softmax(1).amax(1))


@given(problems(), st.data())
def test_an_entry_masked_out_by_its_bias_contributes_nothing(
    problem: Problem, data: st.DataObject
) -> None:
    v = len(problem.linear_weight)
    if v == 1 or problem.softcap is not None:
        return
    out = data.draw(st.integers(0, v - 1))
    others = [i for i in range(v) if i != out]
    bias = torch.zeros(v, dtype=torch.float64)
    bias[out] = -torch.inf
    none = torch.zeros(len(problem.target), 0, dtype=torch.int64)
    masked = _fused(problem, none, linear_bias=bias)
    absent = _fused(problem, none, linear_weight=problem.linear_weight[others], linear_bias=None)
    assert_equal(masked.logsumexp, absent.logsumexp)
    assert_equal(masked.expected, absent.expected)
    gradient, expected = (
        torch.autograd.grad((s.logsumexp - s.expected).sum(), problem.input)
        for s in (masked, absent)
    )
    assert_equal(gradient, expected)


def test_a_part_of_the_vocabulary_that_is_all_masked_out_is_the_empty_set() -> None:
    """A rank may hold nothing but padding; NaN in its statistics would spread to the others."""
    x, weight, masked = (
        torch.ones(2, 3).double(),
        torch.ones(5, 3).double(),
        torch.full((5,), -torch.inf),
    )
    ids = torch.zeros(2, 0, dtype=torch.int64)
    part = linear_logit_stats(x, weight, ids, linear_bias=masked.double())
    assert_equal(part.logsumexp, torch.full((2,), -torch.inf).double())
    whole = linear_logit_stats(x, weight, ids)
    assert_equal(merge(whole, 5, part, 5).expected, whole.expected)
    assert_equal(merge(whole, 5, part, 5).logsumexp, whole.logsumexp)


def _part(z: Tensor, picks: Tensor, first: int, last: int) -> tuple[LogitStats, int]:
    """The statistics of the entries first..last of dense logits, with ids of the whole vocabulary."""
    size = last - first
    if size == 0:
        return empty_set(picks, z.dtype), 0
    weight = z[:, first:last].T.contiguous()
    stats = linear_logit_stats(torch.eye(len(z)).double(), weight, picks - first, impl="reference")
    return stats._replace(argmax=stats.argmax + first), size


def _merged(a: tuple[LogitStats, int], b: tuple[LogitStats, int]) -> tuple[LogitStats, int]:
    return merge(a[0], a[1], b[0], b[1]), a[1] + b[1]


@given(problems(), st.data())
def test_merging_is_associative_and_commutative_and_equals_the_whole(
    problem: Problem, data: st.DataObject
) -> None:
    z, picks = problem.logits().detach(), _picks(problem, 3)
    v = z.shape[1]
    first, second = sorted((data.draw(st.integers(0, v)), data.draw(st.integers(0, v))))
    bounds = [(0, first), (first, second), (second, v)]
    a, b, c = (_part(z, picks, *pair) for pair in bounds)
    left, right = _merged(_merged(a, b), c), _merged(a, _merged(b, c))
    swapped = _merged(c, _merged(b, a))
    whole = _part(z, picks, 0, v)
    for other in (right, swapped, whole):
        assert_equal(tuple(left[0]), tuple(other[0]))
        assert left[1] == other[1]


@given(problems())
def test_the_empty_set_is_neutral(problem: Problem) -> None:
    z, picks = problem.logits().detach(), _picks(problem, 2)
    whole, nothing = _part(z, picks, 0, z.shape[1]), _part(z, picks, 0, 0)
    for merged in (_merged(whole, nothing), _merged(nothing, whole)):
        assert_equal(tuple(merged[0]), tuple(whole[0]))
    both, size = _merged(nothing, nothing)
    assert_equal(tuple(both), tuple(nothing[0]))
    assert size == 0


def test_the_smallest_id_wins_a_tie_whatever_the_order() -> None:
    z, picks = torch.ones(1, 6).double(), torch.zeros(1, 1).long()
    a, b = _part(z, picks, 0, 3), _part(z, picks, 3, 6)
    assert _merged(a, b)[0].argmax == _merged(b, a)[0].argmax == 0
