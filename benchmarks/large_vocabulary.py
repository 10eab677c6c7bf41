"""When smoothing has something to smooth: `python -m benchmarks.large_vocabulary`.

A large vocabulary over small hidden states leaves a head too little room to be over-confident, and smoothing without
effect (Huang et al. 2025, https://arxiv.org/abs/2508.00264). Shown here in small: networks learn noisy labels by heart
below a head of random rows that stays as it is, as the head of a large model nearly does in a short fine-tuning. Hidden
size and vocabulary vary; each network is trained with hard targets and with smoothed ones, on plain logits, at a
temperature and under a softcap, which stay in place when its confidence is held against its accuracy. Before any
training, `levelhead.calibration.head_capacity` says where smoothing can act at all.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

import levelhead
from levelhead.calibration import calibration_error, head_capacity

from .step import machine

RESULTS = Path(__file__).parent / "results"
HIDDEN_SIZES = (32, 64, 128, 256)
VOCABULARY_SIZES = (256, 1024, 4096, 16384)
SEEDS = (0, 1, 2)
SMOOTHING = 0.1
REMEDIES: dict[str, dict[str, float]] = {
    "plain": {},
    "temperature 0.25": {"logit_scale": 4.0},
    "softcap 8": {"softcap": 8.0},
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """The task and the training, the same in every cell."""

    classes: int = 64  # tokens that are ever an answer
    features: int = 32
    spread: float = 0.5  # of inputs around the prototype of their class
    label_noise: float = 0.2  # share of labels that are some other class's
    training: int = 1024
    held_out: int = 4096
    steps: int = 320
    batch: int = 128
    learning_rate: float = 3e-3
    head_std: float = 0.1


@dataclass(frozen=True)
class Data:
    """Inputs (N, F) and labels (N,)."""

    input: Tensor
    target: Tensor


class Network(nn.Module):
    """Features (N, F) to hidden states (N, D) of norm sqrt(D), as an RMSNorm leaves them, and a frozen head (V, D)."""

    def __init__(self, recipe: Recipe, hidden_size: int, vocabulary_size: int) -> None:
        super().__init__()
        width = 256
        self.layers = nn.Sequential(
            nn.Linear(recipe.features, width),
            nn.GELU(),
            nn.Linear(width, hidden_size),
            nn.RMSNorm(hidden_size, elementwise_affine=False),
        )
        head = recipe.head_std * torch.randn(vocabulary_size, hidden_size)
        self.head: Tensor
        self.register_buffer("head", head)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The hidden states."""
        hidden: Tensor = self.layers(input)
        return hidden


