"""Distillation from a teacher's top-k, measured on a CPU: `python -m benchmarks.distillation`.

What it costs: time and peak memory of the loss and its backward, fused and from dense logits. What it does: small
teachers and students trained here, several seeds, on the demo's data (names of Unicode characters and their
categories). Students of one size and seed have the same start and the same batches, and differ in their targets alone.
A student starts from random weights, so under "renormalised", which says nothing about other tokens, it never learns to
leave them out; a pretrained one knows.
"""

import json
import math
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from levelhead.calibration import calibration_error
from levelhead.cli.demo import data as demo
from levelhead.cli.demo.training import Recipe, answer, build_pair, number_of_steps
from levelhead.cli.teacher.store import Prediction, Row, shard_path, write_shard
from levelhead.heads.head import head_input, single_head
from levelhead.integrations import set_objective
from levelhead.measure import memory
from levelhead.objectives import Distillation, distillation_loss, recalibrate
from levelhead.ops import TopK, linear_topk

from .step import machine, quantiles

RESULTS = Path(__file__).parent / "results" / "distillation.json"
N, D, V, K = 2048, 512, 32000, 5
ROUNDS = 7
SEEDS = 3
STUDENT_T = {3: 4.303, 4: 3.182, 5: 2.776}  # 97.5th percentile for one degree of freedom less
TEACHER = Recipe(hidden_size=128, intermediate_size=256, layers=2, epochs=15)
STUDENTS = {
    "small": Recipe(hidden_size=48, intermediate_size=96, layers=1, heads=4, epochs=15),
    "large": TEACHER,  # as large as its teacher, and as over-confident on hard labels
}
TEST, VALIDATION, TRAINING = 2000, 500, 800
CPU = torch.device("cpu")


def dense(x: Tensor, weight: Tensor, ids: Tensor, log_probs: Tensor, normalisation: str) -> Tensor:
    """The same loss from all logits."""
    student = (x @ weight.T).float().log_softmax(-1).gather(-1, ids)
    teacher = log_probs
    if normalisation == "other":
        rest = [torch.log(-torch.expm1(t.logsumexp(-1, keepdim=True))) for t in (teacher, student)]
        teacher, student = (
            torch.cat(pair, -1) for pair in zip((teacher, student), rest, strict=True)
        )
    else:
        teacher = teacher.log_softmax(-1)
        student = student.log_softmax(-1) if normalisation == "renormalised" else student
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


