"""Intervals are those of the ordinary bootstrap, row by row or in blocks."""

import math
import re

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from levelhead.calibration import (
    auroc,
    brier_score,
    calibration_error,
    compare,
    negative_log_likelihood,
    resampling,
    risk_coverage,
    smooth_calibration_error,
    summarise,
)
from levelhead.calibration.bootstrap import METRICS, RANKING_METRICS

MEASURES = {
    "accuracy": lambda _, y: np.mean(y),
    "mean_confidence": lambda c, _: np.mean(c),
    "gap": lambda c, y: np.mean(c) - np.mean(y),
    "ece": calibration_error,
    "rms": lambda c, y: calibration_error(c, y, norm="l2"),
    "mce": lambda c, y: calibration_error(c, y, norm="max"),
    "smooth_ece": smooth_calibration_error,
    "brier": brier_score,
    "nll": negative_log_likelihood,
    "auroc": auroc,
    "aurc": lambda c, y: risk_coverage(c, y).area,
}
RESAMPLED = [name for name in METRICS if name != "smooth_ece"]


def predictions(count, seed=0, decimals=3):
    rng = np.random.default_rng(seed)
    confidence = rng.beta(3, 1, size=count).round(decimals)
    return confidence, rng.random(count) < confidence**1.5


def test_estimates_are_the_public_measures():
    confidence, correct = predictions(5000)
    found = summarise(confidence, correct, resamples=2)
    assert tuple(found) == METRICS == tuple(MEASURES)
    for name, measure in MEASURES.items():
        assert found[name].estimate == pytest.approx(measure(confidence, correct), rel=1e-12)


def test_intervals_are_quantiles_over_drawn_rows():
    """With 512 distinct scores or fewer, and 2,000 rows: nothing is approximate."""
    confidence, correct = predictions(150)
    found = summarise(confidence, correct, resamples=60, confidence_level=0.8, seed=3)
    weights = torch.cat(list(resampling.draw(150, 60, torch.Generator().manual_seed(3))))
    assert weights.sum(1).tolist() == [150] * 60
    rows = [np.repeat(np.arange(150), weight.long().numpy()) for weight in weights]
    for name in RESAMPLED:
        values = [MEASURES[name](confidence[drawn], correct[drawn]) for drawn in rows]
        expected = np.quantile(values, [0.1, 0.9])
        assert [found[name].low, found[name].high] == pytest.approx(expected, abs=1e-6), name


@pytest.mark.parametrize("name", ["accuracy", "gap", "ece", "brier", "auroc", "aurc"])
@pytest.mark.parametrize("count", [200, 6000])  # rows; blocks of three rows
def test_intervals_are_those_of_scipy(name, count):
    confidence, correct = predictions(count, decimals=10)
    order = np.argsort(confidence)  # rows in order must not matter to the blocks
    confidence, correct = confidence[order], correct[order]
    theirs = bootstrap(
        (confidence, correct),
        MEASURES[name],
        paired=True,
        vectorized=False,
        n_resamples=800,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    ours = summarise(confidence, correct, resamples=4000)[name]
    # An end's own noise is 2.7 standard deviations / sqrt(resamples), 0.1 of one for scipy's 800.
    tolerance = 0.35 * theirs.standard_error
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=tolerance)


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        confidence = rng.random(300)
        correct = rng.random(300) < confidence
        interval = summarise(
            confidence, correct, metrics=["gap"], resamples=200, confidence_level=0.9
        )["gap"]
        held += interval.low <= 0 <= interval.high
    assert 165 <= held <= 195  # 180 expected, 4.2 the standard deviation


def test_runs_that_share_their_questions_compare_within_them():
    confidence, correct = predictions(3000)
    rng = np.random.default_rng(1)
    better = correct | (rng.random(3000) < 0.05)
    paired, unpaired = (
        compare((confidence, correct), (confidence, better), paired=paired)["accuracy"]
        for paired in (True, False)
    )
    assert paired.estimate == unpaired.estimate == pytest.approx(better.mean() - correct.mean())
    # The paired difference is a mean of zeros and ones.
    share = better.mean() - correct.mean()
    width = 2 * 1.96 * math.sqrt(share * (1 - share) / 3000)
    assert paired.high - paired.low == pytest.approx(width, rel=0.1)
    both = correct.var() + better.var()
    width = 2 * 1.96 * math.sqrt(both / 3000)
    assert unpaired.high - unpaired.low == pytest.approx(width, rel=0.1)


def test_a_run_does_not_differ_from_itself():
    run = predictions(2500)
    for name, difference in compare(run, run, paired=True).items():
        ends = (0.0, math.nan, math.nan) if name == "smooth_ece" else (0.0, 0.0, 0.0)
        assert difference == pytest.approx(ends, nan_ok=True)


@pytest.mark.parametrize("paired", [True, False])
def test_differences_are_second_less_first(paired):
    first, second = predictions(400), predictions(400, seed=1)
    change = compare(first, second, paired=paired)
    of_each = [summarise(*run) for run in (first, second)]
    for name in METRICS:
        difference = of_each[1][name].estimate - of_each[0][name].estimate
        assert change[name].estimate == pytest.approx(difference, abs=1e-15)


