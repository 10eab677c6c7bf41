"""What a reader must know besides the numbers: where they come from, and what each is."""

from typing import Any

from . import harness
from .abstention import SPLITS
from .answers import Answers
from .columns import EMPTY, NO_PROBABILITIES
from .layout import Layout
from .measures import Settings
from .reading import FILE, KIND, Reading

Numbers = dict[str, Any]


def title(reading: Reading) -> str:
    """Whose answers these are, if they are one's."""
    model = reading.constants.get("model")
    return f"Calibration of {model}" if model else "Calibration report"


def subtitle(reading: Reading, answers: Answers, plan: Layout) -> str:
    """How many answers, by what."""
    counted = f"{len(answers):,} graded answers"
    groups = [name for name in (plan.by, *plan.within) if name in answers.columns]
    sizes = [f"{name} ({len(answers.values(name))})" for name in groups if name]
    constants = [
        f"{name} {value}"
        for name, value in reading.constants.items()
        if name not in ("model", FILE, KIND, "filter", *groups) and value != EMPTY
    ]
    return "; ".join([counted, *([f"by {', '.join(sizes)}"] if sizes else []), *constants])


def notes(reading: Reading, scores: dict[str, Numbers], plan: Layout) -> list[str]:
    """What is special about these answers."""
    said = []
    if reading.from_harness:
        said.append(f"Confidence is the {harness.CONFIDENCE}: largest probability among them.")
    for name, kind in scores.items():
        if not kind["probability"]:
            hundred = kind["lowest"] >= 0 and 1 < kind["highest"] <= 100
            hundred = hundred and name not in NO_PROBABILITIES
            said.append(
                f"{name} goes from {kind['lowest']:g} to {kind['highest']:g} and is no "
                "probability: it is ranked (AUROC, withholding), not judged for calibration."
                + (" If these are percentages, divide by 100." if hundred else "")
            )
    if plan.within:
        said.append(
            f"Accuracy and AUROC are means over the strata ({' × '.join(plan.within)}) of a row; "
            "confidence and calibration errors pool its answers. So do all measures further down."
        )
        unranked = sum(
            row["macro"]["strata"] - row["macro"]["ranked"]
            for row in next(iter(scores.values()))["groups"]
        )
        if unranked:
            said.append(f"{unranked} strata with only right or only wrong answers have no AUROC.")
    first = next(iter(scores.values()))
    if any(found is None for row in first["groups"] for found in row["abstention"]):
        said.append(
            "Where a stratum has too few answers to label some and judge by others, no threshold was learned."
        )
    return said


def definitions(settings: Settings) -> dict[str, str]:
    """What the measures are."""
    bins = settings.bins
    return {
        "ECE": f"Expected calibration error: {bins} bins of equal width on [0, 1], the last one closed; "
        "the mean of |accuracy less mean confidence| over bins, weighted by their answers. 0 is perfect.",
        "smooth ECE": "The same without bins, smoothed by a kernel (Błasiok and Nakkiran 2024).",
        "RMS error, largest gap": "Over the same bins, the root of the mean square, and the maximum.",
        "Brier, NLL": "Proper scores of confidence as a forecast of being right: mean squared error, "
        "and mean negative log-likelihood in nats. Lower is better.",
        "AUROC": "The probability that a right answer has a higher confidence than a wrong one; ties "
        "count half. 0.5 is chance, 1 perfect. It does not depend on calibration.",
        "p": "Two-sided Mann-Whitney test of right against wrong answers, for each stratum.",
        "AURC": "Area under the risk-coverage curve: the mean share of wrong answers among the surest "
        "k, over all k. Lower is better.",
        "points per question": f"+1 for a right answer, 0 for a withheld one, minus the cost of a wrong one. "
        f"The threshold is the best on {settings.labels} answers with known outcome, spread over the "
        f"strata; points are those of all other answers, means over {SPLITS} random "
        "choices of the labelled ones, with the lowest and the highest in brackets.",
        "95% interval": "Percentile bootstrap over answers, 1000 resamples; answers count as independent.",
        "r": "Pearson's correlation over the rows of the table, with a 95% interval by Fisher's "
        "transformation where there are four or more.",
    }
