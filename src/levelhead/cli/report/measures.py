"""What the answers say, as numbers that go into results.json; the measures are levelhead.calibration's."""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from levelhead.calibration import (
    Interval,
    auroc,
    mann_whitney_p,
    reliability,
    summarise,
)
from levelhead.calibration.bootstrap import METRICS, RANKING_METRICS

from .abstention import PAYOFFS, abstention
from .answers import Answers
from .columns import NO_PROBABILITIES
from .layout import Layout
from .reading import KIND

SIGNIFICANT = 1e-4
_POINTS = 200  # of a curve

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        bins: Of equal width, of the calibration error.
        labels: Answers with known outcome that a threshold is learned from.
        seed: Of resampling, and of which answers are labelled.
    """

    bins: int = 10
    labels: int = 100
    seed: int = 0


def measure_all(answers: Answers, kind: str, layout: Layout, settings: Settings) -> Numbers:
    """All rows, and each by itself, for every kind of score."""
    kinds = {kind: answers}
    if KIND in answers.columns:
        kinds = {key[0]: part for key, part in answers.split([KIND]).items()}
    return {name: _measure_kind(name, part, layout, settings) for name, part in kinds.items()}


def _measure_kind(name: str, answers: Answers, layout: Layout, settings: Settings) -> Numbers:
    score, _ = answers.tensors()
    low, high = score.min().item(), score.max().item()
    probability = name not in NO_PROBABILITIES and low >= 0 and high <= 1
    rows = answers.split([layout.by]) if layout.by in answers.columns else {}
    groups = [
        _measure(row, part, layout.within, probability, settings)
        for (row,), part in rows.items()
        if len(rows) > 1
    ]
    if groups and layout.by and layout.within:
        known = [stratum for group in groups for stratum in group["strata"]]
        columns = (layout.by, *layout.within)
        overall = _measure("all", answers, columns, probability, settings, known)
        overall["strata"] = []  # those of the groups
    else:
        overall = _measure("all", answers, layout.within, probability, settings)
    return {
        "lowest": low,
        "highest": high,
        "probability": probability,
        "overall": overall,
        "groups": groups,
        "relations": _relations(groups, probability),
    }


def _measure(
    name: str,
    answers: Answers,
    within: tuple[str, ...],
    probability: bool,
    settings: Settings,
    known: list[Numbers] | None = None,
) -> Numbers:
    """A row of the main table; `known` are its strata, if they are."""
    score, correct = answers.tensors()
    parts = {key: part.tensors() for key, part in answers.split(within).items()}
    strata = known or [
        _stratum(dict(zip(within, key, strict=True)), *part) for key, part in parts.items()
    ]
    numbers: Numbers = {
        "name": name,
        "answers": len(score),
        "right": int(torch.count_nonzero(correct)),
        "metrics": _metrics(score, correct, probability, settings),
        "strata": strata if within else [],
        "macro": _macro(strata),
        "abstention": [
            abstention(
                list(parts.values()), labels=settings.labels, wrong=wrong, seed=settings.seed
            )
            for wrong in PAYOFFS
        ],
        "curve": _curve(score, correct),
    }
    if probability:
        numbers["reliability"] = _table(score, correct, settings.bins)
    return numbers


def _stratum(groups: dict[str, str], score: Tensor, correct: Tensor) -> Numbers:
    right = int(torch.count_nonzero(correct))
    both = 0 < right < len(correct)
    return {
        "groups": groups,
        "answers": len(correct),
        "accuracy": right / len(correct),
        "auroc": auroc(score, correct) if both else None,
        "p": mann_whitney_p(score, correct) if both else None,
    }


def _macro(strata: list[Numbers]) -> Numbers:
    """Means over strata, and in how many confidence tells right from wrong."""
    ranked = [stratum for stratum in strata if stratum["auroc"] is not None]
    return {
        "strata": len(strata),
        "ranked": len(ranked),
        "accuracy": fmean(stratum["accuracy"] for stratum in strata),
        "auroc": fmean(stratum["auroc"] for stratum in ranked) if ranked else None,
        "significant": sum(stratum["p"] < SIGNIFICANT for stratum in ranked),
    }


def _metrics(score: Tensor, correct: Tensor, probability: bool, settings: Settings) -> Numbers:
    found = summarise(
        score,
        correct,
        bins=settings.bins,
        metrics=METRICS if probability else RANKING_METRICS,
        seed=settings.seed,
    )
    return {name: as_numbers(interval) for name, interval in found.items()}


def as_numbers(interval: Interval) -> dict[str, float | None]:
    """An interval for JSON, which has no NaN."""
    values = (None if math.isnan(value) else value for value in interval)
    return dict(zip(("estimate", "low", "high"), values, strict=True))


def _curve(score: Tensor, correct: Tensor) -> Numbers:
    """Coverage and risk at some two hundred thresholds, spread evenly over the answers."""
    low, high = score.aminmax()
    sample = score[:: 1 + len(score) // 100_000].sort().values
    at = torch.arange(_POINTS) * len(sample) // _POINTS
    edges = torch.unique(torch.cat([low.view(1), sample[at], high.view(1)]))
    if len(edges) == 1:
        risk = 1 - int(torch.count_nonzero(correct)) / len(correct)
        return {"threshold": [low.item()], "coverage": [1.0], "risk": [risk]}
    if low < 0 or high > 1:  # counting needs no probabilities, but asks for numbers in [0, 1]
        score, cuts = (score - low).div_(high - low), (edges - low) / (high - low)
        table = reliability(score, correct, bins=cuts)
    else:
        table = reliability(score, correct, bins=edges)
    answered, right = (part.flip(0).cumsum(0) for part in (table.count, table.right))
    kept = answered > 0
    return {
        "threshold": edges[:-1].flip(0)[kept].tolist(),
        "coverage": (answered / len(score))[kept].tolist(),
        "risk": (1 - right / answered)[kept].tolist(),
    }


def _table(score: Tensor, correct: Tensor, bins: int) -> Numbers:
    table = reliability(score, correct, bins=bins)
    return {
        "edges": table.edges.tolist(),
        "count": table.count.tolist(),
        "confidence": _without_nan(table.confidence),
        "accuracy": _without_nan(table.accuracy),
    }


def _without_nan(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _relations(groups: list[Numbers], probability: bool) -> Numbers:
    """Whether groups of higher accuracy have higher AUROC and lower calibration error."""
    relations = {}
    others = {"auroc": [group["macro"]["auroc"] for group in groups]}
    if probability:
        others["ece"] = [group["metrics"]["ece"]["estimate"] for group in groups]
    for name, values in others.items():
        pairs = [
            (group["macro"]["accuracy"], value)
            for group, value in zip(groups, values, strict=True)
            if value is not None
        ]
        if len(pairs) > 2:
            relations[name] = _pearson(pairs)
    return relations


def _pearson(pairs: list[tuple[float, float]]) -> Numbers:
    """Pearson's r, and its 95% interval by Fisher's transformation from four pairs on."""
    r = torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).T)[0, 1].clamp(-1, 1).item()
    if math.isnan(r):
        return {"r": None, "n": len(pairs), "low": None, "high": None}
    if len(pairs) < 4 or abs(r) == 1:
        return {"r": r, "n": len(pairs), "low": None, "high": None}
    half = 1.959964 / math.sqrt(len(pairs) - 3)
    return {
        "r": r,
        "n": len(pairs),
        "low": math.tanh(math.atanh(r) - half),
        "high": math.tanh(math.atanh(r) + half),
    }