def test_runs_of_other_lengths_compare_unpaired():
    assert compare(predictions(30), predictions(2100))["ece"].low < 0


@pytest.mark.parametrize("count", [150, 2500])
def test_rows_of_one_cluster_are_one_unit(count):
    confidence, correct = predictions(count)
    once = summarise(confidence, correct)
    ids = np.arange(count) * 7 - 3
    twice = summarise(np.tile(confidence, 2), np.tile(correct, 2), cluster=np.tile(ids, 2))
    for name in RESAMPLED:
        assert twice[name] == pytest.approx(once[name], rel=1e-9 if name != "aurc" else 0.02), name
    apart = summarise(np.tile(confidence, 2), np.tile(correct, 2))["accuracy"]
    wide = once["accuracy"].high - once["accuracy"].low
    assert (apart.high - apart.low) == pytest.approx(wide / math.sqrt(2), rel=0.12)


def test_large_cluster_ids_do_not_round_together():
    run = predictions(100)
    ids = [2**62 + i for i in range(100)]
    assert repr(summarise(*run, cluster=ids)) == repr(summarise(*run))


def test_the_seed_decides():
    run = predictions(100)
    assert repr(summarise(*run, seed=5)) == repr(summarise(*run, seed=5))
    assert summarise(*run, seed=5)["brier"] != summarise(*run, seed=6)["brier"]


def test_some_metrics_in_the_order_asked():
    run = predictions(100)
    assert list(summarise(*run, metrics=["nll", "accuracy"])) == ["nll", "accuracy"]
    assert summarise(*run, metrics=["nll"])["nll"] == summarise(*run)["nll"]


def test_scores_that_are_no_probabilities_rank():
    confidence, correct = predictions(300)
    with pytest.raises(ValueError, match="confidence holds"):
        summarise(10 * confidence - 5, correct)
    found = summarise(10 * confidence - 5, correct, metrics=RANKING_METRICS)
    expected = summarise(confidence, correct)
    for name in RANKING_METRICS:
        assert found[name] == pytest.approx(expected[name])


@pytest.mark.parametrize("outcome", [True, False])
@pytest.mark.parametrize(
    "confidence", [[0.3], [0.5] * 40, [0.1, 0.2, 0.3], [0.0, 1.0], [1.0] * 3000]
)
def test_one_class_only(confidence, outcome):
    found = summarise(confidence, [outcome] * len(confidence))
    assert all(math.isnan(value) for value in found["auroc"])
    assert found["accuracy"] == (outcome, outcome, outcome)
    assert found["aurc"] == pytest.approx([float(not outcome)] * 3, abs=1e-9)
    for name in set(RESAMPLED) - {"auroc"}:
        assert all(map(math.isfinite, found[name])), name


def test_resamples_without_a_pair_are_left_out():
    found = summarise([0.9, 0.5, 0.1], [1, 0, 0])["auroc"]
    assert found == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("binning", ["uniform", "quantile"])
def test_bins_are_those_asked_for(binning):
    confidence, correct = predictions(800)
    found = summarise(confidence, correct, bins=7, binning=binning)["ece"]
    expected = calibration_error(confidence, correct, bins=7, binning=binning)
    assert found.estimate == pytest.approx(expected)
    edges = [0, 0.5, 1]
    found = summarise(confidence, correct, bins=edges)["ece"]
    assert found.estimate == pytest.approx(calibration_error(confidence, correct, bins=edges))


def test_more_resamples_than_fit_at_once(monkeypatch):
    run = predictions(80)
    whole = summarise(*run, resamples=100)
    monkeypatch.setattr(resampling, "_BATCH", 33)
    pieces = summarise(*run, resamples=100)
    assert pieces["ece"] == pytest.approx(whole["ece"])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda r: summarise(*r, metrics=["f1"]), ValueError, "unknown metric 'f1'"),
        (lambda r: summarise(*r, resamples=0), ValueError, "resamples must be at least 1, got 0"),
        (lambda r: summarise(*r, resamples=1e3), TypeError, "resamples must be an int, got 1000.0"),
        (lambda r: summarise(*r, confidence_level=95), ValueError, "in (0, 1), got 95"),
        (lambda r: summarise(*r, cluster=[1]), ValueError, "cluster has 1 entries for 3 rows"),
        (lambda r: summarise(*r, bins=0), ValueError, "bins must be at least 1, got 0"),
        (lambda r: compare(r, [0.5]), TypeError, "second must be a pair (confidence, correct)"),
        (lambda r: compare(r, r, cluster=[1, 1, 2]), ValueError, "pass paired=True"),
        (
            lambda r: compare(r, ([0.5], [1]), paired=True),
            ValueError,
            "one row per question each, got 3 and 1 rows",
        ),
    ],
)
def test_errors_say_what_came_and_what_is_valid(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call(([0.1, 0.5, 0.9], [0, 1, 1]))
