"""Trustworthy maximisation: both ways keep order and say what they chose by."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from levelhead.calibration import calibration_error
from levelhead.objectives import recalibrate
from levelhead.objectives.recalibration import scale_probabilities, smooth_probabilities


@st.composite
def top_k(draw: st.DrawFn) -> Tensor:
    """Log-probabilities (N, k), descending, that leave some mass to the rest of a vocabulary."""
    n, k = draw(st.integers(1, 6)), draw(st.integers(2, 6))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sharpness = draw(st.sampled_from([0.0, 1.0, 10.0]))
    z = sharpness * torch.randn(n, k + 3, generator=random, dtype=torch.float64)
    return z.log_softmax(1).topk(k).values


@pytest.mark.parametrize(
    ("temperature", "largest"),
    [(1.0, 0.375), (0.5, 0.591), (0.3, 0.823), (0.2, 0.952), (0.1, 0.999)],
)
def test_temperature_of_the_probabilities_by_hand(temperature: float, largest: float) -> None:
    log_probs = torch.tensor([0.90, 0.05, 0.02, 0.01, 0.01], dtype=torch.float64).log()
    got = scale_probabilities(log_probs, temperature).exp()
    assert got[0].item() == pytest.approx(largest, abs=5e-4)
    assert got.sum().item() == pytest.approx(1)


@given(top_k(), st.floats(0.02, 5))
def test_temperature_keeps_the_order(log_probs: Tensor, temperature: float) -> None:
    got = scale_probabilities(log_probs, temperature)
    assert (got.diff(dim=1) <= 1e-12).all()
    torch.testing.assert_close(got.exp().sum(1), torch.ones(len(got)).double())


@given(top_k(), st.floats(0, 1))
def test_smoothing_keeps_sum_and_largest(log_probs: Tensor, smoothing: float) -> None:
    before, after = log_probs.exp(), smooth_probabilities(log_probs, smoothing).exp()
    torch.testing.assert_close(after.sum(1), before.sum(1))
    assert (after[:, :1] >= after[:, 1:] - 1e-12).all()
    moved = before[:, 0] - after[:, 0]
    assert ((moved >= 0) & (moved <= smoothing + 1e-12)).all()
    k = before.shape[1]
    torch.testing.assert_close(after[:, 1:], before[:, 1:] + moved[:, None] / (k - 1))


@pytest.mark.parametrize("method", ["temperature", "smoothing"])
def test_the_value_has_the_least_error_of_all_that_were_tried(method: Any) -> None:
    """An over-confident teacher: 0.97 of probability, right in 7 of 10."""
    probability = torch.tensor([0.97, 0.01, 0.01, 0.005, 0.005]).expand(200, 5)
    correct = torch.arange(200) % 10 < 7
    found = recalibrate(probability.log(), correct, method=method)
    assert found.ece_before == pytest.approx(0.27, abs=1e-6)
    assert found.ece_after == min(error for _, error in found.curve) < 0.05
    assert found.ece_after == dict(found.curve)[found.value]
    assert found.accuracy == pytest.approx(0.7)
    confidence = found(probability.log())[:, 0].exp()
    assert calibration_error(confidence, correct) == pytest.approx(found.ece_after, abs=1e-6)
    values = [value for value, _ in found.curve]
    assert values == sorted(set(values))
    assert {round(50 * value) for value in values} >= {5 * i for i in range(1, 10)}
    assert found.value in values


def test_values_lie_within_the_range_of_the_method() -> None:
    """A teacher that is always right, and one that never is, lead to the ends of the grids."""
    probability = torch.tensor([0.6, 0.3]).expand(50, 2)
    for method, ends in (("temperature", (0.02, 1.0)), ("smoothing", (0.0, 1.0))):
        for right in (True, False):
            found = recalibrate(probability.log(), [right] * 50, method=method)
            assert ends[0] <= found.value <= ends[1]


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((torch.zeros(3, 1), [1, 0, 1]), {}, r"shape \(N, k\) with k >= 2, got \(3, 1\)"),
        ((torch.zeros(0, 2), []), {}, "no predictions"),
        ((torch.zeros(3, 2), [1, 0, 1]), {"method": "platt"}, "unknown method 'platt'"),
    ],
)
def test_refusals(arguments: Any, options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        recalibrate(*arguments, **options)


def test_parameters_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be a number above 0, got 0"):
        scale_probabilities(torch.zeros(2), 0)
    with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\], got 2"):
        smooth_probabilities(torch.zeros(2), 2)


def test_worked_by_hand():
    probability = torch.tensor([0.90, 0.05, 0.02, 0.01, 0.01])
    assert scale_probabilities(probability.log(), 0.3).exp()[0].item() == pytest.approx(
        0.823, abs=5e-4
    )
    moved = smooth_probabilities(torch.tensor([0.90, 0.06, 0.04]).log(), 0.1).exp()
    torch.testing.assert_close(moved, torch.tensor([0.80, 0.11, 0.09]))
