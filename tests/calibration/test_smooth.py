"""Smooth ECE, against its definition summed directly over a grid."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from levelhead.calibration import predictions, smooth_calibration_error

data = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0])), st.booleans()),
    min_size=1,
    max_size=30,
)


def smoothed_error(confidence, correct, bandwidth, points=8001):
    """smECE_s: the kernel of every prediction and of its mirror images, added up on a grid."""
    grid = np.linspace(0, 1, points)
    total = np.zeros(points)
    for c, y in zip(confidence, correct, strict=True):
        for image in range(-4, 5):
            total += (y - c) * norm_pdf(grid, 2 * image + c, bandwidth)
            total += (y - c) * norm_pdf(grid, 2 * image - c, bandwidth)
    return np.trapezoid(np.abs(total / len(confidence)), grid)


def norm_pdf(x, mean, deviation):
    return np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))


@given(data)
def test_it_is_the_bandwidth_that_equals_its_error(rows):
    confidence, correct = zip(*rows, strict=True)
    got = smooth_calibration_error(confidence, correct)
    if got > 0.005:  # or the oracle's own grid is too coarse
        # h^2 / s, for the step h of our grid and a bandwidth of 0.005 or more.
        assert got == pytest.approx(smoothed_error(confidence, correct, got), abs=8e-7)


@given(data, st.randoms(use_true_random=False))
def test_order_does_not_matter(rows, random):
    shuffled = random.sample(rows, len(rows))
    first, second = (smooth_calibration_error(*zip(*r, strict=True)) for r in (rows, shuffled))
    assert first == pytest.approx(second, abs=1e-9)


@given(data)
def test_at_least_the_overall_gap_and_at_most_the_mean_residual(rows):
    confidence, correct = map(np.array, zip(*rows, strict=True))
    got = smooth_calibration_error(confidence, correct)
    assert abs(np.mean(confidence - correct)) <= got + 1e-6
    assert got <= np.mean(np.abs(confidence - correct)) + 1e-6


@pytest.mark.parametrize("gap", [0.4, 0.05, 1e-3])
def test_one_confidence_has_its_gap(gap):
    confidence = np.full(1000, 0.5 + gap)
    assert smooth_calibration_error(confidence, np.arange(1000) % 2) == pytest.approx(gap, abs=1e-9)


def test_certainty():
    assert smooth_calibration_error([1.0, 0.0], [True, False]) == 0.0
    assert smooth_calibration_error([1.0, 1.0], [False, False]) == pytest.approx(1.0)


def test_it_does_not_jump_where_bins_do():
    correct = np.arange(100) < 60
    below, above = (np.where(correct, 0.5, 0.5 + shift) for shift in (-1e-6, 1e-6))
    change = smooth_calibration_error(below, correct) - smooth_calibration_error(above, correct)
    assert abs(change) < 1e-5


def test_many_calibrated_predictions_have_little_error():
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000)
    assert smooth_calibration_error(confidence, rng.random(200_000) < confidence) < 0.01


def test_long_columns_are_taken_in_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(1000), rng.random(1000) < 0.5
    whole = smooth_calibration_error(confidence, correct)
    monkeypatch.setattr(predictions, "CHUNK", 64)
    assert smooth_calibration_error(confidence, correct) == pytest.approx(whole, abs=1e-9)
