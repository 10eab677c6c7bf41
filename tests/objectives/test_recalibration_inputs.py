"""A teacher's padding stays padding when it is recalibrated, and what are no log-probabilities are refused."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.objectives.test_recalibration import top_k
from torch import Tensor

from levelhead.objectives import Recalibration, recalibrate
from levelhead.objectives.recalibration import scale_probabilities, smooth_probabilities

INF, NAN = torch.inf, torch.nan
FUNCTIONS = [scale_probabilities, smooth_probabilities]


@pytest.mark.parametrize("function", FUNCTIONS)
@given(top_k(), st.integers(1, 3), st.floats(0.02, 1))
def test_padding_stays_padding_and_changes_nothing(
    function: Any, log_probs: Tensor, padding: int, value: float
) -> None:
    none = torch.full((len(log_probs), padding), -INF, dtype=log_probs.dtype)
    got = function(torch.cat([log_probs, none], 1), value)
    k = log_probs.shape[1]
    torch.testing.assert_close(got[:, :k], function(log_probs, value))
    assert torch.equal(got[:, k:], none)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_candidate_and_none(function: Any) -> None:
    got = function(torch.tensor([[-0.5, -INF], [-INF, -INF]]), 0.1)
    assert got[:, 1].tolist() == [-INF, -INF]
    assert got[0, 0].item() == pytest.approx(0 if function is scale_probabilities else -0.5)
    assert got[1, 0] == -INF


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_small_temperature_leaves_the_largest_alone(dtype: torch.dtype) -> None:
    log_probs = torch.tensor([0.9, 0.05]).log().to(dtype)
    for temperature in (1e-3, 1e-8, 1e-300):
        got = scale_probabilities(log_probs, temperature)
        assert got.dtype == dtype
        assert got.exp().tolist() == [1, 0]


def test_smoothing_takes_no_candidate_away() -> None:
    """A probability below the least of float32 is one, and -inf would be none."""
    log_probs = torch.tensor([0.0, -200.0])
    assert smooth_probabilities(log_probs, 0.0).tolist() == [0, -200]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        ((1, 1), NAN, "the log-probabilities of token [1] hold NaN"),
        ((1, 0), INF, "the log-probabilities of token [1] are of probabilities that sum to inf"),
        ((1, 0), 0.8, "the log-probabilities of token [1] are of probabilities that sum to 2.24"),
    ],
)
def test_what_are_no_log_probabilities_are_refused(
    function: Any, at: Any, value: float, text: str
) -> None:
    log_probs = torch.tensor([[-0.1, -4.0], [-0.1, -4.0]])
    log_probs[at] = value
    with pytest.raises(ValueError, match=re.escape(text)):
        function(log_probs, 0.3)
    for method in ("temperature", "smoothing"):
        with pytest.raises(ValueError, match=re.escape(text)):
            recalibrate(log_probs, [1, 0], method=method)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert compiled(log_probs, 0.3).isnan().any(1).tolist() == [False, True]


def test_the_largest_stands_first() -> None:
    log_probs = torch.tensor([[-0.1, -4.0], [-4.0, -0.1]])
    text = re.escape(
        "the log-probabilities of token [1] are not descending, -0.1 follows a smaller"
    )
    with pytest.raises(ValueError, match=text):
        smooth_probabilities(log_probs, 0.3)
    with pytest.raises(ValueError, match=text):
        recalibrate(log_probs, [1, 0])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: scale_probabilities([-0.1, -4.0], 0.3),
            TypeError,
            "log_probs must be a torch.Tensor, got [",
        ),
        (
            lambda: smooth_probabilities(torch.tensor([0, -4]), 0.3),
            TypeError,
            "must be float16, bfloat16, float32 or float64",
        ),
        (
            lambda: scale_probabilities(torch.tensor(-1.0), 0.3),
            ValueError,
            "shape (..., k) with k >= 1, got ()",
        ),
        (lambda: smooth_probabilities(torch.zeros(3, 0), 0.3), ValueError, "k >= 1, got (3, 0)"),
        (
            lambda: scale_probabilities(torch.zeros(1), "0.3"),
            TypeError,
            "temperature must be a number, got '0.3'",
        ),
        (
            lambda: smooth_probabilities(torch.zeros(1), None),
            TypeError,
            "smoothing must be a number, got None",
        ),
        (
            lambda: scale_probabilities(torch.zeros(1), torch.tensor(0.3, requires_grad=True)),
            TypeError,
            "temperature is a constant here, and requires a gradient; pass temperature.item()",
        ),
        (
            lambda: recalibrate([["a", "b"]], [1]),
            TypeError,
            "log_probs must be a tensor, an array or a list",
        ),
        (lambda: recalibrate([[-INF, -INF]], [1]), ValueError, "token [0] has no candidate"),
        (lambda: recalibrate([[-0.1, -3]], [2]), ValueError, "correct holds 2 at position 0"),
        (
            lambda: Recalibration("platt", 1, 1, 1, 0, 0, []),
            ValueError,
            "unknown method 'platt'; expected one of",
        ),
    ],
)
def test_refusals(call: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_a_number_may_be_a_tensor() -> None:
    log_probs = torch.tensor([0.9, 0.05]).log()
    assert torch.equal(
        scale_probabilities(log_probs, torch.tensor(0.25)), scale_probabilities(log_probs, 0.25)
    )
