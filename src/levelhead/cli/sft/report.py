"""What `levelhead sft` is about to do, and what came of it."""

import argparse
import math
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.markup import escape
from rich.table import Table

import levelhead
from levelhead.objectives.regime import Regime
from levelhead.ops.chunked import chunk_tokens

from .preparation import Counts

_MIB = 2**20
_HOW = (
    "reckoned, not measured, for the largest batch on one device. Dense: its positions x "
    "vocabulary x (logits in the dtype of the computation, their float32 copy where that is "
    "narrower, and their float32 gradient). Levelhead: the most that its buffers of logits may take"
)


def introduction(
    arguments: argparse.Namespace, counts: dict[str, Counts], checkpoint: Path | None
) -> str:
    """The data as the model will see it, and where training starts."""
    lines = []
    for name, label in (("data", "Training"), ("eval", "Evaluation")):
        if name in counts:
            source, count = vars(arguments)[name], counts[name]
            lines.append(
                f"{label}: {count.rows:,} rows of {escape(source)}, {count.tokens:,} tokens, "
                f"{count.supervised:,} of them with a loss; the longest row has {count.longest:,}."
            )
            lines += _cuts(count, arguments.max_length)
    if checkpoint is not None:
        lines.append(f"Going on from {escape(str(checkpoint))}.")
    elif arguments.resume:
        lines.append("There is no whole checkpoint yet: starting from the beginning.")
    return "\n".join(lines) + "\n"


def _cuts(count: Counts, max_length: int) -> list[str]:
    lines = []
    if count.cut:
        lines.append(f"  {count.cut:,} rows were cut to {max_length:,} tokens (--max-length).")
    if count.left_out:
        lines.append(
            f"  {count.left_out:,} more rows were left out: no token of their completion lies "
            f"within {max_length:,} tokens (--max-length)."
        )
    return lines


def summarise(
    arguments: argparse.Namespace,
    trainer: Any,
    counts: dict[str, Counts],
    positions: int,
    tokens: int,
    seconds: float,
) -> dict[str, Any]:
    """What goes into summary.json.

    Args:
        arguments: The command line.
        trainer: After training.
        counts: What became of the rows of "data" and "eval".
        positions: Of the largest batch on one device.
        tokens: That were trained on in `seconds`; fewer than in all if the run was resumed.
        seconds: Duration of training, evaluation and checkpoints included.
    """
    state = trainer.state
    return {
        "levelhead": levelhead.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "device": trainer.args.device.type,
        "processes": trainer.args.world_size,
        "settings": _settings(arguments, trainer.args),
        "rows": {name: vars(count) for name, count in counts.items()},
        "steps": state.global_step,
        "epochs": state.epoch,
        "loss": _first_and_last("loss", state),
        "eval_loss": _first_and_last("eval_loss", state),
        "calibration": _calibration(state),
        "tokens": state.num_input_tokens_seen,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "logits": _logits(trainer, positions),
    }


def _settings(arguments: argparse.Namespace, options: Any) -> dict[str, Any]:
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in ("verb", "run", "local_rank")
    }
    return settings | {"learning_rate": options.learning_rate}


def _first_and_last(key: str, state: Any) -> dict[str, float] | None:
    """None without any; JSON has no NaN."""
    losses = [entry[key] for entry in state.log_history if math.isfinite(entry.get(key, math.nan))]
    return {"first": losses[0], "last": losses[-1]} if losses else None


def _calibration(state: Any) -> dict[str, float] | None:
    """What the last evaluation says of the model's confidence in its tokens; trust is FIRST's score."""
    found = [entry for entry in state.log_history if "eval_ece" in entry]
    if not found:
        return None
    accuracy, error = found[-1]["eval_token_accuracy"], found[-1]["eval_ece"]
    return {
        "token_accuracy": accuracy,
        "mean_confidence": found[-1]["eval_mean_confidence"],
        "ece": error,
        "trust": accuracy - error,
    }


def _logits(trainer: Any, positions: int) -> dict[str, Any]:
    head = trainer.model.get_output_embeddings()
    entries = positions * head.out_features
    at_once = chunk_tokens(positions, head.weight, torch.float32)
    narrow = trainer.args.bf16
    dense = entries * (2 + 4 + 4 if narrow else 4 + 4)
    return {
        "positions": positions,
        "vocabulary": head.out_features,
        "dense_bytes": dense,
        "levelhead_bytes": 4 * at_once * head.out_features,
        "how": _HOW,
    }


def table(summary: dict[str, Any]) -> Table:
    """The summary, for the terminal."""
    logits = summary["logits"]
    dense, ours = logits["dense_bytes"], logits["levelhead_bytes"]
    title = f"{summary['steps']:,} steps, {summary['epochs']:.3g} epochs"
    view = Table(title=title, title_justify="left", show_header=False)
    label = "training loss, smoothed (nats)"
    if summary["settings"].get("teacher"):
        label = "training loss, KL to the teacher (nats)"
    if summary["settings"].get("calibration_aware") == "rcft":
        label = "training loss with regulariser"
    view.add_row(label, _change(summary["loss"]))
    view.add_row("evaluation loss (nats)", _change(summary["eval_loss"]))
    if found := summary["calibration"]:
        view.add_row("accuracy on evaluation tokens", f"{found['token_accuracy']:.4f}")
        view.add_row("their calibration error", f"{found['ece']:.4f}")
        view.add_row("trust score, the difference", f"{found['trust']:.4f}")
    view.add_row("tokens", f"{summary['tokens']:,}")
    view.add_row("tokens per second", f"{summary['tokens_per_second']:,.0f}")
    view.add_row("time (s)", f"{summary['seconds']:.1f}")
    view.add_row("memory of the logits, dense (MiB)", f"{dense / _MIB:,.1f}")
    view.add_row("with levelhead, at most (MiB)", f"{ours / _MIB:,.1f}")
    view.add_row("saved (MiB)", f"{(dense - ours) / _MIB:,.1f}")
    return view


def calibration(regimes: dict[str, Regime]) -> str:
    """Accuracy and confidence of what was asked when, and what follows from it."""
    lines = ["", "Calibration (95% interval of the accuracy)"]
    for name, regime in regimes.items():
        lines.append(f"  {name}: {regime.numbers}")
    verdicts = dict.fromkeys(regime.verdict for regime in regimes.values())
    if len(verdicts) == 1:
        lines.append(f"  {next(iter(verdicts))}")
    else:
        lines += [f"  {name}: {regime.verdict}" for name, regime in regimes.items()]
    return "\n".join(lines) + "\n"


def notes(summary: dict[str, Any]) -> str:
    """What exactly the table shows, to be printed below it."""
    bins = "The calibration error is that of the likeliest token, in 10 bins of equal width. "
    return (
        "Losses are the first and the last that were logged; the evaluation loss is not smoothed. "
        f"{bins if summary['calibration'] else ''}Memory is {summary['logits']['how']}."
    )


def _change(losses: dict[str, float] | None) -> str:
    return "none" if losses is None else f"{losses['first']:.4g} -> {losses['last']:.4g}"
