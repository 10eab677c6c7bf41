"""Ordered in pieces is ordered: every distinct score once, whatever the cuts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from levelhead.calibration import (
    abstention,
    auroc,
    calibration_error,
    mann_whitney_p,
    order,
    risk_coverage,
)

scores = st.lists(
    st.tuples(
        st.one_of(st.floats(allow_nan=False), st.sampled_from([0.0, 1.0, -1.0])), st.booleans()
    ),
    min_size=1,
    max_size=60,
)


def columns(rows):
    score, correct = zip(*rows, strict=True)
    return torch.tensor(score, dtype=torch.float64), torch.tensor(correct)


@given(scores, st.sampled_from([1, 2, 7, 100]))
def test_every_distinct_score_once_with_its_counts(rows, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "PIECE", piece)
        pieces = list(order.ascending(*columns(rows)))
    score, right, wrong = (torch.cat(part).numpy() for part in zip(*pieces, strict=True))
    given_score, correct = map(np.array, zip(*rows, strict=True))
    distinct, index = np.unique(given_score, return_inverse=True)
    assert score.tolist() == distinct.tolist()
    assert right.tolist() == np.bincount(index, correct, len(distinct)).tolist()
    assert wrong.tolist() == np.bincount(index, ~correct, len(distinct)).tolist()


@given(scores, st.integers(1, 20), st.sampled_from([3, 100]))
def test_quantile_edges_are_scores_by_rank(rows, bins, piece):
    score, _ = columns(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "PIECE", piece)
        edges = order.quantile_edges(score, bins)
    ranked = np.sort(score.numpy())
    rank = np.minimum(np.arange(bins + 1) * len(ranked) // bins, len(ranked) - 1)
    assert edges.tolist() == ranked[rank].tolist()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(2, 80))
def test_cells_hold_all_scores_and_few_distinct_ones_by_themselves(scores, count):
    cuts = order.cells(torch.tensor(scores, dtype=torch.float64), count)
    assert len(cuts) < count
    assert bool((cuts.diff() > 0).all())
    if len(set(scores)) <= count:
        assert cuts.tolist() == sorted(set(scores))[1:]


@pytest.mark.parametrize("saturated", [0.0, 0.6, 1.0])
def test_no_measure_sees_the_pieces(monkeypatch, saturated):
    rng = np.random.default_rng(0)
    score = np.where(rng.random(3000) < saturated, 1.0, rng.random(3000).round(3))
    correct = rng.random(3000) < 0.3 + 0.5 * score

    def measures():
        return [
            auroc(score, correct),
            mann_whitney_p(score, correct),
            abstention(score, correct).threshold,
            calibration_error(score, correct, binning="quantile"),
            risk_coverage(score, correct).area,
            *risk_coverage(score, correct).risk.tolist(),
        ]

    whole = measures()
    monkeypatch.setattr(order, "PIECE", 100)
    assert measures() == pytest.approx(whole, rel=1e-12)
