"""Every remedy on one model, end to end: `python -m benchmarks.calibration_study`.

A small language model learns facts about Unicode characters (names and categories, the demo's data) and is fine-tuned
on a few more: with hard targets, with smoothed ones, and with each remedy that Levelhead has. What needs labelled rows
that the fine-tuning has not seen gets the same ones. All models of a seed share the first model, the rows and their
order, and are asked the same questions.

    base            the model before fine-tuning, a language model of questions and answers
    hard targets    fine-tuned with cross-entropy
    smoothing       with label smoothing 0.1 (Huang et al. 2025)
      at T = 0.5    the same, at a training temperature that stays in place
    temperature     hard targets, then one temperature, fitted to unseen rows (Guo et al. 2017)
    FIRST           base, taught the recalibrated top-5 of the model with hard targets (Shum et al. 2024)
    CFT, RCFT       hard targets, then calibration-aware fine-tuning on the unseen rows (Xiao et al. 2025)
"""

import copy
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from levelhead import patch_model
from levelhead.calibration import (
    auroc,
    calibration_error,
    fit_temperature,
    smooth_calibration_error,
)
from levelhead.cli.demo import data as demo
from levelhead.cli.demo.training import Recipe as ModelRecipe
from levelhead.cli.demo.training import build_pair
from levelhead.integrations import set_objective
from levelhead.objectives import Distillation, recalibrate
from levelhead.objectives.calibration_aware import choice_probabilities, confidence_bins
from levelhead.objectives.rcft import CalibrationAware

from .distillation import columns, mean_interval, top_of
from .step import machine

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
NAMES = {
    "base": "before fine-tuning",
    "hard targets": "hard targets",
    "smoothing": "smoothing 0.1",
    "smoothing, T = 0.5": "smoothing 0.1 at temperature 0.5",
    "temperature": "hard targets, then temperature",
    "FIRST": "FIRST, taught by hard targets",
    "CFT": "hard targets, then CFT",
    "RCFT": "hard targets, then RCFT",
}


@dataclass(frozen=True)
class Recipe:
    """Rows and training, the same for every seed."""

    seeds: int = 5
    first: int = 2000  # rows that the first model learns from
    fine: int = 800
    unseen: int = 500
    test: int = 2000
    batch_size: int = 32
    first_epochs: int = 4
    first_rate: float = 2e-3
    epochs: int = 15
    rate: float = 2e-3
    repair_epochs: int = 3
    repair_rate: float = 2e-4
    ece_weight: float = 1.0
    k: int = 5


Rows = list[demo.Tokens]
More = Callable[[Tensor, demo.Batch], dict[str, Tensor]]  # columns of rows (B,), given their batch


