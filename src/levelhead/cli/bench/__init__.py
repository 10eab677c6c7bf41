"""`levelhead bench`: time and peak memory of head and loss, for a model's shapes on this machine."""

import argparse
import datetime
import json
import sys
from dataclasses import asdict
from typing import Any

import torch

import levelhead
from levelhead.measure.bench import Bench, bench

from ..arguments import DTYPES, add_dtype, add_model, count, share
from ..errors import CliError, WrongResultError, missing_extra
from ..plan.architecture import read_architecture

_DESCRIPTION = """\
Measures on this machine what the output head and its loss take, for the shapes of a model: time,
and peak memory beyond inputs and gradients, of PyTorch's dense loss, its fused one (torch >= 2.13)
and Levelhead. First each result is checked; then the methods take turns, so that a bad moment of
the machine hits all of them. Reads a model's config, never its weights: the numbers are random.

It takes under a minute: for a large head or on a slow machine there are fewer rounds, then fewer
tokens; then the fused loss, the frozen head and peaks are left out, and the table says which.
"""
_EPILOG = """\
examples:
  levelhead bench tiny
  levelhead bench Qwen/Qwen2.5-0.5B --dtype bf16
  levelhead bench --hidden 4096 --vocabulary 128256 --tokens 64 --json

exit codes:
  0    done
  1    levelhead computes something wrong on this machine
  2    wrong arguments or unusable input; stderr says which
"""


def add_parser(verbs: Any) -> None:
    """Add `bench` to the verbs of the command."""
    parser = verbs.add_parser(
        "bench",
        help="measure time and memory of a model's head on this machine, in under a minute",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser, optional=True)
    parser.add_argument("--hidden", type=count, metavar="D", help="width of the head's input")
    parser.add_argument("--vocabulary", type=count, metavar="V", help="rows of the head")
    parser.add_argument(
        "--tokens",
        type=count,
        metavar="N",
        help="measure N tokens, however long it takes (default: what fits the minute and the memory)",
    )
    add_dtype(parser, "fp32")
    parser.add_argument(
        "--smoothing",
        type=share,
        default=0.1,
        metavar="EPS",
        help="label smoothing (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        CliError: The shapes are not given, the model cannot be read, its head does not fit, or a package is missing.
        WrongResultError: Levelhead fails, or computes something wrong.
    """
    if not arguments.json:  # say what is missing before a minute has passed
        try:
            from .report import show
        except ModuleNotFoundError as error:
            raise missing_extra(error, "cli", {"rich"}) from error
    hidden, vocabulary = _shape(arguments)
    try:
        found = bench(
            hidden,
            vocabulary,
            DTYPES[arguments.dtype],
            tokens=arguments.tokens,
            smoothing=arguments.smoothing,
        )
    except ValueError as error:
        raise CliError(str(error)) from error
    if arguments.json:
        sys.stdout.write(
            json.dumps(_content(arguments.model, found), indent=2, allow_nan=False) + "\n"
        )
    else:
        show(arguments.model, found)
    if found.faults:
        raise WrongResultError(
            f"levelhead fails on this machine ({'; '.join(found.faults)}); do not train with it. Please report it, "
            "with what `levelhead doctor` says"
        )


def _content(model: str | None, found: Bench) -> dict[str, Any]:
    """Return what --json prints."""
    problem = found.problem
    return {
        "model": model,
        "hidden": problem.hidden,
        "vocabulary": problem.vocabulary,
        "tokens": problem.tokens,
        "tokens_are": found.tokens_are,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "smoothing": found.smoothing,
        "device": found.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "levelhead": levelhead.__version__,
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": [asdict(row) for row in found.rows],
    }


def _shape(arguments: argparse.Namespace) -> tuple[int, int]:
    """Width and rows of the head."""
    given = arguments.hidden, arguments.vocabulary
    if arguments.model is not None and given == (None, None):
        architecture = read_architecture(
            arguments.model, torch.bfloat16, trust_remote_code=arguments.trust_remote_code
        )
        return architecture.hidden, architecture.vocabulary
    if arguments.model is not None or None in given:
        raise CliError(
            "give either a MODEL (a name on the hub, a folder, or tiny) or both --hidden and --vocabulary"
        )
    return given
