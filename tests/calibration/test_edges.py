"""Explicit edges, as numpy.histogram takes them."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from levelhead.calibration import calibration_error, reliability

edges = st.lists(st.sampled_from([i / 8 for i in range(9)]), max_size=8).map(
    lambda inner: [0.0, *sorted(inner), 1.0]
)
values = st.lists(
    st.one_of(st.floats(0, 1), st.sampled_from([i / 8 for i in range(9)])), min_size=1, max_size=50
)


@given(values, edges, st.sampled_from([list, tuple, np.array]))
def test_counts_are_those_of_numpy(confidence, bins, kind):
    table = reliability(confidence, [True] * len(confidence), bins=kind(bins))
    assert table.count.tolist() == np.histogram(confidence, np.array(bins))[0].tolist()


@given(values, st.integers(1, 12), st.sampled_from(["l1", "l2", "max"]))
def test_the_edges_of_a_table_give_its_error_again(confidence, bins, norm):
    correct = [value > 0.3 for value in confidence]
    for binning in ("uniform", "quantile"):
        again = reliability(confidence, correct, bins=bins, binning=binning).edges
        assert calibration_error(confidence, correct, bins=again, norm=norm) == calibration_error(
            confidence, correct, bins=bins, binning=binning, norm=norm
        )


def test_edges_in_a_tensor():
    edges = torch.tensor([0, 0.3, 1.0])
    assert reliability([0.1, 0.5], [0, 1], bins=edges).count.tolist() == [1, 1]


def test_edges_may_leave_the_unit_interval():
    assert reliability([0.0, 1.0], [0, 1], bins=[-1, 0.5, 7]).count.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("bins", "options", "error", "text"),
    [
        ([0.2, 0.5, 0.9], {}, ValueError, "2 of 3 confidences lie outside the edges [0.2, 0.9]"),
        ([0.5, 0.2], {}, ValueError, "two or more edges in ascending order, got [0.5, 0.2]"),
        ([0.5], {}, ValueError, "two or more edges in ascending order"),
        ([], {}, ValueError, "two or more edges in ascending order"),
        ([[0, 1]], {}, ValueError, "two or more edges in ascending order"),
        ([0, float("nan"), 1], {}, ValueError, "two or more edges in ascending order"),
        ([0, 1], {"binning": "quantile"}, ValueError, "bins holds their edges"),
        ("ten", {}, TypeError, "bins must be an int, got 'ten'"),
        (None, {}, TypeError, "bins must be a tensor, an array or a list of numbers"),
    ],
)
def test_errors_say_what_came_and_what_is_valid(bins, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        reliability([0.1, 0.5, 1.0], [0, 1, 1], bins=bins, **options)
