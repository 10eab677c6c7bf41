"""Recording a teacher's top-k: the tokens, the pass, the shards, the recalibration, the manifest."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

import levelhead
from levelhead.heads.head import Head, head_input, single_head
from levelhead.objectives import Recalibration, recalibrate
from levelhead.ops import linear_topk
from levelhead.ops.checks import IGNORE_INDEX

from ..errors import CliError
from ..examples import Collator, Counts, read_examples
from ..models import load_model, load_tokenizer
from ..output import changed_settings, make_folder
from ..progress import main_console, progress_bar
from ..sources import open_source
from .options import Options
from .store import (
    FORMAT,
    MANIFEST,
    ROWS,
    Manifest,
    Prediction,
    Row,
    Settings,
    finished_shard,
    vocabulary_digest,
    write_atomically,
    write_shard,
)

_SETTINGS = "settings.json"
_RECALIBRATION = "recalibration.json"


def record(options: Options) -> Manifest | None:
    """Make the store, or what is missing of it, together with the other processes of a launcher.

    Returns:
        Its manifest; None if another process has not done its share yet.

    Raises:
        CliError: An option or the data cannot be used, the model is refused, or the store was
            begun with other settings.
    """
    if options.validation and options.top_k < 2:
        raise CliError("one probability leaves nothing to recalibrate; use --top-k 2 or more")
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    console = main_console()
    tokenizer = load_tokenizer(
        options.model, options.chat_template, trust_remote_code=options.trust_remote_code
    )
    with console.status("Reading the data"):
        data, counts = _read(options, options.data, options.dataset_split, tokenizer)
        if options.validation:
            held_out, _ = _read(options, options.validation, options.validation_split, tokenizer)
    settings = _settings(options, tokenizer, counts)
    make_folder(options.output)
    _check_settings(options.output, settings, rank)
    teacher = _Teacher(options, padding=tokenizer.pad_token_id or 0)
    shards = range(-(-counts.rows // ROWS))
    with progress_bar(console, unit="shards") as progress:
        for number in progress.track(shards[rank::processes], description="teacher"):
            if finished_shard(options.output, number) is None:
                rows = range(number * ROWS, min((number + 1) * ROWS, counts.rows))
                write_shard(options.output, number, teacher.predictions(data, rows))
    if options.validation and rank == 0:
        with console.status("Recalibrating"):
            predictions = [
                prediction
                for batch in teacher.predictions(held_out, range(len(held_out)))
                for prediction in batch
            ]
            found = recalibrate(
                torch.cat([prediction.row.log_probs for prediction in predictions]),
                torch.cat([prediction.correct for prediction in predictions]),
                method=options.recalibrate,
            )
            write_atomically(options.output / _RECALIBRATION, asdict(found))
    return _finish(options, settings, len(shards), rank)


def _read(options: Options, data: str, split: str, tokenizer: Any) -> tuple[Dataset, Counts]:
    source = open_source(data, options.dataset_config, split)
    return read_examples(source, tokenizer, max_length=options.max_length)


def _settings(options: Options, tokenizer: Any, counts: Counts) -> Settings:
    return Settings(
        format=FORMAT,
        model=options.model,
        data=options.data,
        k=options.top_k,
        max_length=options.max_length,
        dtype="bfloat16" if options.bf16 else "float32",
        rows=counts.rows,
        vocabulary=vocabulary_digest(tokenizer),
        tokens=counts.digest,
    )


def _check_settings(folder: Path, settings: Settings, rank: int) -> None:
    """Refuse a folder that holds anything but a store begun with these settings."""
    path = folder / _SETTINGS
    if not path.exists():
        others = [entry.name for entry in folder.iterdir() if not entry.name.startswith(_SETTINGS)]
        if others and not path.exists():  # which another process may have begun in the meantime
            raise CliError(
                f"{folder} holds files that are not of a store ({others[0]}); name an empty folder "
                "with --output"
            )
        write_atomically(path, asdict(settings), part=str(rank))
        return
    changed = changed_settings(path, asdict(settings))
    if changed:
        raise CliError(
            f"{folder} was begun with other settings, and its parts would not be of one teacher; "
            f"name another folder with --output. Changed: {changed}"
        )


class _Teacher:
    """A model whose k largest probabilities are read off batches of Tokens, without any logits.

    Raises:
        CliError: The model is no causal language model with a plain head, or k is more than it
            has tokens.
    """

    def __init__(self, options: Options, *, padding: int) -> None:
        device = torch.device("cpu")
        if torch.accelerator.is_available():
            found = torch.accelerator.current_accelerator() or device
            device = torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.manual_seed(42)  # tiny has random weights: all processes have the same
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        model = load_model(options.model, dtype, trust_remote_code=options.trust_remote_code)
        self._model: nn.Module = model.to(device)
        self._head = _causal_head(self._model)
        if options.top_k > len(self._head.weight):
            raise CliError(
                f"--top-k {options.top_k} is more than the teacher's {len(self._head.weight)} tokens"
            )
        self._k = options.top_k
        self._batch_size = options.batch_size
        self._collator = Collator(padding)

    def predictions(self, table: Dataset, numbers: Sequence[int]) -> Iterator[list[Prediction]]:
        """Yield batches of predictions for the rows of `table` with these numbers, in their order.

        Raises:
            CliError: A probability is not a number.
        """
        for start in range(0, len(numbers), self._batch_size):
            yield self._batch(table, numbers[start : start + self._batch_size])

    def _batch(self, table: Dataset, numbers: Sequence[int]) -> list[Prediction]:
        batch = self._collator([table[number] for number in numbers])
        target = batch.pop("labels")[:, 1:]
        counts = target != IGNORE_INDEX
        hidden = head_input(self._model, batch)[:, :-1]
        top = linear_topk(
            hidden[counts.to(hidden.device)],
            self._head.weight,
            self._k,
            linear_bias=self._head.bias,
            softcap=self._head.transform.softcap,
            logit_scale=self._head.transform.logit_scale,
        )
        ids, log_probs = top.indices.cpu(), top.log_probs.float().cpu()
        correct = ids[:, 0] == target[counts]
        sizes = counts.sum(1).tolist()
        parts = (torch.split(tensor, sizes) for tensor in (ids, log_probs, correct))
        predictions = [Prediction(Row(i, p), right) for i, p, right in zip(*parts, strict=True)]
        for number, (row, _) in zip(numbers, predictions, strict=True):
            if row.log_probs.isnan().any():
                raise CliError(
                    f"the teacher's probabilities of row {number + 1} are not numbers; a model that "
                    "was trained in bfloat16 may overflow in another dtype: try --bf16"
                )
        return predictions


def _causal_head(model: nn.Module) -> Head:
    try:
        head = single_head(model)
    except ValueError as error:
        raise CliError(str(error)) from error
    if not head.transform.shift:
        raise CliError(
            f"{type(model).__name__} predicts the label of a position at that position; a "
            "teacher must be a causal language model"
        )
    return head


def _finish(options: Options, settings: Settings, count: int, rank: int) -> Manifest | None:
    """Write the manifest if nothing is missing; the last process to end does, whichever it is."""
    shards = [shard for n in range(count) if (shard := finished_shard(options.output, n))]
    found = options.output / _RECALIBRATION
    if len(shards) < count or (options.validation and not found.exists()):
        return None
    manifest = Manifest(
        **vars(settings),
        levelhead=levelhead.__version__,
        positions=sum(shard.positions for shard in shards),
        recalibration=Recalibration(**json.loads(found.read_text())) if found.exists() else None,
        shards=shards,
    )
    write_atomically(options.output / MANIFEST, asdict(manifest), part=str(rank))
    return manifest


def show(manifest: Manifest, folder: Path) -> None:
    """Print what is in a finished store."""
    shards, positions = manifest.shards, manifest.positions
    size = sum(shard.bytes for shard in shards)
    title = f"{manifest.rows:,} rows, {positions:,} positions"
    view = Table(title=title, title_justify="left", show_header=False)
    view.add_row("bytes per position", f"{size / positions:.1f}")
    view.add_row("size (MiB)", f"{size / 2**20:,.1f}")
    mass = sum(shard.mass for shard in shards) / positions
    view.add_row(f"probability of the {manifest.k} most likely", f"{mass:.4f}")
    accuracy = sum(shard.correct for shard in shards) / positions
    view.add_row("accuracy on this data", f"{accuracy:.4f}")
    if found := manifest.recalibration:
        view.add_section()
        view.add_row("held-out predictions", f"{found.positions:,}")
        view.add_row("accuracy on them", f"{found.accuracy:.4f}")
        view.add_row("calibration error", f"{found.ece_before:.4f}")
        view.add_row(f"{found.method} chosen", f"{found.value:.2f}")
        view.add_row("calibration error with it", f"{found.ece_after:.4f}")
    console = Console()
    console.print(view, _notes(found), sep="\n")
    console.print(f"Store: [bold]{escape(str(folder))}[/]", soft_wrap=True)


def _notes(found: Recalibration | None) -> str:
    """Return what the table shows exactly, to be printed below it."""
    if found is None:
        return "Not recalibrated; the same command with --validation DATA does it."
    curve = "  ".join(f"{value:.2f}: {error:.4f}" for value, error in found.curve)
    worse = "\nNone is better than the teacher's own probabilities: use sft --raw-teacher."
    return (
        "The calibration error is the expected one of the most likely token, in 10 bins of equal "
        f"width. For each {found.method} that was tried:\n{curve}"
        f"{worse if found.ece_after >= found.ece_before else ''}"
    )
