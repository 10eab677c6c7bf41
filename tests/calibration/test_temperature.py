"""The fitted temperature is where the likelihood is highest."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from levelhead.calibration import calibration_error, fit_temperature, temperature


def nll(logits, target, log_temperature):
    scaled = log_softmax(logits / math.exp(log_temperature), axis=1)
    return -scaled[np.arange(len(target)), target].mean()


@given(st.integers(0, 10_000), st.integers(2, 6), st.floats(0.1, 30))
def test_equals_a_search_for_the_minimum(seed, classes, scale):
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(40, classes))
    target = rng.integers(classes, size=40)
    try:
        fitted = fit_temperature(logits, target)
    except ValueError as error:  # the likelihood still rises at the bound
        fitted = float(re.search(r"at a temperature of ([\d.]+)", str(error))[1])
    found = minimize_scalar(
        lambda t: nll(logits, target, t),
        bounds=np.log([0.01, 100]),
        method="bounded",
        options={"xatol": 1e-10},
    )
    # No search finds a minimum to more than the root of a rounding: compare what it reaches.
    assert nll(logits, target, math.log(fitted)) <= found.fun + 1e-12
    if 0.011 < fitted < 99:
        # And there the derivative vanishes.
        step = 1e-4
        up, down = (nll(logits, target, math.log(fitted) + s) for s in (step, -step))
        assert abs(up - down) / (2 * step) < 1e-5


@pytest.mark.parametrize("truth", [0.3, 1.0, 4.0])
def test_recovers_the_temperature_that_drew_the_targets(truth):
    logits = 5 * torch.randn(20_000, 5, dtype=torch.float64)
    target = torch.multinomial(torch.softmax(logits / truth, 1), 1).squeeze(1)
    fitted = fit_temperature(logits, target)
    assert fitted == pytest.approx(truth, rel=0.05)
    confidence, prediction = torch.softmax(logits / fitted, 1).max(1)
    assert calibration_error(confidence, prediction == target) < 0.02


@given(st.floats(0.2, 5))
def test_scaled_logits_have_a_scaled_temperature(factor):
    logits, target = np.random.default_rng(0).normal(size=(30, 3)), np.arange(30) % 3
    logits[np.arange(30), target] += 0.5
    assert fit_temperature(factor * logits, target) == pytest.approx(
        factor * fit_temperature(logits, target), rel=1e-9
    )


def test_binary_logits_are_two_classes():
    rng = np.random.default_rng(0)
    logits, target = 3 * rng.normal(size=50), rng.integers(2, size=50)
    logits[target == 1] += 4
    both = np.stack([np.zeros(50), logits], 1)
    assert fit_temperature(logits, target) == pytest.approx(fit_temperature(both, target))


def test_a_constant_per_row_changes_nothing():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(30, 3)), np.arange(30) % 3
    logits[np.arange(30), target] += 0.5
    shifted = logits + 1e3 * rng.normal(size=(30, 1))
    assert fit_temperature(shifted, target) == pytest.approx(fit_temperature(logits, target))


@pytest.mark.parametrize(
    ("logits", "target", "text"),
    [
        ([[2.0, 0.0], [0.0, 3.0]], [0, 1], "a temperature of 0.01: the model gets these 2 rows"),
        ([[1e9, 0.0]], [0], "a temperature of 0.01: the model gets these 1 rows right"),
        ([[2.0, 0.0], [0.0, 3.0]], [1, 0], "a temperature of 100: on these 2 rows the model does"),
    ],
)
def test_without_a_minimum(logits, target, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        fit_temperature(logits, target)


@pytest.mark.parametrize(
    ("logits", "target"),
    [([[1.0, 1.0, 1.0]] * 2, [0, 2]), ([[7.0]], [0]), ([[7.0, -math.inf]], [0])],
)
def test_where_a_temperature_changes_nothing_it_is_one(logits, target):
    assert fit_temperature(logits, target) == 1.0


def test_an_excluded_class_does_not_count():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(30, 3)), np.arange(30) % 2
    logits[np.arange(30), target] += 0.5
    logits[:, 2] = -np.inf
    assert fit_temperature(logits, target) == pytest.approx(fit_temperature(logits[:, :2], target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_of_any_dtype(dtype):
    logits = (4 * torch.randn(200, 5)).to(dtype)
    target = torch.randint(5, (200,))
    assert fit_temperature(logits, target) == pytest.approx(
        fit_temperature(logits.double(), target)
    )


def test_many_logits_are_taken_in_pieces(monkeypatch):
    logits, target = torch.randn(100, 7), torch.randint(7, (100,))
    whole = fit_temperature(logits, target)
    monkeypatch.setattr(temperature, "_ENTRIES", 50)
    assert fit_temperature(logits, target) == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize(
    ("logits", "target", "error", "text"),
    [
        ([[1.0, 2.0]], [2], ValueError, "target holds 2 at position 0"),
        ([[1.0, 2.0]], [0, 1], ValueError, "must have shape (N, C) and target (N,)"),
        ([], [], ValueError, "none of them empty"),
        ([[1.0, math.nan]], [0], ValueError, "logits hold NaN or +inf"),
        ([[1.0, -math.inf]], [1], ValueError, "0 at every temperature; leave such rows out"),
        ([[1.0, 2.0], [1.0]], [0, 1], TypeError, "logits must be a tensor"),
        ([math.inf], [1], ValueError, "NaN or +inf"),
    ],
)
def test_errors_say_what_came_and_what_is_valid(logits, target, error, text):
    with pytest.raises(error, match=re.escape(text)):
        fit_temperature(logits, target)
