"""The findings in plain sentences, and how numbers are written; page and terminal share both."""

from collections.abc import Callable
from typing import Any

Numbers = dict[str, Any]

MINUS = "\N{MINUS SIGN}"

_CALIBRATED = 0.02  # a gap that nobody would call over- or under-confident


def minus(text: str) -> str:
    """The text with true minus signs."""
    return text.replace("-", MINUS)


def percent(value: float) -> str:
    """58.6%."""
    return f"{100 * value:.1f}%"


def decimals(value: float) -> str:
    """0.123."""
    return f"{value:.3f}"


def points(value: float) -> str:
    """+0.12, with a true minus."""
    return minus(f"{value:+.2f}")


def signed(value: float, scale: float = 100) -> str:
    """+19.0, with a true minus."""
    return minus(f"{scale * value:+.1f}")


def plural(by: str | None) -> str:
    """What rows are called."""
    name = by or "group"
    return f"{name[:-1]}ies" if name.endswith("y") else f"{name}s"


def findings(kind: Numbers, by: str | None) -> list[str]:
    """What the numbers say, the most important first.

    Args:
        kind: Of one kind of score, from `measures.measure_all`.
        by: What the rows are.
    """
    rows = kind["groups"] or [kind["overall"]]
    sentences = [_accuracy(rows, by)]
    if kind["probability"]:
        sentences.append(_calibration(rows, by))
    sentences += [_ranking(rows), _relation(kind, by), _withholding(rows, by)]
    return [sentence for sentence in sentences if sentence]


def _accuracy(rows: list[Numbers], by: str | None) -> str:
    accuracy = [row["macro"]["accuracy"] for row in rows]
    if len(rows) == 1:
        row = rows[0]
        return f"{percent(accuracy[0])} of {row['answers']:,} answers are right."
    return f"Accuracy {_span(rows, accuracy, percent)}, over {len(rows)} {plural(by)}."


def _span(rows: list[Numbers], values: list[float], write: Callable[[float], str]) -> str:
    """From the lowest to the highest, and whose they are."""
    low, high = min(values), max(values)
    if write(low) == write(high):
        return f"is {write(low)} everywhere"
    lowest, highest = (rows[values.index(value)]["name"] for value in (low, high))
    return f"goes from {write(low)} ({lowest}) to {write(high)} ({highest})"


def _calibration(rows: list[Numbers], by: str | None) -> str:
    gaps = [row["metrics"]["gap"]["estimate"] for row in rows]
    errors = [row["metrics"]["ece"]["estimate"] for row in rows]
    if len(rows) == 1:
        confidence = percent(rows[0]["metrics"]["mean_confidence"]["estimate"])
        return (
            f"Mean confidence is {confidence}: {_verdict(gaps[0])}. Confidence misses accuracy by "
            f"{percent(errors[0])} on average (ECE {decimals(errors[0])})."
        )
    over = sum(gap > _CALIBRATED for gap in gaps)
    under = sum(gap < -_CALIBRATED for gap in gaps)
    lead = (
        f"Of {len(rows)} {plural(by)}, {over} {'is' if over == 1 else 'are'} over-confident and "
        f"{under} under-confident"
    )
    return (
        f"{lead} by more than {100 * _CALIBRATED:.0f} points; the calibration error "
        f"{_span(rows, errors, decimals)}."
    )


def _verdict(gap: float) -> str:
    if abs(gap) <= _CALIBRATED:
        return f"within {100 * _CALIBRATED:.0f} points of the accuracy"
    side = "over" if gap > 0 else "under"
    return f"{side}-confident by {100 * abs(gap):.1f} points"


def _ranking(rows: list[Numbers]) -> str:
    ranked = [row for row in rows if row["macro"]["auroc"] is not None]
    if not ranked:
        return "All answers are right, or all are wrong: there is nothing for confidence to tell apart."
    values = [row["macro"]["auroc"] for row in ranked]
    strata = sum(row["macro"]["ranked"] for row in ranked)
    significant = sum(row["macro"]["significant"] for row in ranked)
    if len(rows) == 1:
        tells = (
            f"A right answer has the higher confidence in {100 * values[0]:.0f} of 100 pairs of a right "
            f"and a wrong one (AUROC {decimals(values[0])})"
        )
    else:
        tells = (
            "Confidence tells right answers from wrong ones; the AUROC "
            f"{_span(ranked, values, decimals)}, and 0.5 is chance"
        )
    if strata == 1:
        return f"{tells}; that is {'' if significant else 'not '}significant (p < 0.0001)."
    return f"{tells}. It does so significantly (p < 0.0001) in {significant} of {strata} strata."


def _relation(kind: Numbers, by: str | None) -> str:
    relations = kind["relations"]
    names = {"auroc": "AUROC", "ece": "calibration error"}
    parts = [
        minus(f"with {names[key]} at r = {relation['r']:.2f}{_interval(relation)}")
        for key, relation in relations.items()
        if relation["r"] is not None
    ]
    if not parts:
        return ""
    n = next(iter(relations.values()))["n"]
    return f"Across {n} {plural(by)}, accuracy correlates {' and '.join(parts)}."


def _interval(relation: Numbers) -> str:
    if relation["low"] is None:
        return ""
    chance = relation["low"] <= 0 <= relation["high"]
    return (
        f" (95% interval {relation['low']:.2f} to {relation['high']:.2f}"
        f"{', so perhaps by chance' if chance else ''})"
    )


def _withholding(rows: list[Numbers], by: str | None) -> str:
    pairs = [(row, row["abstention"][-1]) for row in rows if row["abstention"][-1] is not None]
    if not pairs:
        return ""
    wrong, labels = pairs[0][1]["wrong"], pairs[0][1]["labels"]
    lead = (
        f"Where a wrong answer costs {wrong:g} points and a right one earns 1, withholding unsure "
        f"answers, by a threshold learned from {labels} labelled ones,"
    )
    if len(pairs) == 1:
        found = pairs[0][1]
        return (
            f"{lead} changes the points per question from {points(found['answer_all'])} to "
            f"{points(found['with_threshold'])}, with {percent(found['withheld'])} withheld."
        )
    better = sum(found["with_threshold"] > found["answer_all"] for _, found in pairs)
    return f"{lead} raises the points per question of {better} of {len(pairs)} {plural(by)}."