def main() -> None:
    """Train every cell; write results/large_vocabulary.json and the figure beside it."""
    recipe = Recipe()
    cells = list(product(HIDDEN_SIZES, VOCABULARY_SIZES, SEEDS))
    rows = [row for cell in track(cells, "cells") for row in run(recipe, *cell)]
    found = {"machine": machine(), "recipe": asdict(recipe), "smoothing": SMOOTHING, "rows": rows}
    (RESULTS / "large_vocabulary.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(rows)


def run(recipe: Recipe, hidden_size: int, vocabulary_size: int, seed: int) -> Iterator[Row]:
    """One cell from one seed, a row for each remedy: what was predicted, and what came of hard and smoothed targets."""
    for name, options in REMEDIES.items():
        torch.manual_seed(seed)
        head = Network(recipe, hidden_size, vocabulary_size).head
        norm = math.sqrt(hidden_size)
        capacity = head_capacity(head, hidden_norm=norm, label_smoothing=SMOOTHING, **options)
        results = {
            label: trained(recipe, hidden_size, vocabulary_size, seed, eps, options)
            for label, eps in (("hard", 0.0), ("smoothed", SMOOTHING))
        }
        yield {
            "d": hidden_size,
            "v": vocabulary_size,
            "seed": seed,
            "remedy": name,
            "margin": capacity.margin,
            "smoothed_margin": capacity.smoothed_margin,
            **results,
        }


def trained(
    recipe: Recipe, hidden_size: int, vocabulary_size: int, seed: int, eps: float, options: Any
) -> dict[str, float]:
    """Train one network; return what its held-out answers are worth."""
    torch.manual_seed(seed)
    network = Network(recipe, hidden_size, vocabulary_size)
    training, held_out = examples(recipe)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    for batch in batches(training, recipe):
        levelhead.linear_cross_entropy(
            network(batch.input), network.head, batch.target, label_smoothing=eps, **options
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        stats = levelhead.linear_logit_stats(
            network(held_out.input), network.head, held_out.target, **options
        )
    confidence = stats.confidence
    correct = stats.argmax == held_out.target
    return {
        "accuracy": correct.double().mean().item(),
        "confidence": confidence.double().mean().item(),
        "ece": calibration_error(confidence.clamp(max=1), correct),
    }


def examples(recipe: Recipe) -> tuple[Data, Data]:
    """Examples to learn from and others to be asked."""
    prototypes = torch.randn(recipe.classes, recipe.features)

    def some(count: int) -> Data:
        kind = torch.randint(recipe.classes, (count,))
        input = prototypes[kind] + recipe.spread * torch.randn(count, recipe.features)  # noqa: A001
        other = (kind + torch.randint(1, recipe.classes, (count,))) % recipe.classes
        return Data(input, torch.where(torch.rand(count) < recipe.label_noise, other, kind))

    return some(recipe.training), some(recipe.held_out)


def batches(data: Data, recipe: Recipe) -> Iterator[Data]:
    """Batches of a training run, every epoch in a new order."""
    epochs = recipe.steps * recipe.batch // recipe.training
    for _ in range(epochs):
        for ids in torch.randperm(recipe.training).split(recipe.batch):
            yield Data(data.input[ids], data.target[ids])


def cells(rows: list[Row]) -> list[Row]:
    """Means over the seeds, a row for each cell and remedy."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault((row["d"], row["v"], row["remedy"]), []).append(row)
    return [
        {
            "d": d,
            "v": v,
            "remedy": remedy,
            "capacity": fmean(row["margin"] / row["smoothed_margin"] for row in group),
            **{
                f"{label}_{metric}": fmean(row[label][metric] for row in group)
                for label in ("hard", "smoothed")
                for metric in ("accuracy", "confidence", "ece")
            },
        }
        for (d, v, remedy), group in found.items()
    ]


def acts(cell: Row) -> bool:
    """Whether smoothing takes two points of mean confidence or more."""
    return bool(cell["hard_confidence"] - cell["smoothed_confidence"] >= 0.02)


def helps(cell: Row) -> bool:
    """Whether smoothing takes a point of ECE or more."""
    return bool(cell["hard_ece"] - cell["smoothed_ece"] >= 0.01)


def draw(rows: list[Row]) -> None:
    """What smoothing does in every cell, the larger vocabularies as larger dots, against what its head allowed."""
    figure = Figure(figsize=(9, 3.8), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for axes, metric, label in (
        (left, "confidence", "mean confidence, change by smoothing"),
        (right, "ece", "ECE, change by smoothing"),
    ):
        _points(axes, cells(rows), metric)
        axes.set_title(label, loc="left", fontsize=10)
        axes.set_xlabel("margin the head can reach / margin of the smoothed optimum", fontsize=9)
    left.legend(edgecolor="none", framealpha=1, fontsize=9, loc="lower left")
    figure.savefig(RESULTS / "large_vocabulary.png")


def _points(axes: Axes, found: list[Row], metric: str) -> None:
    for remedy, colour in zip(REMEDIES, ("#444444", "#d1495b", "#2a78b8"), strict=True):
        of_remedy = [cell for cell in found if cell["remedy"] == remedy]
        axes.scatter(
            [cell["capacity"] for cell in of_remedy],
            [cell[f"smoothed_{metric}"] - cell[f"hard_{metric}"] for cell in of_remedy],
            s=[8 * math.log2(cell["v"]) - 40 for cell in of_remedy],
            color=colour,
            alpha=0.75,
            linewidth=0,
            label=remedy,
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks([0.5, 1, 2, 4, 8, 16], ["½", "1", "2", "4", "8", "16"])
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
