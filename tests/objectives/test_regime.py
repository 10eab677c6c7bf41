"""Calibratable or not: what accuracy and mean confidence say, and what they cannot."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from levelhead.objectives.regime import calibration_regime

ROWS = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=200)


@given(ROWS, st.integers(1, 20))
def test_the_errors_are_in_their_order(rows: list[tuple[float, bool]], bins: int) -> None:
    confidence, correct = zip(*rows, strict=True)
    found = calibration_regime(confidence, correct, bins=bins)
    assert found.least_ece <= found.ece + 1e-12
    assert found.ece <= found.rms + 1e-12
    assert found.rms <= found.mce + 1e-12
    assert found.accuracy == pytest.approx(sum(correct) / len(correct))
    assert found.confidence == pytest.approx(sum(confidence) / len(confidence))


@given(st.integers(1, 300), st.data())
def test_the_interval_is_wilsons(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    found = calibration_regime([0.5] * n, [True] * right + [False] * (n - right))
    want = binomtest(right, n).proportion_ci(method="wilson")
    assert (found.accuracy_low, found.accuracy_high) == pytest.approx(
        (want.low, want.high), abs=1e-9
    )


@pytest.mark.parametrize(
    ("critical", "regime", "method", "text"),
    [
        (0.9, "calibratable", "cft", "the paper uses CFT"),
        (0.3, "non-calibratable", "rcft", "the paper uses RCFT"),
        (0.61, "undetermined", "cft", "lies within the interval"),
        (None, "undetermined", "cft", "which no data with one label a question shows"),
    ],
)
def test_the_regime_is_told_from_the_whole_interval(critical, regime, method, text) -> None:
    found = calibration_regime([0.9] * 100, [1] * 60 + [0] * 40, critical_accuracy=critical)
    assert (found.regime, found.method) == (regime, method)
    assert text in found.verdict
    assert "over-confident by 0.300" in found.numbers


def test_no_model_is_more_accurate_than_the_truth_on_new_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = (2 * torch.randn(20000, 4, generator=generator)).softmax(-1)
    label = torch.multinomial(truth, 1, generator=generator)[:, 0]
    best, answer = truth.max(-1)
    found = calibration_regime(best, answer == label, critical_accuracy=best.mean().item())
    assert found.regime == "undetermined"  # at a* itself
    assert found.ece < 0.02


@pytest.mark.parametrize("critical", [-0.1, 1.1, float("nan")])
def test_a_critical_accuracy_out_of_range_is_refused(critical: float) -> None:
    with pytest.raises(ValueError, match="critical_accuracy must lie in"):
        calibration_regime([0.5], [True], critical_accuracy=critical)


def test_nothing_has_no_regime() -> None:
    with pytest.raises(ValueError, match="no predictions"):
        calibration_regime([], [])
