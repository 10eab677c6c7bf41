"""The threshold earns the most there is to earn, and ties go to answering more."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from levelhead.calibration import abstention

rows = st.lists(
    st.tuples(st.one_of(st.floats(-10, 10), st.sampled_from([0.0, 0.5, 1.0])), st.booleans()),
    min_size=1,
    max_size=40,
)
costs = st.sampled_from([0, 0.5, 1, 2, 10])


def points(score, correct, threshold, wrong):
    """By the words of the definition."""
    earned = [
        (1 if y else -wrong) if s >= threshold else 0 for s, y in zip(score, correct, strict=True)
    ]
    return np.mean(earned)


@given(rows, costs)
def test_no_threshold_earns_more_and_no_lower_one_as_much(rows, wrong):
    score, correct = zip(*rows, strict=True)
    best = abstention(score, correct, wrong=wrong).threshold
    candidates = [-math.inf, *sorted(set(score)), math.inf]
    assert best in candidates
    earned = [points(score, correct, candidate, wrong) for candidate in candidates]
    assert candidates[int(np.argmax(np.round(earned, 9)))] == best  # the first of equals


@given(rows, costs, st.one_of(st.floats(-10, 10), st.sampled_from([-math.inf, math.inf, 0.5])))
def test_a_threshold_earns_what_it_says(rows, wrong, threshold):
    score, correct = zip(*rows, strict=True)
    got = abstention(score, correct, threshold=threshold, wrong=wrong)
    assert got.points == pytest.approx(points(score, correct, threshold, wrong), abs=1e-12)
    assert got.threshold == threshold
    assert got.abstained == pytest.approx(np.mean(np.array(score) < threshold))


@pytest.mark.parametrize(
    ("correct", "wrong", "expected"),
    [
        ([1, 1, 1], 1, -math.inf),
        ([0, 0, 0], 1, math.inf),
        ([0, 0, 0], 0, -math.inf),
        ([0, 1, 1], 1, 0.5),
        ([1, 0, 1], 1, -math.inf),  # 1 from the first on, 1 from the last on
        ([0, 1, 0], 1, 0.5),  # earns 0 as abstaining does, and answers more
        ([0, 1, 0], 2, math.inf),
    ],
)
def test_worked_by_hand(correct, wrong, expected):
    score = [0.1, 0.5, 0.9]
    assert abstention(score, correct, wrong=wrong).threshold == expected


def test_equal_scores_are_answered_together():
    assert abstention([0.5, 0.5, 0.5], [1, 0, 0]).threshold == math.inf
    assert abstention([0.5, 0.5, 0.5], [1, 1, 0]).threshold == -math.inf


def test_a_calibrated_confidence_answers_from_its_break_even_point_on():
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000)
    correct = rng.random(200_000) < confidence
    assert abstention(confidence, correct, wrong=1).threshold == pytest.approx(1 / 2, abs=0.02)
    assert abstention(confidence, correct, wrong=3).threshold == pytest.approx(3 / 4, abs=0.02)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: abstention([0.5], [1], wrong=-1), "at least 0, got -1"),
        (lambda: abstention([0.5], [1], threshold=0.5, wrong=math.nan), "at least 0, got nan"),
        (lambda: abstention([0.5], [1], threshold=math.nan), "threshold must be a number, got nan"),
        (lambda: abstention([math.inf], [1]), "pass finite scores"),
    ],
)
def test_errors_say_what_came_and_what_is_valid(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
