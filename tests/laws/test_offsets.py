"""Logits far from 0 lose nothing: an offset that the logits themselves hold exactly changes no bit, in float32.

Hidden states, weights and biases are small multiples of 1/8, so that every logit is a multiple of 1/64 and, with an
offset of up to 2^15 in steps of 1, exact whatever the order of its sum. What is made of differences of logits is then
the same to the last bit; a statistic rounded at the size of the offset would be off by up to 2^-9.
"""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.problems import IMPLEMENTATIONS, Problem, gradients
from torch import Tensor

from levelhead import LogitStats, linear_logit_stats
from levelhead.ops import linear_topk
from levelhead.ops.statistics import merge

offsets = st.integers(-(2**15), 2**15)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    n, d, v = draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 23))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    most = draw(st.sampled_from([1, 6, 24]))  # eighths: from nearly uniform to nearly one-hot

    def eighths(*shape: int) -> Tensor:
        return (torch.randint(-most, most + 1, shape, generator=random) / 8).requires_grad_()

    return Problem(
        eighths(n, d), eighths(v, d), torch.randint(0, v, (n,), generator=random),
        linear_bias=eighths(v),
        token_weight=torch.rand(n, generator=random) + 0.1 if draw(st.booleans()) else None,
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.5])),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
        impl=draw(st.sampled_from(IMPLEMENTATIONS)),
    )  # fmt: skip


def _far(problem: Problem, offset: int) -> Problem:
    bias = problem.linear_bias.detach() + offset / problem.logit_scale
    return replace(problem, linear_bias=bias.requires_grad_())


def _stats(problem: Problem, rows: slice = slice(None)) -> LogitStats:
    picks = torch.arange(2 * len(problem.input)).view(-1, 2) % len(problem.linear_weight)
    stats = linear_logit_stats(
        problem.input, problem.linear_weight[rows], picks - (rows.start or 0),
        linear_bias=problem.linear_bias[rows], logit_scale=problem.logit_scale, impl=problem.impl,
    )  # fmt: skip
    return stats._replace(argmax=stats.argmax + (rows.start or 0))


def _of_differences(stats: LogitStats) -> dict[str, Tensor]:
    return {
        "log_probs": stats.log_probs,
        "entropy": stats.entropy,
        "confidence": stats.confidence,
        "smoothing": stats.relative_mean - stats.relative_logsumexp,
    }


def _same_bits(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@given(problems(), offsets)
def test_losses_and_gradients_are_the_same_bits(problem: Problem, offset: int) -> None:
    far = _far(problem, offset)
    actual, expected = far.fused(), problem.fused()
    _same_bits(actual, expected)
    _same_bits(gradients(actual, far), gradients(expected, problem))
    # The first backward spends the gradients that the forward has stored, this one recomputes them.
    _same_bits(gradients(actual, far), gradients(expected, problem))


@given(problems(), offsets)
def test_what_statistics_are_used_for_is_the_same_bits_and_its_gradient(
    problem: Problem, offset: int
) -> None:
    far = _far(problem, offset)
    actual, expected = _of_differences(_stats(far)), _of_differences(_stats(problem))
    _same_bits(actual, expected)
    assert not expected.pop("confidence").requires_grad  # its largest logit has no gradient
    for name in expected:
        _same_bits(gradients(actual[name], far), gradients(expected[name], problem))


@given(problems(), offsets, st.data())
def test_merged_parts_are_the_same_bits(problem: Problem, offset: int, data: st.DataObject) -> None:
    v = len(problem.linear_weight)
    if v == 1:
        return
    cut = data.draw(st.integers(1, v - 1))
    near, far = (
        merge(_stats(p, slice(0, cut)), cut, _stats(p, slice(cut, v)), v - cut)
        for p in (problem, _far(problem, offset))
    )
    _same_bits(_of_differences(far), _of_differences(near))
    _same_bits(far.max - offset, near.max)


@given(problems(), offsets)
def test_probabilities_of_the_largest_logits_are_the_same_bits(
    problem: Problem, offset: int
) -> None:
    near, far = (
        linear_topk(p.input, p.linear_weight, 1, linear_bias=p.linear_bias, logit_scale=p.logit_scale)
        for p in (problem, _far(problem, offset))
    )  # fmt: skip
    _same_bits(far.log_probs, near.log_probs)


@given(problems(), offsets)
def test_a_probability_is_at_most_one_and_an_entropy_at_least_zero(
    problem: Problem, offset: int
) -> None:
    stats = _stats(_far(problem, offset))
    assert (stats.confidence <= 1).all()
    assert (stats.entropy >= 0).all()
    assert (stats.log_probs <= 0).all()