class Cost:
    """Loss and backward on one shape, float32, repeated."""

    def __init__(self, method: str, normalisation: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(N, D, generator=generator).requires_grad_()
        self.weight = (torch.randn(V, D, generator=generator) * 3 / D**0.5).requires_grad_()
        teacher = torch.randn(N, D, generator=generator)
        top = linear_topk(teacher, self.weight.detach(), K)
        self.teacher = (top.indices, top.log_probs)
        self.method, self.normalisation = method, normalisation

    def __call__(self) -> Tensor:
        """Run it; the gradients of the last run are gone first."""
        self.x.grad = self.weight.grad = None
        arguments = (self.x, self.weight, *self.teacher)
        if self.method == "dense":
            loss = dense(*arguments, self.normalisation)
        else:
            loss = distillation_loss(*arguments, normalisation=self.normalisation)  # type: ignore[arg-type]
        loss.backward()
        return loss.detach()

    def seconds(self) -> float:
        """Return the wall time of one run."""
        start = time.perf_counter()
        self()
        return time.perf_counter() - start


def extra_bytes(method: str, normalisation: str) -> int:
    """Peak memory beyond inputs and gradients; needs a fresh process."""
    device = torch.device("cpu")
    if not memory.prepare(device):
        raise RuntimeError("peak memory is read from /proc: benchmarks need Linux with glibc")
    cost = Cost(method, normalisation)
    cost()  # libraries allocate for good on their first call
    cost.x.grad = cost.weight.grad = None
    before = memory.reset_peak(device)
    cost()
    gradients = 4 * (cost.x.numel() + cost.weight.numel())
    return memory.peak(device) - before - gradients


def costs() -> list[dict[str, Any]]:
    """A row for every method and normalisation; a method that is wrong is an error."""
    rows = []
    for normalisation in ("renormalised", "full", "other"):
        pair = {method: Cost(method, normalisation) for method in ("dense", "levelhead")}
        losses = {method: cost() for method, cost in pair.items()}
        torch.testing.assert_close(losses["levelhead"], losses["dense"], rtol=1e-4, atol=1e-5)
        for name in ("x", "weight"):
            got, want = (getattr(pair[method], name).grad for method in ("levelhead", "dense"))
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
        times: dict[str, list[float]] = {method: [] for method in pair}
        for _ in range(ROUNDS):
            for method, cost in pair.items():
                times[method].append(cost.seconds())
        for method, seconds in times.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
                extra = child.submit(extra_bytes, method, normalisation).result()
            row = {"method": method, "normalisation": normalisation, "n": N, "d": D, "v": V, "k": K}
            rows.append(row | quantiles(seconds) | {"extra_bytes": extra})
    return rows


def store_size() -> dict[str, Any]:
    """Bytes a position of a shard of 1000 rows with 128 positions each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (1000, 128, K), generator=generator)
    log_probs = torch.randn(1000, 128, K, generator=generator).log_softmax(-1)
    rows = [
        Prediction(Row(i, p), torch.zeros(128).bool()) for i, p in zip(ids, log_probs, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder), 0, (rows[i : i + 8] for i in range(0, 1000, 8)))
        size = shard_path(Path(folder), 0).stat().st_size
    return {"k": K, "positions_a_row": 128, "bytes_a_position": size / 128_000}


@torch.no_grad()
def top_of(model: Any, rows: Sequence[demo.Tokens]) -> tuple[TopK, Tensor]:
    """A teacher's top-k where it answers, (rows, k), and whether its first is right, (rows,)."""
    head, parts, right = single_head(model), [], []
    for start in range(0, len(rows), 100):
        batch = demo.collate(rows[start : start + 100], CPU)
        asked = batch.labels[:, 1:] != demo.IGNORE_INDEX
        hidden = head_input(model, {"input_ids": batch.input_ids})[:, :-1][asked]
        parts.append(linear_topk(hidden, head.weight, K))
        right.append(parts[-1].indices[:, 0] == batch.labels[:, 1:][asked])
    return TopK(*(torch.cat(field) for field in zip(*parts, strict=True))), torch.cat(right)


def train(
    rows: Sequence[demo.Tokens],
    recipe: Recipe,
    vocabulary: int,
    seed: int,
    teacher: tuple[Tensor, Tensor] | None = None,
    normalisation: Any = "renormalised",
) -> Any:
    """A new model trained on the tokens of `rows`, or on a teacher's ids and log-probabilities (rows, k)."""
    model = build_pair(vocabulary, smoothing=0.0, seed=seed, recipe=recipe, device=CPU)["fused"]
    if teacher is not None:
        set_objective(model, Distillation(normalisation))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, number_of_steps(len(rows), recipe)
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        for chosen in torch.randperm(len(rows), generator=generator).split(recipe.batch_size):
            batch = demo.collate([rows[index] for index in chosen.tolist()], CPU)
            taught = {} if teacher is None else columns(batch, *(t[chosen] for t in teacher))
            model(input_ids=batch.input_ids, labels=batch.labels, **taught).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


def columns(batch: demo.Batch, ids: Tensor, log_probs: Tensor) -> dict[str, Tensor]:
    """The teacher's columns (B, T, k) of rows whose completion is one token."""
    asked = torch.nn.functional.pad(batch.labels[:, 1:] != demo.IGNORE_INDEX, (0, 1))
    found = {
        "teacher_ids": torch.full((*asked.shape, K), demo.IGNORE_INDEX),
        "teacher_log_probs": torch.zeros(*asked.shape, K),
    }
    found["teacher_ids"][asked], found["teacher_log_probs"][asked] = ids, log_probs
    return found


def scores(model: Any, rows: Sequence[demo.Tokens]) -> dict[str, float]:
    """Accuracy, expected calibration error in 10 bins, their difference, and the loss on held-out rows."""
    answers = answer(model, rows, CPU)
    accuracy = answers.correct.double().mean().item()
    error = calibration_error(answers.confidence, answers.correct)
    return {
        "accuracy": accuracy,
        "ece": error,
        "trust": accuracy - error,
        "confidence": answers.confidence.mean().item(),
        "nll": answers.nll.mean().item(),
    }


def repetition(seed: int) -> dict[str, Any]:
    """One split, one teacher, and every student of it."""
    torch.set_num_threads(1)
    examples = demo.unicode_facts()
    vocabulary = demo.Vocabulary(examples)
    rows = random.Random(seed).sample(
        [vocabulary.encode(e) for e in examples], TEST + VALIDATION + TRAINING
    )
    test, validation, training = (
        rows[:TEST],
        rows[TEST : TEST + VALIDATION],
        rows[TEST + VALIDATION :],
    )
    teacher = train(training, TEACHER, len(vocabulary), seed)
    top, _ = top_of(teacher, training)
    held_out, right = top_of(teacher, validation)
    chosen = {
        method: recalibrate(held_out.log_probs, right, method=method)
        for method in ("temperature", "smoothing")
    }
    targets = {
        "plain": top.log_probs,
        "recalibrated": chosen["temperature"](top.log_probs),
        "smoothed": chosen["smoothing"](top.log_probs),
    }
    result = {"teacher": scores(teacher, test)}
    for size, recipe in STUDENTS.items():
        start = seed + 1000  # not that of the teacher, which the large student would repeat

        def student(*targets: Any, recipe: Recipe = recipe, start: int = start) -> dict[str, float]:
            return scores(train(training, recipe, len(vocabulary), start, *targets), test)

        result[f"{size}, hard labels"] = student()
        for name, log_probs in targets.items():
            result[f"{size}, {name}"] = student((top.indices, log_probs), "full")
        if size == "small":
            for name in ("plain", "recalibrated"):
                pair = (top.indices, targets[name])
                result[f"{size}, {name}, renormalised"] = student(pair, "renormalised")
    return {
        "seed": seed,
        "vocabulary": len(vocabulary),
        "top_k_mass": top.log_probs.exp().sum(1).mean().item(),
        "recalibration": {method: asdict(found) for method, found in chosen.items()},
        "scores": result,
    }


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """The mean over the seeds with its 95% interval, by Student's t."""
    middle = statistics.mean(values)
    half = STUDENT_T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": middle, "low": middle - half, "high": middle + half}


def summary(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every metric of every student over the seeds, and the differences of pairs that answer the question."""
    names = list(seeds[0]["scores"])
    table = {
        name: {
            metric: mean_interval([seed["scores"][name][metric] for seed in seeds])
            for metric in seeds[0]["scores"][name]
        }
        for name in names
    }
    pairs = [
        (f"{size}, {changed}", f"{size}, {against}")
        for size in STUDENTS
        for changed in ("recalibrated", "smoothed")
        for against in ("plain", "hard labels")
    ]
    differences = {
        f"{first} - {second}": {
            metric: mean_interval(
                [seed["scores"][first][metric] - seed["scores"][second][metric] for seed in seeds]
            )
            for metric in ("accuracy", "ece", "trust")
        }
        for first, second in pairs
    }
    return {"models": table, "paired_differences": differences}


def main() -> None:
    """Measure all of it and write the results."""
    seeds = [repetition(seed) for seed in track(range(SEEDS), "seeds")]
    content = {
        "machine": machine(),
        "cost": costs(),
        "store": store_size(),
        "task": {
            "data": "categories of Unicode characters by their names",
            "training": TRAINING,
            "validation": VALIDATION,
            "test": TEST,
            "k": K,
            "teacher": asdict(TEACHER),
            "students": {size: asdict(recipe) for size, recipe in STUDENTS.items()},
            "normalisation": "full, where none is named",
        },
        "summary": summary(seeds),
        "seeds": seeds,
    }
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
