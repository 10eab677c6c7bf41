"""Tables merge: shards, ranks and streams give the table of the whole."""

import math
import pickle
import re
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from levelhead.calibration import (
    ReliabilityTable,
    brier_score,
    calibration_error,
    negative_log_likelihood,
    predictions,
    reliability,
)

SUMS = ("count", "right", "confidence_sum", "squared_error_sum", "log_loss_sum")
data = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40)
edges = st.lists(st.floats(0.01, 0.99), max_size=6).map(lambda inner: [0.0, *sorted(inner), 1.0])


def table(rows, bins=10):
    return reliability(*zip(*rows, strict=True), bins=bins)


def assert_equal(first, second):
    assert first.edges.tolist() == second.edges.tolist()
    for name in SUMS:
        # Sums of up to 120 terms, in another order.
        assert getattr(first, name).tolist() == pytest.approx(
            getattr(second, name).tolist(), rel=1e-13, abs=1e-13
        )


@given(data, st.lists(st.integers(0, 40), max_size=4), edges)
def test_shards_merge_into_the_whole(rows, cuts, bins):
    bounds = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    shards = [table(rows[low:high], bins) for low, high in pairwise(bounds)]
    assert_equal(reduce(ReliabilityTable.merge, shards), table(rows, bins))


@given(data, data, data)
def test_merge_is_associative_and_commutative(first, second, third):
    a, b, c = map(table, (first, second, third))
    assert_equal(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_equal(a.merge(b), b.merge(a))
    assert a.merge(b).count.tolist() == b.merge(a).count.tolist()


@given(data, edges)
def test_the_empty_table_changes_nothing(rows, bins):
    whole = table(rows, bins)
    assert_equal(ReliabilityTable.empty(whole.edges).merge(whole), whole)
    assert_equal(whole.merge(ReliabilityTable.empty(whole.edges)), whole)


@given(data, st.integers(1, 12))
def test_a_stream_has_the_measures_of_the_whole(rows, bins):
    confidence, correct = zip(*rows, strict=True)
    stream = ReliabilityTable.empty(table(rows, bins).edges)
    for row in rows:
        stream = stream.merge(table([row], bins))
    for norm in ("l1", "l2", "max"):
        for weighted in (True, False):
            assert stream.error(norm=norm, weighted=weighted) == pytest.approx(
                calibration_error(confidence, correct, bins=bins, norm=norm, weighted=weighted),
                abs=1e-12,
            )
    pooled = stream.pooled()
    assert pooled.accuracy.item() == pytest.approx(np.mean(correct))
    assert pooled.confidence.item() == pytest.approx(np.mean(confidence))
    assert pooled.gap.item() == pytest.approx(np.mean(confidence) - np.mean(correct), abs=1e-12)
    assert pooled.brier_score.item() == pytest.approx(brier_score(confidence, correct))
    nll = negative_log_likelihood(confidence, correct)
    assert pooled.negative_log_likelihood.item() == pytest.approx(nll)
    assert stream.brier_decomposition() == pytest.approx(
        reliability(confidence, correct, bins=bins).brier_decomposition(), abs=1e-12
    )


def test_long_columns_are_counted_in_pieces(monkeypatch):
    confidence = torch.rand(1000, dtype=torch.float64)
    correct = torch.rand(1000) < 0.5
    whole = reliability(confidence, correct)
    monkeypatch.setattr(predictions, "CHUNK", 64)
    assert_equal(reliability(confidence, correct), whole)


def test_the_empty_table_has_no_error():
    assert math.isnan(ReliabilityTable.empty().error())


@pytest.mark.parametrize("bins", [2, [0, 0.5, 1], torch.tensor([0.0, 0.5, 1.0])])
def test_an_empty_table_of_bins_or_edges(bins):
    whole = reliability([0.2, 0.9], [0, 1], bins=2)
    assert_equal(ReliabilityTable.empty(bins).merge(whole), whole)


def test_an_empty_table_of_nothing():
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        ReliabilityTable.empty(0)


def test_a_table_survives_pickling_on_its_way_between_ranks():
    whole = reliability([0.2, 0.9], [0, 1])
    assert_equal(pickle.loads(pickle.dumps(whole)), whole)


def test_other_edges_do_not_merge():
    text = "tables merge over the same edges, got 2 bins on [0, 1] and 3 bins on [0, 1]"
    with pytest.raises(ValueError, match=re.escape(text)):
        reliability([0.5], [1], bins=2).merge(reliability([0.5], [1], bins=3))


def test_an_unknown_norm_of_a_table():
    with pytest.raises(ValueError, match="unknown norm 'l3'"):
        reliability([0.5], [1]).error(norm="l3")
