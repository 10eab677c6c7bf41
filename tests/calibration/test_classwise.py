"""The classwise error is the mean of the classes' own errors."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from levelhead.calibration import calibration_error, classwise_calibration_error


@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.sampled_from(["uniform", "quantile"]),
    st.sampled_from(["l1", "l2", "max"]),
)
def test_mean_of_the_errors_of_each_class(seed, classes, binning, norm):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet([1.0] * classes, size=30)
    target = rng.integers(classes, size=30)
    errors = [
        calibration_error(probabilities[:, c].copy(), target == c, binning=binning, norm=norm)
        for c in range(classes)
    ]
    got = classwise_calibration_error(probabilities, target, binning=binning, norm=norm)
    assert got == pytest.approx(np.mean(errors), abs=1e-12)


def test_a_class_that_never_comes_counts():
    probabilities = torch.tensor([[0.5, 0.25, 0.25]] * 4, dtype=torch.float64)
    # Gaps: 0.5 - 0.5, 0.25 - 0.5, 0.25 - 0.
    assert classwise_calibration_error(probabilities, [0, 0, 1, 1]) == pytest.approx(0.5 / 3)


@pytest.mark.parametrize(
    ("probabilities", "target", "text"),
    [
        ([0.5, 0.5], [0, 1], "must have shape (N, C) and target (N,)"),
        ([[0.5, 0.5]], [0, 1], "got (1, 2) and (2,)"),
        (torch.zeros(0, 3), torch.zeros(0), "none of them empty, got (0, 3)"),
        ([[0.5, 0.5]], [2], "target holds 2 at position 0"),
        ([[0.5, 0.5]], [-100], "an integer from 0 to 1"),
        ([[0.5, 0.5]], [0.5], "an integer from 0 to 1"),
        ([[0.5, 1.5]], [0], "1.5"),
    ],
)
def test_errors_say_what_came_and_what_is_valid(probabilities, target, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        classwise_calibration_error(probabilities, target)
