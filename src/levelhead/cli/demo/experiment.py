"""The demo from end to end: read, train, measure, draw, write."""

import os
import platform
import time
import unicodedata
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.markup import escape

import levelhead
from levelhead.ops.checks import IGNORE_INDEX

from ..output import make_folder, write_json
from ..progress import progress_bar
from .data import Vocabulary, read_jsonl, split, unicode_facts
from .memory import loss_peaks
from .report import BINS, Data, Results, Seed, draw_reliability, measures
from .training import Answers, Recipe, answer, batches, number_of_steps, train_pair


def demo(data: Path | None, *, smoothing: float, seeds: int, output: Path) -> Results:
    """Train with hard targets and with smoothed ones; write `reliability.png` and `results.json`.

    Args:
        data: JSON lines of prompts and completions; None: facts about Unicode characters.
        smoothing: Label smoothing of the patched model, in [0, 1].
        seeds: Number of repetitions.
        output: Folder to write to; made if it is not there.

    Returns:
        What is in results.json.

    Raises:
        CliError: The data cannot be used, or the folder cannot be made; nothing was trained.
    """
    began = time.perf_counter()
    version = unicodedata.unidata_version
    facts = f"categories of Unicode {version} characters (GREEK SMALL LETTER PI -> Ll)"
    examples = unicode_facts() if data is None else read_jsonl(data)
    vocabulary, recipe = Vocabulary(examples), Recipe()
    rows = [vocabulary.encode(example) for example in examples]
    training, held_out = split(rows, seed=0)
    about = Data(
        source=facts if data is None else str(data),
        rows=len(rows),
        training=len(training),
        held_out=len(held_out),
        vocabulary=len(vocabulary),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_folder(output)
    console = Console()
    console.print(
        f"Data: {escape(about.source)}. {about.training:,} of {about.rows:,} rows to learn from, "
        f"{about.held_out:,} held out, {about.vocabulary:,} words and marks.\n"
        f"Model: a new Llama, {recipe.hidden_size} wide and {recipe.layers} layers deep, trained "
        "with hard targets and, from the same start and on the same batches, through "
        f"levelhead.patch_model(model, smoothing={smoothing:g}).\n"
    )
    found: list[Seed] = []
    answers: dict[str, list[Answers]] = {"dense": [], "fused": []}
    with progress_bar(console) as progress:
        for seed in range(seeds):
            training, held_out = split(rows, seed)
            bar = progress.add_task(f"seed {seed}", total=number_of_steps(len(training), recipe))
            learners = train_pair(
                training,
                vocabulary_size=len(vocabulary),
                smoothing=smoothing,
                seed=seed,
                device=device,
                advance=lambda bar=bar: progress.advance(bar),  # type: ignore[misc]
                recipe=recipe,
            )
            measured = {}
            for name, learner in learners.items():
                answers[name].append(answer(learner.model, held_out, device))
                measured[name] = measures(answers[name][-1], learner.step_seconds)
            found.append(Seed(seed, **measured))
    with console.status("Measuring the peak memory of the loss"):
        training, _ = split(rows, seed=0)
        widest = max(
            batches(training, seed=0, device=device, recipe=recipe),
            key=lambda batch: batch.input_ids.numel(),
        )
        peaks = loss_peaks(
            widest, vocabulary_size=len(vocabulary), smoothing=smoothing, recipe=recipe
        )
    results = Results(
        levelhead=levelhead.__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        cpu_count=os.cpu_count(),
        threads=torch.get_num_threads(),
        device=device.type,
        data=about,
        settings={"smoothing": smoothing, "bins": BINS, **asdict(recipe)},
        seeds=found,
        measured_batch={
            "rows": widest.input_ids.shape[0],
            "width": widest.input_ids.shape[1],
            "labels": int((widest.labels != IGNORE_INDEX).sum()),
        },
        loss_peak_bytes=peaks,
        wall_seconds=time.perf_counter() - began,
    )
    eces = {name: [getattr(seed, name).ece for seed in found] for name in answers}
    draw_reliability(answers, eces, smoothing, output / "reliability.png")
    write_json(output / "results.json", asdict(results))
    return results
