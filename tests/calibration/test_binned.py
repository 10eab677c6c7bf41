"""The reliability table and the calibration error, against hand-computed values and numpy."""

import math
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from levelhead.calibration import calibration_error, reliability

# Two bins, worked by hand: [0, .5) holds .2 and .4, of which one is right; [.5, 1] holds .6, .8 and
# 1, of which two are. Gaps: .5 - .3 = .2 and 2/3 - .8 = -.1333.
CONFIDENCE = [0.2, 0.4, 0.6, 0.8, 1.0]
CORRECT = [False, True, True, True, False]

predictions = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)
settings = st.fixed_dictionaries(
    {
        "bins": st.integers(1, 20),
        "binning": st.sampled_from(["uniform", "quantile"]),
        "norm": st.sampled_from(["l1", "l2", "max"]),
        "weighted": st.booleans(),
    }
)


def numpy_calibration_error(confidence, correct, edges, *, norm, weighted):
    """The histogram of numpy closes its last bin, as ours does, and shares no code with torch."""
    count, mean, accuracy = (
        np.histogram(confidence, edges, weights=weights)[0].astype(float)
        for weights in (None, confidence, np.asarray(correct, dtype=float))
    )
    filled = count > 0
    count = count[filled]
    gap = np.abs(accuracy[filled] / count - mean[filled] / count)
    weight = count / count.sum() if weighted else np.full(len(count), 1 / len(count))
    norms = {"l1": weight @ gap, "l2": math.sqrt(weight @ gap**2), "max": gap.max()}
    return norms[norm]


def test_table_worked_by_hand():
    table = reliability(CONFIDENCE, CORRECT, bins=2)
    assert table.edges.tolist() == [0.0, 0.5, 1.0]
    assert table.count.tolist() == [2, 3]
    assert table.confidence.tolist() == pytest.approx([0.3, 0.8])
    assert table.accuracy.tolist() == pytest.approx([0.5, 2 / 3])
    assert {table.edges.dtype, table.confidence.dtype, table.accuracy.dtype} == {torch.float64}


@pytest.mark.parametrize(
    ("norm", "weighted", "expected"),
    [
        ("l1", True, 0.4 * 0.2 + 0.6 * (0.8 - 2 / 3)),
        ("l1", False, (0.2 + (0.8 - 2 / 3)) / 2),
        ("l2", True, math.sqrt(0.4 * 0.2**2 + 0.6 * (0.8 - 2 / 3) ** 2)),
        ("l2", False, math.sqrt((0.2**2 + (0.8 - 2 / 3) ** 2) / 2)),
        ("max", True, 0.2),
        ("max", False, 0.2),
    ],
)
def test_error_worked_by_hand(norm, weighted, expected):
    error = calibration_error(CONFIDENCE, CORRECT, bins=2, norm=norm, weighted=weighted)
    assert error == pytest.approx(expected)


def test_confidence_one_counts_in_the_last_bin():
    assert reliability([1.0, 0.95], [0, 1]).count.tolist() == [0] * 9 + [2]
    assert calibration_error([1.0, 0.95], [0, 1]) == pytest.approx(0.475)


def test_a_saturated_softmax_counts_in_the_last_bin():
    confidence = torch.tensor([[20.0, 0.0]]).softmax(-1).amax(-1)
    assert confidence.item() == 1.0
    assert reliability(confidence, [True]).count[-1] == 1


def test_inner_edges_belong_to_the_bin_above():
    tenths = [i / 10 for i in range(11)]
    assert reliability(tenths, [True] * 11).count.tolist() == [1] * 9 + [2]


def test_empty_bins_are_nan_in_the_table_and_skipped_in_the_error():
    table = reliability([0.05, 0.95], [False, True])
    assert table.accuracy[1:-1].isnan().all()
    assert table.confidence[1:-1].isnan().all()
    assert calibration_error([0.05, 0.95], [False, True], weighted=False) == pytest.approx(0.05)


def test_quantile_bins_hold_equal_counts():
    confidence = torch.linspace(0, 1, 103, dtype=torch.float64).sqrt()
    table = reliability(confidence, torch.ones(103), bins=10, binning="quantile")
    assert set(table.count.tolist()) == {10, 11}
    assert (table.edges[0], table.edges[-1]) == (0.0, 1.0)


