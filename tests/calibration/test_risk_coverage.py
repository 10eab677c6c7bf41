"""The risk-coverage curve and its area, against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from levelhead.calibration import order, risk_coverage

rows = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0])), st.booleans()),
    min_size=1,
    max_size=40,
)


def columns(rows):
    score, correct = zip(*rows, strict=True)
    return np.array(score), np.array(correct)


@given(rows)
def test_a_row_for_each_threshold(rows):
    score, correct = columns(rows)
    curve = risk_coverage(score, correct)
    assert curve.threshold.tolist() == sorted(set(score.tolist()), reverse=True)
    for threshold, coverage, risk in zip(*(c.tolist() for c in curve[:3]), strict=True):
        answered = score >= threshold
        assert coverage == answered.mean()
        assert risk == 1 - correct[answered].mean() or risk == pytest.approx(
            1 - correct[answered].mean(), abs=1e-15
        )


@given(rows)
def test_area_is_the_mean_risk_over_the_orders_of_ties(rows):
    score, correct = columns(rows)
    # Expectation is linear: an answer among ties is wrong with the share of its ties.
    wrong = np.array([np.mean(~correct[score == s]) for s in np.sort(score)[::-1]])
    expected = np.mean(wrong.cumsum() / np.arange(1, len(wrong) + 1))
    assert risk_coverage(score, correct).area == pytest.approx(expected, abs=1e-12)


def test_area_over_all_orders_of_a_tie():
    rng = np.random.default_rng(0)
    score = np.array([0.9, 0.5, 0.5, 0.5, 0.5, 0.1])
    correct = np.array([1, 1, 0, 1, 0, 0], dtype=bool)
    areas = []
    for _ in range(4000):
        order_ = np.lexsort((rng.random(6), -score))
        wrong = ~correct[order_]
        areas.append(np.mean(wrong.cumsum() / np.arange(1, 7)))
    # Four standard errors of the mean of 4,000.
    assert risk_coverage(score, correct).area == pytest.approx(
        np.mean(areas), abs=4 * np.std(areas) / 4000**0.5
    )


@given(rows, st.randoms(use_true_random=False))
def test_order_does_not_matter(rows, random):
    shuffled = random.sample(rows, len(rows))
    assert risk_coverage(*columns(rows)).area == pytest.approx(
        risk_coverage(*columns(shuffled)).area, abs=1e-12
    )


@pytest.mark.parametrize(("outcome", "risk"), [(True, 0.0), (False, 1.0)])
def test_one_class_only(outcome, risk):
    curve = risk_coverage([0.1, 0.5, 0.5], [outcome] * 3)
    assert curve.risk.tolist() == [risk, risk]
    assert curve.area == pytest.approx(risk)


def test_a_perfect_order():
    n = 10_000
    area = risk_coverage(np.arange(n), np.arange(n) >= n / 2).area
    assert area == pytest.approx(0.5 + 0.5 * np.log(0.5), abs=1e-4)


@pytest.mark.parametrize("piece", [90, 10_000])
def test_thinned_for_drawing(monkeypatch, piece):
    rng = np.random.default_rng(0)
    score, correct = rng.random(1000), rng.random(1000) < 0.7
    whole = risk_coverage(score, correct)
    monkeypatch.setattr(order, "PIECE", piece)
    thin = risk_coverage(score, correct, points=20)
    assert len(thin.coverage) <= 21
    assert thin.area == pytest.approx(whole.area)
    assert (thin.coverage[0], thin.coverage[-1]) == (whole.coverage[0], 1.0)
    assert np.diff(thin.coverage.numpy()).max() <= 2 / 20
    kept = dict(zip(whole.threshold.tolist(), whole.risk.tolist(), strict=True))
    assert [kept[t] for t in thin.threshold.tolist()] == thin.risk.tolist()


def test_points_must_be_some():
    with pytest.raises(ValueError, match="points must be at least 1, got 0"):
        risk_coverage([0.5], [1], points=0)
