"""`levelhead bench`: time and peak memory of head and loss, for a model's shapes on this machine."""

import argparse
import datetime
import json
import math
import os
import sys
import time
from dataclasses import asdict, replace
from typing import Any

import torch

import levelhead

from .. import memory
from ..arguments import DTYPES, add_dtype, add_model, count, share
from ..errors import CliError, WrongResultError, missing_extra
from ..plan.architecture import read_architecture
from ..plan.footprint import Problem
from .budget import choose
from .contest import LEFT_OUT, LEVELHEAD, LOSSES, OUT_OF_MEMORY, Outcome, compete, operand_bytes

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
_SECONDS = 45.0  # of a minute; Python and torch take the rest before and after
_FORETOLD = 0.9  # the share of what is left that all runs may take, by what is foretold of them


def add_parser(verbs: Any) -> None:
    """Adds `bench` to the verbs of the command."""
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
    """Measures and says.

    Raises:
        CliError: The shapes are not given, the model cannot be read, its head does not fit, or a package is missing.
        WrongResultError: Levelhead fails, or computes something wrong.
    """
    if not arguments.json:  # what is missing is said before a minute has passed
        try:
            from .report import show
        except ModuleNotFoundError as error:
            raise missing_extra(error, "cli", {"rich"}) from error
    end = time.monotonic() + _SECONDS
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    hidden, vocabulary = _shape(arguments)
    one = Problem(1, hidden, vocabulary, DTYPES[arguments.dtype], device=device.type)
    free = memory.free(device)
    if operand_bytes(one) > free:
        raise CliError(
            f"a head of {vocabulary} x {hidden} and its gradient need {operand_bytes(one) / 2**30:.1f} GiB for this, "
            f"{free / 2**30:.1f} GiB are free; try --dtype bf16 or a smaller model"
        )
    if arguments.tokens is None:
        left = _FORETOLD * (end - time.monotonic())
        tokens, methods, why = choose(one, arguments.smoothing, free, left)
    else:
        tokens, methods, why, end = arguments.tokens, LOSSES, "asked for", math.inf
    problem = replace(one, tokens=tokens)
    left = free - operand_bytes(problem)
    if left <= 0:
        raise CliError(
            f"{tokens} tokens and the head need {operand_bytes(problem) / 2**30:.1f} GiB before any loss, "
            f"{free / 2**30:.1f} GiB are free; give fewer --tokens"
        )
    rows = compete(problem, arguments.smoothing, methods, free=left, end=end)
    facts = {
        "model": arguments.model,
        "hidden": hidden,
        "vocabulary": vocabulary,
        "tokens": tokens,
        "tokens_are": why,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "smoothing": arguments.smoothing,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "levelhead": levelhead.__version__,
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if arguments.json:
        content = facts | {"rows": [asdict(row) for row in rows]}
        sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
    else:
        show(facts, rows)
    _complain(rows)


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


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {os.cpu_count()} cores"


def _complain(rows: list[Outcome]) -> None:
    """Raises if levelhead, which must always run where it fits, failed."""
    failed = [
        f"{row.mode}: {row.failure}"
        for row in rows
        if row.method == LEVELHEAD
        and row.failure
        and not row.failure.startswith((OUT_OF_MEMORY, LEFT_OUT))
    ]
    if failed:
        raise WrongResultError(
            f"levelhead fails on this machine ({'; '.join(failed)}); do not train with it. Please report it, "
            "with what `levelhead doctor` says"
        )
