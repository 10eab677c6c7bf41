"""AUROC and Mann-Whitney's p against scikit-learn and scipy; what degenerate groups answer."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score

from levelhead.calibration import auroc, mann_whitney_p, ranking

tied = st.sampled_from([0.0, 0.25, 0.5, 1.0])
rows = st.lists(
    st.tuples(st.one_of(st.floats(-1e3, 1e3), tied), st.booleans()), min_size=2, max_size=60
).filter(lambda rows: len({correct for _, correct in rows}) == 2)


def columns(rows):
    score, correct = zip(*rows, strict=True)
    return np.array(score), np.array(correct)


@given(rows)
def test_auroc_equals_scikit_learn(rows):
    score, correct = columns(rows)
    assert auroc(score, correct) == pytest.approx(roc_auc_score(correct, score), abs=1e-12)


@given(rows)
def test_p_equals_scipy(rows):
    score, correct = columns(rows)
    expected = mannwhitneyu(score[correct], score[~correct]).pvalue
    assert mann_whitney_p(score, correct) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("right", "wrong"), [(1, 1), (1, 500), (8, 8), (8, 300), (9, 9), (50, 3)])
@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0])
def test_p_equals_scipy_without_ties(right, wrong, shift):
    rng = np.random.default_rng(right + wrong)
    score = np.concatenate([rng.random(right) + shift, rng.random(wrong)])
    correct = np.arange(right + wrong) < right
    expected = mannwhitneyu(score[correct], score[~correct]).pvalue
    assert mann_whitney_p(score, correct) == pytest.approx(expected, rel=1e-9)


def test_a_p_value_far_below_the_smallest_float32():
    correct = np.arange(4000) < 2000
    score = np.where(correct, 1.0, 0.0)
    expected = mannwhitneyu(score[correct], score[~correct]).pvalue
    assert expected == 0.0 == mann_whitney_p(score, correct)
    score = np.arange(1000.0)
    expected = mannwhitneyu(score[500:], score[:500]).pvalue
    assert 0 < expected < 1e-150
    assert mann_whitney_p(score, score >= 500) == pytest.approx(expected, rel=1e-9)


def test_more_than_a_million_pairs_are_approximated():
    score = np.arange(400_000.0)
    correct = np.zeros(400_000, dtype=bool)
    correct[[5, 100_000, 250_000]] = True
    expected = mannwhitneyu(score[correct], score[~correct], method="asymptotic").pvalue
    assert mann_whitney_p(score, correct) == pytest.approx(expected, rel=1e-9)


@given(rows)
def test_monotone_transforms_change_nothing(rows):
    score, correct = columns(rows)
    # By ranks: exp and the like would round distinct scores together.
    ranks = np.unique(score, return_inverse=True)[1]
    for transformed in (ranks, ranks**3 - 7.0, np.exp(ranks / 10)):
        assert auroc(transformed, correct) == auroc(score, correct)
        assert mann_whitney_p(transformed, correct) == mann_whitney_p(score, correct)


@given(rows)
def test_turning_scores_or_outcomes_round(rows):
    score, correct = columns(rows)
    assert auroc(-score, correct) == pytest.approx(1 - auroc(score, correct), abs=1e-12)
    assert auroc(score, ~correct) == pytest.approx(1 - auroc(score, correct), abs=1e-12)
    assert mann_whitney_p(-score, ~correct) == pytest.approx(mann_whitney_p(score, correct))


@given(rows, st.randoms(use_true_random=False))
def test_order_does_not_matter(rows, random):
    shuffled = random.sample(rows, len(rows))
    assert auroc(*columns(rows)) == auroc(*columns(shuffled))
    assert mann_whitney_p(*columns(rows)) == mann_whitney_p(*columns(shuffled))


def test_perfect_and_constant_scores():
    assert auroc([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0]) == 1.0
    assert auroc([0.1, 0.2, 0.8, 0.9], [1, 1, 0, 0]) == 0.0
    assert auroc([0.5] * 4, [1, 1, 0, 0]) == 0.5
    assert mann_whitney_p([0.5] * 4, [1, 1, 0, 0]) == 1.0


@pytest.mark.parametrize("outcome", [True, False])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_one_class_only_has_no_pair(outcome, count):
    score, correct = np.arange(count) / count, [outcome] * count
    assert math.isnan(auroc(score, correct))
    assert math.isnan(mann_whitney_p(score, correct))


def test_infinite_scores_rank_as_they_should():
    assert auroc([math.inf, 0.0, -math.inf], [1, 1, 0]) == 1.0


def test_share_of_orders_counts_orders():
    # Of the 10 orders of 2 among 5: U = 0, 1, 2, 3, ... come 1, 1, 2, 2, 2, 1, 1 times.
    shares = [ranking._share_of_orders(u, 2, 3) for u in range(7)]
    assert shares == pytest.approx([0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0])
