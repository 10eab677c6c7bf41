"""`levelhead temperature` from end to end."""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import levelhead
from levelhead.calibration import calibration_error
from levelhead.heads.head import Head, HeadInputs, collect, single_head
from levelhead.heads.temperature import apply_temperature, fit_temperature

from ..errors import CliError
from ..output import make_folder, write_json
from ..reading import batches, read_model, read_rows, read_tokenizer

_BINS = 10  # of the calibration error
_WAYS = {
    "logit_scale": "a logit scale in its config: all that use its logits are served",
    "head": "the weights of its head: all that use its logits are served",
    "final_norm": "the weights of its final norm, as its head is tied: all that use its logits are "
    "served, and its last hidden states are divided too",
    "generation_config": "its generation config, which serves sampling alone: its probabilities "
    "are as they were",
}


def calibrate(arguments: argparse.Namespace) -> None:
    """Fits on one half of the data, reports on the other, writes the model.

    Raises:
        CliError: The model or the data cannot be used; nothing was written.
    """
    console, output = Console(), arguments.output
    made = not output.exists()
    make_folder(output)
    if any(output.iterdir()):
        raise CliError(f"{output} is not empty; name an empty folder with --output")
    try:
        with console.status("Reading"):
            model, tokenizer, summary = _calibrated(arguments)
        _write(model, tokenizer, summary, output)
    except CliError:
        if made:
            with suppress(OSError):
                output.rmdir()  # if nothing is in it
        raise
    console.print(_table(summary))
    console.print(
        f"Temperature [bold]{summary['temperature']:.4f}[/], fitted on "
        f"{summary['tokens']['fit']:,} tokens, is in {_WAYS[summary['applied_to']]}."
    )
    console.print(f"Model: [bold]{escape(str(output))}[/]", soft_wrap=True)


def _calibrated(arguments: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """The model with its temperature, its tokenizer, and what goes into summary.json."""
    tokenizer = read_tokenizer(arguments)
    rows = read_rows(arguments, tokenizer)
    if len(rows) < 2:
        raise CliError(
            f"{arguments.data} gives one row, but one is needed to fit on and another to report "
            "on; give more rows, or cut a text into smaller pieces with --max-length"
        )
    model = read_model(arguments)
    halves = (rows.select(range(first, len(rows), 2)) for first in (0, 1))
    try:
        head = single_head(model)
        fitted_on, reported_on = (
            collect(model, batches(half, arguments, tokenizer), max_tokens=arguments.max_tokens)
            for half in halves
        )
        temperature = fit_temperature(head, fitted_on)
        before, after = (_measures(head, reported_on, t) for t in (1.0, temperature))
        way = apply_temperature(model, temperature)
    except ValueError as error:
        raise CliError(str(error)) from error
    summary = {
        "levelhead": levelhead.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": arguments.model,
        "data": arguments.data,
        "seed": arguments.seed,
        "temperature": temperature,
        "applied_to": way,
        "tokens": {"fit": len(fitted_on.target), "report": len(reported_on.target)},
        "before": before,
        "after": after,
        "bins": _BINS,
    }
    return model, tokenizer, summary


def _write(model: Any, tokenizer: Any, summary: dict[str, Any], folder: Path) -> None:
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "summary.json", summary)
    except (OSError, ValueError) as error:  # transformers refuses generation configs at odds
        raise CliError(f"cannot write the model to {folder}: {error}") from error


def _measures(head: Head, inputs: HeadInputs, temperature: float) -> dict[str, float]:
    """Negative log-likelihood, calibration and accuracy of tokens at a temperature."""
    with torch.no_grad():
        stats = head.logit_stats(inputs.hidden, inputs.target, temperature)
    confidence = stats.confidence.double()
    correct = stats.argmax == inputs.target
    return {
        "nll": -stats.log_probs.double().mean().item(),
        "calibration_error": calibration_error(confidence, correct, bins=_BINS),
        "mean_confidence": confidence.mean().item(),
        "accuracy": correct.double().mean().item(),
    }


def _table(summary: dict[str, Any]) -> Table:
    labels = {
        "nll": "negative log-likelihood (nats)",
        "calibration_error": f"expected calibration error ({_BINS} bins)",
        "mean_confidence": "mean confidence",
        "accuracy": "accuracy",
    }
    title = f"{summary['tokens']['report']:,} tokens that were not fitted on"
    table = Table("", "before", "after", title=title, title_justify="left")
    for name, label in labels.items():
        cells = (f"{summary[when][name]:.4f}" for when in ("before", "after"))
        table.add_row(label, *cells)
    return table
