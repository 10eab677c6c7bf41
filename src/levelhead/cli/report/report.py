"""The whole report: read, measure, write, print."""

import argparse
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import levelhead
from levelhead.measure.memory import return_freed

from ..output import make_folder
from .answers import Answers, in_one_block
from .comparison import compared, comparison
from .layout import Layout, layout
from .measures import Settings, measure_all
from .notes import definitions, notes, subtitle, title
from .reading import KIND, Choice, Reading, read
from .terminal import show

_DEFAULT = Path("levelhead-report")
_LARGE = 1 << 20  # bytes: the columns of a chunk of rows

Numbers = dict[str, Any]


def report(arguments: argparse.Namespace) -> None:
    """Runs the verb.

    Raises:
        CliError: As `levelhead.cli.report.run`.
    """
    # Many small steps: on a busy machine threads that wait for one another take five times as long.
    torch.set_num_threads(1)
    with suppress(AttributeError, OSError, TypeError):  # another libc has its own ways
        return_freed(_LARGE)
    output = arguments.output or (None if arguments.json else _DEFAULT)
    if output is not None:
        make_folder(output)
    results = _results(arguments)
    if output is not None:
        # Only now, when the answers are gone: matplotlib takes 33 MiB.
        from .writing import write

        write(results, output)
    if arguments.json:
        Console(soft_wrap=True, highlight=False, markup=False).print(
            json.dumps(results, indent=2, allow_nan=False)
        )
    else:
        show(results, output)


def _results(arguments: argparse.Namespace) -> Numbers:
    settings = Settings(arguments.bins, arguments.labels, arguments.seed)
    groups = tuple(dict.fromkeys([*filter(None, [arguments.by]), *arguments.within]))
    reading = read(
        arguments.files,
        Choice(
            arguments.confidence,
            arguments.correct,
            groups,
            tuple(arguments.where),
            questions=arguments.compare is not None or len(arguments.files) == 2,
        ),
    )
    plan = layout(reading.cells.columns, arguments.by, tuple(arguments.within))
    first = [KIND] if KIND in reading.cells.columns else []
    first += [plan.by] if plan.by else []
    answers = in_one_block(reading.cells, [*first, *plan.within])
    names = compared(answers, plan.by, arguments.compare)
    return {
        "levelhead": levelhead.__version__,
        "files": [str(path) for path in arguments.files],
        "answers": len(answers),
        "title": title(reading),
        "subtitle": subtitle(reading, answers, plan),
        "by": plan.by,
        "within": list(plan.within),
        "where": [f"{column}={value}" for column, value in arguments.where],
        "settings": vars(settings),
        "constants": reading.constants,
        **_measured(reading, answers, plan, settings, names),
    }


def _measured(
    reading: Reading,
    answers: Answers,
    plan: Layout,
    settings: Settings,
    names: list[str],
) -> Numbers:
    kind = reading.constants.get(KIND, reading.confidence)
    scores = measure_all(answers, kind, plan, settings)
    # A probability can be judged in full, so it comes first.
    scores = dict(sorted(scores.items(), key=lambda item: not item[1]["probability"]))
    main = next(iter(scores))
    if KIND in answers.columns:
        answers = answers.split([KIND])[(main,)]
    return {
        "scores": scores,
        "comparison": comparison(scores[main], answers, plan.by, names, settings)
        if plan.by and names
        else None,
        "notes": notes(reading, scores, plan),
        "definitions": definitions(settings),
    }