def main() -> None:
    """Run every seed, and write results/calibration_study.json and the figure beside it."""
    recipe, began = Recipe(), time.perf_counter()
    seeds = [repetition(recipe, seed) for seed in track(range(recipe.seeds), "seeds")]
    summary = {
        name: {
            metric: mean_interval([seed[name][metric] for seed in seeds])
            for metric in seeds[0][name]
        }
        for name in NAMES
    }
    found = {
        "machine": machine(),
        "recipe": asdict(recipe),
        "seconds": time.perf_counter() - began,
        "summary": summary,
        "seeds": seeds,
    }
    (RESULTS / "calibration_study.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(summary, RESULTS / "calibration_study.png")


def repetition(recipe: Recipe, seed: int) -> dict[str, dict[str, float]]:
    """Every model of one seed, asked the test questions."""
    examples = demo.unicode_facts()
    vocabulary = demo.Vocabulary(examples)
    encoded = [vocabulary.encode(example) for example in examples]
    total = recipe.first + recipe.fine + recipe.unseen + recipe.test
    rows = random.Random(seed).sample(encoded, total)
    first, fine, unseen, test = _cut(rows, recipe.first, recipe.fine, recipe.unseen, recipe.test)

    pair = build_pair(len(vocabulary), smoothing=0.0, seed=seed, recipe=ModelRecipe(), device=CPU)
    base = train(
        pair["dense"],
        first,
        recipe,
        epochs=recipe.first_epochs,
        rate=recipe.first_rate,
        seed=seed,
        every_token=True,
    )

    def fine_tune(**options: Any) -> Any:
        more = {"epochs": recipe.epochs, "rate": recipe.rate, "seed": seed}
        return train(base, fine, recipe, **more, **options)

    hard = fine_tune()
    letters = torch.tensor(sorted({row.completion[0] for row in encoded}))
    asked = {
        "base": logits(base, test),
        "hard targets": logits(hard, test),
        "smoothing": logits(fine_tune(smoothing=0.1), test),
        "smoothing, T = 0.5": logits(fine_tune(smoothing=0.1, temperature=0.5), test) / 0.5,
        "temperature": logits(hard, test) / fit_temperature(logits(hard, unseen), _answers(unseen)),
        "FIRST": logits(fine_tune(**teaching(hard, fine, unseen)), test),
        "CFT": logits(repair(hard, unseen, recipe, seed), test),
        "RCFT": logits(repair(hard, unseen, recipe, seed, letters), test),
    }
    return {name: metrics(z, _answers(test)) for name, z in asked.items()}


def train(
    model: Any,
    rows: Rows,
    recipe: Recipe,
    *,
    epochs: int,
    rate: float,
    seed: int,
    smoothing: float = 0.0,
    temperature: float = 1.0,
    objective: Any = None,
    more: More | None = None,
    before_epoch: Callable[[Any], None] | None = None,
    every_token: bool = False,
) -> Any:
    """A trained copy of a model; `every_token` gives the questions a loss, not the answers alone."""
    model = patch_model(copy.deepcopy(model), smoothing=smoothing, temperature=temperature).train()
    if objective is not None:
        set_objective(model, objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    steps = epochs * -(-len(rows) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        if before_epoch is not None:
            before_epoch(model)
        for chosen in torch.randperm(len(rows), generator=generator).split(recipe.batch_size):
            batch = demo.collate([rows[index] for index in chosen.tolist()], CPU)
            labels = batch.labels
            if every_token:
                labels = batch.input_ids.masked_fill(batch.input_ids == 0, demo.IGNORE_INDEX)
            extra = {} if more is None else more(chosen, batch)
            model(input_ids=batch.input_ids, labels=labels, **extra).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


def teaching(teacher: Any, rows: Rows, held_out: Rows) -> dict[str, Any]:
    """FIRST: what makes `train` learn a teacher's top-k, recalibrated on rows that it has not seen."""
    top, _ = top_of(teacher, rows)
    chosen = recalibrate(*_log_probs_and_right(teacher, held_out))
    log_probs = chosen(top.log_probs)
    return {
        "objective": Distillation("full"),
        "more": lambda which, batch: columns(batch, top.indices[which], log_probs[which]),
    }


def repair(model: Any, rows: Rows, recipe: Recipe, seed: int, choices: Tensor | None = None) -> Any:
    """CFT of a model; RCFT, if the vocabulary ids of the choices (C,) are given."""
    options = {"epochs": recipe.repair_epochs, "rate": recipe.repair_rate, "seed": seed}
    if choices is None:
        return train(model, rows, recipe, **options)
    answer = torch.searchsorted(choices, _answers(rows))
    found: dict[str, Tensor] = {}

    def e_step(model: Any) -> None:
        picked = logits(model, rows)[:, choices].float()
        binned = confidence_bins(choice_probabilities(picked, choices.expand_as(picked)), answer)
        found.update(bin_right=binned.right, bin_size=binned.size)

    def of_batch(which: Tensor, batch: demo.Batch) -> dict[str, Tensor]:
        at = (batch.labels != demo.IGNORE_INDEX).int().argmax(1) - 1
        shared = {"choices": choices.expand(len(which), -1), "answer_position": at}
        return shared | {name: column[which] for name, column in found.items()}

    tokens = sum(len(row.prompt) + len(row.completion) - 1 for row in rows)
    return train(
        model,
        rows,
        recipe,
        **options,
        objective=CalibrationAware(tokens, ece_weight=recipe.ece_weight),
        more=of_batch,
        before_epoch=e_step,
        every_token=True,
    )


@torch.no_grad()
def logits(model: Any, rows: Rows) -> Tensor:
    """Of the whole vocabulary, where each row is answered, (N, V) float64."""
    training, parts = model.training, []
    model.eval()
    for start in range(0, len(rows), 100):
        batch = demo.collate(rows[start : start + 100], CPU)
        asked = batch.labels[:, 1:] != demo.IGNORE_INDEX
        parts.append(model(input_ids=batch.input_ids).logits[:, :-1][asked])
    model.train(training)
    return torch.cat(parts).double()


def metrics(z: Tensor, target: Tensor) -> dict[str, float]:
    """Of answers with these logits (N, V), the confidence being the largest probability."""
    log_probability = z.log_softmax(-1)
    highest, predicted = log_probability.max(-1)
    confidence, correct = highest.exp().clamp(max=1), predicted == target
    return {
        "accuracy": correct.double().mean().item(),
        "confidence": confidence.mean().item(),
        "ece": calibration_error(confidence, correct),
        "smooth_ece": smooth_calibration_error(confidence, correct),
        "nll": -log_probability.gather(-1, target[:, None]).mean().item(),
        "auroc": auroc(confidence, correct),
    }


def draw(summary: dict[str, Any], path: Path) -> None:
    """A row for each model: mean and 95% interval of ECE, accuracy and NLL."""
    figure = Figure(figsize=(9, 3.4), dpi=160, layout="constrained")
    panels = {"ece": "ECE", "accuracy": "accuracy", "nll": "NLL, nats"}
    for axes, (metric, title) in zip(
        figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True
    ):
        for place, name in enumerate(NAMES):
            interval = summary[name][metric]
            colour = "#2a78b8" if name.startswith("smoothing") else "#444444"
            colour = "#d1495b" if name == "hard targets" else colour
            axes.plot([interval["low"], interval["high"]], [place] * 2, color=colour, linewidth=2)
            axes.plot(interval["mean"], place, "o", color=colour, markersize=6)
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yticks(range(len(NAMES)), NAMES.values(), fontsize=9)
        axes.margins(x=0.15)
    axes.invert_yaxis()
    figure.savefig(path)


def _cut(rows: Rows, *lengths: int) -> list[Rows]:
    cut, start = [], 0
    for length in lengths:
        cut.append(rows[start : start + length])
        start += length
    return cut


def _answers(rows: Sequence[demo.Tokens]) -> Tensor:
    return torch.tensor([row.completion[0] for row in rows])


def _log_probs_and_right(teacher: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    top, right = top_of(teacher, rows)
    return top.log_probs, right


if __name__ == "__main__":
    main()
