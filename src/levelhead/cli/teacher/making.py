"""`levelhead teacher` from end to end: the tokens, the shards, the recalibration, the manifest."""

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape

import levelhead
from levelhead.objectives import recalibrate

from ..errors import CliError
from ..models import load_model, load_tokenizer
from ..output import changed_settings, make_folder
from ..progress import progress_bar
from ..sft.preparation import Counts, prepare
from ..sft.tokens import Collator, encode
from ..sources import open_source
from .forcing import Forcing
from .report import notes, table
from .store import (
    FORMAT,
    MANIFEST,
    ROWS,
    finished_shard,
    vocabulary_digest,
    write_atomically,
    write_shard,
)

_SETTINGS = "settings.json"
_RECALIBRATION = "recalibration.json"


def make_store(arguments: argparse.Namespace) -> None:
    """Makes the store as the command line says, or what is missing of it.

    Raises:
        CliError: An argument or the data cannot be used, the model is refused, or the store was
            begun with other settings.
    """
    if arguments.validation and arguments.top_k < 2:
        raise CliError("one probability leaves nothing to recalibrate; use --top-k 2 or more")
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    console = Console(quiet=rank != 0)
    tokenizer = load_tokenizer(
        arguments.model, arguments.chat_template, trust_remote_code=arguments.trust_remote_code
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with console.status("Reading the data"):
            tables, counts = _prepare(arguments, tokenizer, Path(folder))
        settings = _settings(arguments, tokenizer, counts)
        make_folder(arguments.output)
        _check_settings(arguments.output, settings, rank)
        force = _forcing(arguments, tokenizer)
        shards = range(-(-counts["data"].rows // ROWS))
        with progress_bar(console, unit="shards") as progress:
            mine = shards[rank::processes]
            bar = progress.add_task("teacher", total=len(mine))
            for number in mine:
                if finished_shard(arguments.output, number) is None:
                    last = min((number + 1) * ROWS, counts["data"].rows)
                    batches = force(tables["data"], range(number * ROWS, last))
                    write_shard(arguments.output, number, batches)
                progress.advance(bar)
        if arguments.validation and rank == 0:
            with console.status("Recalibrating"):
                _recalibrate(arguments, force, tables["validation"])
    if manifest := _finish(arguments, settings, len(shards), rank):
        console = Console()
        console.print(table(manifest), notes(manifest), sep="\n")
        console.print(f"Store: [bold]{escape(str(arguments.output))}[/]", soft_wrap=True)


def _prepare(
    arguments: argparse.Namespace, tokenizer: Any, folder: Path
) -> tuple[dict[str, Dataset], dict[str, Counts]]:
    """The tables "data" and, if asked for, "validation"."""
    sources = {"data": (arguments.data, arguments.dataset_split)}
    if arguments.validation:
        sources["validation"] = (arguments.validation, arguments.validation_split)
    counts = {
        name: prepare(
            open_source(data, arguments.dataset_config, split),
            lambda example: encode(example, tokenizer),
            max_length=arguments.max_length,
            path=folder / name,
        )
        for name, (data, split) in sources.items()
    }
    return {name: Dataset.from_file(str(folder / name)) for name in sources}, counts


def _settings(
    arguments: argparse.Namespace, tokenizer: Any, counts: dict[str, Counts]
) -> dict[str, Any]:
    """What the probabilities in the store depend on, and what a student must have in common."""
    return {
        "format": FORMAT,
        "model": arguments.model,
        "data": arguments.data,
        "k": arguments.top_k,
        "max_length": arguments.max_length,
        "dtype": "bfloat16" if arguments.bf16 else "float32",
        "rows": counts["data"].rows,
        "vocabulary": vocabulary_digest(tokenizer),
        "tokens": counts["data"].digest,
    }


def _check_settings(folder: Path, settings: dict[str, Any], rank: int) -> None:
    """Refuses a folder that holds anything but a store begun with these settings."""
    path = folder / _SETTINGS
    if not path.exists():
        others = [entry.name for entry in folder.iterdir() if not entry.name.startswith(_SETTINGS)]
        if others and not path.exists():  # which another process may have begun in the meantime
            raise CliError(
                f"{folder} holds files that are not of a store ({others[0]}); name an empty folder "
                "with --output"
            )
        write_atomically(path, settings, part=str(rank))
        return
    changed = changed_settings(path, settings)
    if changed:
        raise CliError(
            f"{folder} was begun with other settings, and its parts would not be of one teacher; "
            f"name another folder with --output. Changed: {changed}"
        )


def _forcing(arguments: argparse.Namespace, tokenizer: Any) -> Forcing:
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator() or device
        device = torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))
    torch.manual_seed(42)  # of the tiny one, whose weights are random: all processes have the same
    model = load_model(
        arguments.model,
        torch.bfloat16 if arguments.bf16 else torch.float32,
        trust_remote_code=arguments.trust_remote_code,
    )
    collator = Collator(tokenizer.pad_token_id or 0)
    return Forcing(model.to(device), arguments.top_k, collator, arguments.batch_size)


def _recalibrate(arguments: argparse.Namespace, force: Forcing, data: Dataset) -> None:
    path = arguments.output / _RECALIBRATION
    forced = [row for batch in force(data, range(len(data))) for row in batch]
    found = recalibrate(
        torch.cat([row.log_probs for row, _ in forced]),
        torch.cat([right for _, right in forced]),
        method=arguments.recalibrate,
    )
    write_atomically(path, asdict(found))


def _finish(
    arguments: argparse.Namespace, settings: dict[str, Any], shards: int, rank: int
) -> dict[str, Any] | None:
    """Writes the manifest if nothing is missing; the last process to end does, whichever it is."""
    described = [finished_shard(arguments.output, number) for number in range(shards)]
    found = arguments.output / _RECALIBRATION
    if None in described or (arguments.validation and not found.exists()):
        return None
    manifest = settings | {
        "levelhead": levelhead.__version__,
        "positions": sum(shard.positions for shard in described if shard),
        "recalibration": json.loads(found.read_text()) if found.exists() else None,
        "shards": [asdict(shard) for shard in described if shard],
    }
    write_atomically(arguments.output / MANIFEST, manifest, part=str(rank))
    return manifest
