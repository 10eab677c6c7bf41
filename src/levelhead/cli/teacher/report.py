"""What is in a finished store, for the terminal."""

from typing import Any

from rich.table import Table


def table(manifest: dict[str, Any]) -> Table:
    """The store, and the recalibration if there is one."""
    shards, positions, k = manifest["shards"], manifest["positions"], manifest["k"]
    size = sum(shard["bytes"] for shard in shards)
    mass = sum(shard["mass"] for shard in shards) / positions
    accuracy = sum(shard["correct"] for shard in shards) / positions
    title = f"{manifest['rows']:,} rows, {positions:,} positions"
    view = Table(title=title, title_justify="left", show_header=False)
    view.add_row("bytes per position", f"{size / positions:.1f}")
    view.add_row("size (MiB)", f"{size / 2**20:,.1f}")
    view.add_row(f"probability of the {k} most likely", f"{mass:.4f}")
    view.add_row("accuracy on this data", f"{accuracy:.4f}")
    if found := manifest["recalibration"]:
        view.add_section()
        view.add_row("held-out predictions", f"{found['positions']:,}")
        view.add_row("accuracy on them", f"{found['accuracy']:.4f}")
        view.add_row("calibration error", f"{found['ece_before']:.4f}")
        view.add_row(f"{found['method']} chosen", f"{found['value']:.2f}")
        view.add_row("calibration error with it", f"{found['ece_after']:.4f}")
    return view


def notes(manifest: dict[str, Any]) -> str:
    """What exactly the table shows, to be printed below it."""
    found = manifest["recalibration"]
    if found is None:
        return "Not recalibrated; the same command with --validation DATA does it."
    curve = "  ".join(f"{value:.2f}: {error:.4f}" for value, error in found["curve"])
    worse = found["ece_after"] >= found["ece_before"]
    return (
        "The calibration error is the expected one of the most likely token, in 10 bins of equal "
        f"width. For each {found['method']} that was tried:\n{curve}"
        + (
            "\nNone is better than the teacher's own probabilities: use sft --raw-teacher."
            if worse
            else ""
        )
    )