def test_quantile_bins_keep_ties_together():
    table = reliability([0.1] + [0.5] * 7, [True] * 8, bins=4, binning="quantile")
    assert table.count[table.count > 0].tolist() == [1, 7]


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda values: torch.tensor(values).reshape(5, 1, 1),
        lambda values: torch.tensor(values, dtype=torch.float64, requires_grad=True),
    ],
)
def test_lists_arrays_and_tensors_alike(convert):
    correct = (
        CORRECT if convert in (list, tuple) else np.reshape(CORRECT, np.shape(convert(CONFIDENCE)))
    )
    error = calibration_error(convert(CONFIDENCE), correct, bins=2)
    assert error == pytest.approx(0.4 * 0.2 + 0.6 * (0.8 - 2 / 3), abs=1e-7)


@given(predictions, settings)
def test_equals_numpy(data, options):
    confidence, correct = map(list, zip(*data, strict=True))
    norm, weighted = options.pop("norm"), options.pop("weighted")
    edges = reliability(confidence, correct, **options).edges.numpy()
    expected = numpy_calibration_error(confidence, correct, edges, norm=norm, weighted=weighted)
    got = calibration_error(confidence, correct, norm=norm, weighted=weighted, **options)
    assert got == pytest.approx(expected, abs=1e-12)


@given(predictions, settings, st.randoms(use_true_random=False))
def test_order_of_predictions_does_not_matter(data, options, random):
    shuffled = random.sample(data, len(data))
    before, after = (calibration_error(*zip(*d, strict=True), **options) for d in (data, shuffled))
    assert before == pytest.approx(after, abs=1e-12)


@given(predictions, st.integers(1, 20))
def test_repeating_every_prediction_changes_nothing(data, bins):
    once, thrice = (calibration_error(*zip(*d, strict=True), bins=bins) for d in (data, data * 3))
    assert once == pytest.approx(thrice, abs=1e-12)


@given(predictions, st.integers(1, 20))
def test_norms_are_ordered_and_bounded(data, bins):
    confidence, correct = zip(*data, strict=True)
    l1, l2, largest = (
        calibration_error(confidence, correct, bins=bins, norm=norm) for norm in ("l1", "l2", "max")
    )
    assert 0 <= l1 <= l2 + 1e-12 <= largest + 2e-12 <= 1 + 1e-9


@given(predictions, settings)
def test_table_accounts_for_every_prediction(data, options):
    confidence, correct = zip(*data, strict=True)
    table = reliability(confidence, correct, bins=options["bins"], binning=options["binning"])
    assert table.count.sum() == len(data)
    right = (table.accuracy.nan_to_num() * table.count).sum().item()
    assert right == pytest.approx(Counter(correct)[True])
    mass = (table.confidence.nan_to_num() * table.count).sum().item()
    assert mass == pytest.approx(float(sum(map(Fraction, confidence))), abs=1e-12)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=20), settings)
def test_certain_and_right_or_certainly_wrong_is_calibrated(confidence, options):
    assert calibration_error(confidence, confidence, **options) == 0.0


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (([], []), {}, ValueError, "no predictions: confidence and correct are empty"),
        (([0.5], [1, 0]), {}, ValueError, "same shape, got (1,) and (2,)"),
        (([0.5, 1.5, 7], [1, 0, 1]), {}, ValueError, "1.5 at position 1 (2 such of 3)"),
        (([0.5, math.nan], [1, 0]), {}, ValueError, "confidence holds nan at position 1"),
        (([0.5], [0.5]), {}, ValueError, "correct holds 0.5 at position 0"),
        (("high", [1]), {}, TypeError, "confidence must be a tensor, an array or a list"),
        (([0.5], ["yes"]), {}, TypeError, "correct must be a tensor, an array or a list"),
        (([0.5], [1]), {"bins": 0}, ValueError, "bins must be at least 1, got 0"),
        (([0.5], [1]), {"bins": 10.0}, TypeError, "bins must be an int, got 10.0"),
        (([0.5], [1]), {"bins": True}, TypeError, "bins must be an int, got True"),
        (([0.5], [1]), {"binning": "log"}, ValueError, "expected one of 'uniform', 'quantile'"),
        (([0.5], [1]), {"norm": "l3"}, ValueError, "expected one of 'l1', 'l2', 'max'"),
    ],
)
def test_errors_say_what_came_and_what_is_valid(arguments, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        calibration_error(*arguments, **options)
