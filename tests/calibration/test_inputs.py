"""Whatever holds numbers is taken, in float64; what does not is refused in words."""

import math
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from levelhead import calibration
from levelhead.calibration import auroc, brier_score, summarise

SCORE = [0.25, 0.5, 0.75, 1.0]
CORRECT = [False, True, False, True]
FROZEN = np.array(SCORE)
FROZEN.flags.writeable = False
TAKE_SCORES = ("abstention", "auroc", "mann_whitney_p", "risk_coverage")
TAKE_CONFIDENCE = (
    "brier_score",
    "calibration_error",
    "negative_log_likelihood",
    "reliability",
    "smooth_calibration_error",
    "summarise",
)


@pytest.mark.parametrize(
    "score",
    [
        SCORE,
        tuple(SCORE),
        FROZEN,
        np.array(SCORE)[::-1][::-1],
        np.repeat(SCORE, 2)[::2],
        np.array(SCORE, dtype=np.float16),
        np.array(SCORE, dtype=">f8").astype("=f8"),
        pd.Series(SCORE, index=[7, 5, 3, 1]),
        pa.chunked_array([SCORE[:1], SCORE[1:]]),
        torch.tensor(SCORE, dtype=torch.bfloat16),
        torch.tensor(SCORE, requires_grad=True),
        torch.tensor(SCORE).reshape(2, 2),
    ],
    ids=lambda score: type(score).__name__,
)
def test_anything_that_holds_numbers(score):
    correct = np.reshape(CORRECT, np.shape(score.detach() if hasattr(score, "detach") else score))
    assert brier_score(score, correct) == brier_score(SCORE, CORRECT)
    assert auroc(score, correct) == 0.75


@pytest.mark.parametrize(
    "dtype", [bool, np.int8, np.uint8, np.uint16, np.int64, np.float16, np.float64]
)
def test_outcomes_of_any_dtype(dtype):
    assert auroc(SCORE, np.array(CORRECT, dtype=dtype)) == 0.75


def test_reversed_arrays():
    assert auroc(np.array(SCORE)[::-1], np.array(CORRECT)[::-1]) == 0.75


def test_the_input_is_left_as_it_was():
    score, correct = np.array([0.9, 0.1, 0.5]), np.array([True, False, True])
    summarise(score, correct)
    assert score.tolist() == [0.9, 0.1, 0.5]
    assert correct.tolist() == [True, False, True]


def test_python_floats_do_not_pass_through_float32():
    assert brier_score([0.1], [False]) == 0.1**2


@pytest.mark.parametrize("name", [*TAKE_SCORES, *TAKE_CONFIDENCE])
@pytest.mark.parametrize(
    ("values", "correct", "error", "text"),
    [
        ([], [], ValueError, "no predictions"),
        ([0.5], [1, 0], ValueError, "same shape, got (1,) and (2,)"),
        ([0.5, math.nan], [1, 0], ValueError, "holds nan at position 1 (1 such of 2)"),
        ([0.5, 0.5], [1, 2], ValueError, "correct holds 2 at position 1"),
        ([0.5], [None], TypeError, "correct must be a tensor, an array or a list of numbers"),
        (["a"], [1], TypeError, "must be a tensor, an array or a list of numbers"),
        (np.array(["a"]), [1], TypeError, "must be a tensor, an array or a list of numbers"),
        ([0.5j], [1], TypeError, "numbers"),
        (torch.tensor([0.5j]), [1], TypeError, "must hold real numbers, got torch.complex64"),
    ],
)
def test_what_is_refused(name, values, correct, error, text):
    with pytest.raises(error, match=re.escape(text)):
        getattr(calibration, name)(values, correct)


@pytest.mark.parametrize("name", TAKE_CONFIDENCE)
def test_what_is_no_probability_is_refused(name):
    with pytest.raises(ValueError, match=re.escape("confidence holds 97 at position 1")):
        getattr(calibration, name)([0.5, 97.0], [1, 0])
