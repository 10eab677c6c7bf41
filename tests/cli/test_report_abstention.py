"""What withholding earns in a report: the public function, at many thresholds in one pass."""

import math

import pytest
import torch

from levelhead import calibration
from levelhead.cli.report import abstention


@pytest.mark.parametrize("rows_at_a_time", [1 << 18, 7])
def test_it_is_the_payoff_at_every_threshold(monkeypatch, rows_at_a_time):
    monkeypatch.setattr(abstention, "_ROWS", rows_at_a_time)
    score = torch.rand(500, dtype=torch.float64).mul(20).round() / 20  # with ties at thresholds
    correct = torch.rand(500) < score
    thresholds = [-math.inf, 0.5, 0.5, 0.3, math.inf, 1.0, 0.0, 0.301]
    for wrong in (1.0, 2.5):
        expected = [
            calibration.abstention(score, correct, threshold=threshold, wrong=wrong)
            for threshold in thresholds
        ]
        assert abstention._payoffs(score, correct, thresholds, wrong) == expected
