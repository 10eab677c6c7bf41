"""Two runs compared: differences of their measures, with intervals."""

from typing import Any

import numpy
import torch
from torch import Tensor

from levelhead.calibration import Interval, compare
from levelhead.calibration.bootstrap import METRICS, RANKING_METRICS

from ..errors import CliError
from .answers import Answers
from .cells import Key
from .measures import Numbers, Settings, as_numbers
from .reading import FILE

Run = tuple[Tensor, Tensor]


def compared(answers: Answers, by: str | None, names: list[str] | None) -> list[str]:
    """The names of the two rows to compare; [] if there is nothing to compare.

    Args:
        answers: All of them.
        by: What the rows are.
        names: As the user said; None compares if there are just two rows.

    Raises:
        CliError: They are not names of two rows.
    """
    rows = answers.values(by) if by in answers.columns else []
    if names is None:
        return rows if len(rows) == 2 else []
    for name in names:
        if name not in rows:
            have = ", ".join(map(repr, rows)) if rows else "none, as there is no group"
            raise CliError(f"--compare: there is no row {name!r}; rows are {have}. See --by")
    if names[0] == names[1]:
        raise CliError(f"--compare: {names[0]!r} twice; name two rows")
    return names


def comparison(
    kind: Numbers, answers: Answers, by: str, names: list[str], settings: Settings
) -> Numbers | None:
    """The comparison of two rows of the main table.

    Args:
        kind: What was measured of these answers.
        answers: Of one kind of score.
        by: What the rows are.
        names: Of the two rows.
        settings: As for what was measured.

    Returns:
        None if one of them has no answers of this kind.
    """
    rows = {key[0]: part for key, part in answers.split([by]).items()}
    if not all(name in rows for name in names):
        return None
    runs, how = _matched(rows[names[0]], rows[names[1]], [by, FILE])
    differences = compare(
        *runs,
        paired=how.startswith("Paired"),
        bins=settings.bins,
        metrics=METRICS if kind["probability"] else RANKING_METRICS,
        seed=settings.seed,
    )
    return {
        "first": names[0],
        "second": names[1],
        "how": how,
        "metrics": _table(kind, names, differences),
    }


def _table(kind: Numbers, names: list[str], differences: dict[str, Interval]) -> Numbers:
    measured = {row["name"]: row["metrics"] for row in kind["groups"]}
    return {
        name: {
            "first": measured[names[0]][name],
            "second": measured[names[1]][name],
            "difference": as_numbers(difference),
        }
        for name, difference in differences.items()
    }


def _matched(first: Answers, second: Answers, apart: list[Any]) -> tuple[tuple[Run, Run], str]:
    """Both runs, question by question if both answered the same ones; and how they were compared."""
    runs = first.tensors(), second.tensors()
    counts = len(first), len(second)
    if first.question is None:
        return (
            runs,
            "Not paired: no column says which question was answered (question_id, doc_id, id).",
        )
    strata: dict[Key, int] = {}
    keys = [_keys(run, apart, strata) for run in (first, second)]
    if any(len(numpy.unique(key, axis=0)) < len(key) for key in keys):
        return runs, "Not paired: a question comes more than once in a run."
    orders = [numpy.lexsort(key.T) for key in keys]
    if counts[0] != counts[1] or not numpy.array_equal(keys[0][orders[0]], keys[1][orders[1]]):
        return (
            runs,
            f"Not paired: the runs answered different questions ({counts[0]:,} and {counts[1]:,}).",
        )
    sorted_runs = [
        (score[torch.from_numpy(order)], correct[torch.from_numpy(order)])
        for (score, correct), order in zip(runs, orders, strict=True)
    ]
    return (
        sorted_runs[0],
        sorted_runs[1],
    ), f"Paired: both runs answered the same {counts[0]:,} questions."


def _keys(run: Answers, apart: list[Any], known: dict[Key, int]) -> Any:
    """Question and stratum of each answer, (N, 2), in the order of the answers."""
    within = [i for i, column in enumerate(run.columns) if column not in apart]
    parts = []
    for key, span in run.spans.items():
        stratum = known.setdefault(tuple(key[i] for i in within), len(known))
        questions = run.question[span]  # type: ignore[index]
        parts.append(torch.stack([questions, torch.full_like(questions, stratum)], 1))
    return torch.cat(parts).numpy()
