"""The demo from end to end: read, train, measure, show, write."""

import os
import platform
import time
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

import levelhead
from levelhead.ops.checks import IGNORE_INDEX

from ..output import make_folder, write_json
from ..progress import progress_bar
from .data import (
    Tokens,
    Vocabulary,
    read_jsonl,
    split,
    unicode_facts,
)
from .memory import loss_peaks
from .report import BINS, Numbers, draw_reliability, metrics, notes, table
from .training import Answers, Learner, Recipe, answer, batches, number_of_steps, train_pair


@dataclass(frozen=True)
class _Task:
    """What to learn, and how; the same for every seed."""

    source: str
    rows: list[Tokens]
    vocabulary_size: int
    smoothing: float
    recipe: Recipe
    device: torch.device


def experiment(data: Path | None, smoothing: float, seeds: int, output: Path) -> None:
    """Runs the demo; writes `reliability.png` and `results.json`.

    Args:
        data: JSON lines of prompts and completions; None for facts about Unicode characters.
        smoothing: Label smoothing of the patched model, in [0, 1].
        seeds: Number of repetitions.
        output: Folder to write to; made if it is not there.

    Raises:
        CliError: The data cannot be used, or the folder cannot be made; nothing was trained.
    """
    began = time.perf_counter()
    console = Console()
    task = _prepare(data, smoothing)
    make_folder(output)
    console.print(_introduction(task))
    results = _describe(task)
    pooled: dict[str, list[Answers]] = {"dense": [], "fused": []}
    with progress_bar(console) as progress:
        for seed in range(seeds):
            learners, answers = _repetition(task, seed, progress)
            results["seeds"].append(_seed_numbers(seed, learners, answers))
            for name, given in answers.items():
                pooled[name].append(given)
    with console.status("Measuring the peak memory of the loss"):
        results |= _measure_memory(task)
    results["wall_seconds"] = time.perf_counter() - began
    console.print(table(results), notes(results), sep="\n")
    draw_reliability(pooled, results, output / "reliability.png")
    write_json(output / "results.json", results)
    console.print(
        f"\n{results['wall_seconds']:.0f} seconds. Reliability diagram and all numbers:\n"
        f"  [bold]{escape(str(output / 'reliability.png'))}[/]\n"
        f"  [bold]{escape(str(output / 'results.json'))}[/]",
        soft_wrap=True,
    )


def _prepare(data: Path | None, smoothing: float) -> _Task:
    examples = unicode_facts() if data is None else read_jsonl(data)
    version = unicodedata.unidata_version
    facts = f"categories of Unicode {version} characters (GREEK SMALL LETTER PI -> Ll)"
    vocabulary = Vocabulary(examples)
    return _Task(
        source=facts if data is None else str(data),
        rows=[vocabulary.encode(example) for example in examples],
        vocabulary_size=len(vocabulary),
        smoothing=smoothing,
        recipe=Recipe(),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


def _introduction(task: _Task) -> str:
    training, held_out = (len(part) for part in split(task.rows, seed=0))
    recipe = task.recipe
    return (
        f"Data: {escape(task.source)}. {training:,} of {len(task.rows):,} rows to learn from, "
        f"{held_out:,} held out, {task.vocabulary_size:,} words and marks.\n"
        f"Model: a new Llama, {recipe.hidden_size} wide and {recipe.layers} layers deep, trained "
        "with hard targets and, from the same start and on the same batches, through "
        f"levelhead.patch_model(model, smoothing={task.smoothing:g}).\n"
    )


def _describe(task: _Task) -> Numbers:
    training, held_out = (len(part) for part in split(task.rows, seed=0))
    return {
        "levelhead": levelhead.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": task.device.type,
        "data": {
            "source": task.source,
            "rows": len(task.rows),
            "training": training,
            "held_out": held_out,
            "vocabulary": task.vocabulary_size,
        },
        "settings": {"smoothing": task.smoothing, "bins": BINS, **asdict(task.recipe)},
        "seeds": [],
    }


def _repetition(
    task: _Task, seed: int, progress: Progress
) -> tuple[dict[str, Learner], dict[str, Answers]]:
    """Trains both models from one seed, and asks both the questions that were held out."""
    training, held_out = split(task.rows, seed)
    bar = progress.add_task(f"seed {seed}", total=number_of_steps(len(training), task.recipe))
    learners = train_pair(
        training,
        vocabulary_size=task.vocabulary_size,
        smoothing=task.smoothing,
        seed=seed,
        device=task.device,
        advance=lambda: progress.advance(bar),
        recipe=task.recipe,
    )
    answers = {
        name: answer(learner.model, held_out, task.device) for name, learner in learners.items()
    }
    return learners, answers


def _seed_numbers(seed: int, learners: dict[str, Learner], answers: dict[str, Answers]) -> Numbers:
    numbers: Numbers = {"seed": seed}
    for name, learner in learners.items():
        numbers[name] = metrics(answers[name]) | {"step_seconds": learner.step_seconds}
    return numbers


def _measure_memory(task: _Task) -> Numbers:
    """Peak memory of both losses on the widest batch of the first seed."""
    training, _ = split(task.rows, seed=0)
    every_batch = batches(training, seed=0, device=task.device, recipe=task.recipe)
    widest = max(every_batch, key=lambda batch: batch.input_ids.numel())
    rows, width = widest.input_ids.shape
    labels = int((widest.labels != IGNORE_INDEX).sum())
    return {
        "measured_batch": {"rows": rows, "width": width, "labels": labels},
        "loss_peak_bytes": loss_peaks(
            widest,
            vocabulary_size=task.vocabulary_size,
            smoothing=task.smoothing,
            recipe=task.recipe,
        ),
    }
