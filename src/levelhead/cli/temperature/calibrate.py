"""Fit one temperature on half of the data, report on the other half, write the model."""

from contextlib import suppress
from dataclasses import asdict, dataclass
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
from levelhead.heads.temperature import Way, apply_temperature, fit_temperature

from ..errors import CliError
from ..output import make_folder, write_json
from ..reading import batches, read_model, read_rows, read_tokenizer
from .options import Options

_BINS = 10  # of the calibration error
_WAYS: dict[Way, str] = {
    "logit_scale": "a logit scale in its config: all that use its logits are served",
    "head": "the weights of its head: all that use its logits are served",
    "final_norm": "the weights of its final norm, as its head is tied: all that use its logits are "
    "served, and its last hidden states are divided too",
    "generation_config": "its generation config, which serves sampling alone: its probabilities "
    "are as they were",
}


@dataclass(frozen=True)
class Measures:
    """What the probabilities of tokens are worth; `nll` in nats."""

    nll: float
    calibration_error: float
    mean_confidence: float
    accuracy: float


@dataclass(frozen=True)
class Summary:
    """What is in summary.json."""

    levelhead: str
    torch: str
    transformers: str
    model: str
    data: str
    seed: int
    temperature: float
    applied_to: Way
    tokens: dict[str, int]  # how many to "fit" on, and to "report" on
    before: Measures
    after: Measures
    bins: int = _BINS


def calibrate(options: Options) -> Summary:
    """Fit on one half of the data, measure on the other, write the model to `options.output`.

    Args:
        options: Those of `levelhead temperature`.

    Returns:
        What is in summary.json.

    Raises:
        CliError: The model or the data cannot be used; nothing was written.
    """
    output = options.output
    made = not output.exists()
    make_folder(output)
    if any(output.iterdir()):
        raise CliError(f"{output} is not empty; name an empty folder with --output")
    try:
        with Console().status("Reading"):
            model, tokenizer, summary = _calibrated(options)
        try:
            model.save_pretrained(output)
            tokenizer.save_pretrained(output)
            write_json(output / "summary.json", asdict(summary))
        except (OSError, ValueError) as error:  # transformers refuses generation configs at odds
            raise CliError(f"cannot write the model to {output}: {error}") from error
    except CliError:
        if made:
            with suppress(OSError):
                output.rmdir()  # if nothing is in it
        raise
    return summary


def _calibrated(options: Options) -> tuple[Any, Any, Summary]:
    """Return the model with its temperature, and its tokenizer."""
    tokenizer = read_tokenizer(options)
    rows = read_rows(options, tokenizer)
    if len(rows) < 2:
        raise CliError(
            f"{options.data} gives one row, but one is needed to fit on and another to report "
            "on; give more rows, or cut a text into smaller pieces with --max-length"
        )
    model = read_model(options)
    halves = (rows.select(range(first, len(rows), 2)) for first in (0, 1))
    try:
        head = single_head(model)
        fitted_on, reported_on = (
            collect(model, batches(half, options, tokenizer), max_tokens=options.max_tokens)
            for half in halves
        )
        temperature = fit_temperature(head, fitted_on)
        before, after = (_measures(head, reported_on, t) for t in (1.0, temperature))
        way = apply_temperature(model, temperature)
    except ValueError as error:
        raise CliError(str(error)) from error
    summary = Summary(
        levelhead=levelhead.__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        model=options.model,
        data=options.data,
        seed=options.seed,
        temperature=temperature,
        applied_to=way,
        tokens={"fit": len(fitted_on.target), "report": len(reported_on.target)},
        before=before,
        after=after,
    )
    return model, tokenizer, summary


def _measures(head: Head, inputs: HeadInputs, temperature: float) -> Measures:
    with torch.no_grad():
        stats = head.logit_stats(inputs.hidden, inputs.target, temperature)
    confidence = stats.confidence.double()
    correct = stats.argmax == inputs.target
    return Measures(
        nll=-stats.log_probs.double().mean().item(),
        calibration_error=calibration_error(confidence, correct, bins=_BINS),
        mean_confidence=confidence.mean().item(),
        accuracy=correct.double().mean().item(),
    )


def show(summary: Summary, output: Path) -> None:
    """Print what came of it, and where the model is."""
    title = f"{summary.tokens['report']:,} tokens that were not fitted on"
    table = Table("", "before", "after", title=title, title_justify="left")
    for name, label in {
        "nll": "negative log-likelihood (nats)",
        "calibration_error": f"expected calibration error ({_BINS} bins)",
        "mean_confidence": "mean confidence",
        "accuracy": "accuracy",
    }.items():
        values = (getattr(measures, name) for measures in (summary.before, summary.after))
        table.add_row(label, *(f"{value:.4f}" for value in values))
    console = Console()
    console.print(table)
    console.print(
        f"Temperature [bold]{summary.temperature:.4f}[/], fitted on "
        f"{summary.tokens['fit']:,} tokens, is in {_WAYS[summary.applied_to]}."
    )
    console.print(f"Model: [bold]{escape(str(output))}[/]", soft_wrap=True)
