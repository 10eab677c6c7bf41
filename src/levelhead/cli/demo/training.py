"""The demo's experiment: two copies of one small model, trained side by side on the same batches.

`dense` is the model as Hugging Face ships it, with hard targets; `fused` is its copy, patched for
smoothed targets. Both take each step right after one another, so that whatever else the machine
does in the meantime slows both.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from levelhead import patch_model
from levelhead.ops.checks import IGNORE_INDEX

from .data import Batch, Tokens, collate


@dataclass(frozen=True)
class Recipe:
    """How each model is built and trained."""

    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 2
    heads: int = 4
    epochs: int = 15
    batch_size: int = 32
    learning_rate: float = 2e-3  # at the start; falls to 0 along half a cosine
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Answers:
    """What a model made of N held-out tokens."""

    confidence: Tensor  # (N,) float64, the largest probability over the whole vocabulary
    correct: Tensor  # (N,) bool, whether the token with that probability is the right one
    nll: Tensor  # (N,) float64, -log of the probability of the right token


@dataclass
class Learner:
    """A model under training."""

    model: Any
    recipe: Recipe
    steps: int
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay,
            fused=True,
        )
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, self.steps)

    def step(self, batch: Batch) -> None:
        """Run forward, backward and update, timed."""
        start = _now(batch.input_ids.device)
        self.model(input_ids=batch.input_ids, labels=batch.labels).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.seconds.append(_now(batch.input_ids.device) - start)
        self._schedule.step()

    @property
    def step_seconds(self) -> float:
        """Return the median time of a step, without the first tenth, which warms up."""
        return median(self.seconds[len(self.seconds) // 10 :])


def train_pair(
    rows: Sequence[Tokens],
    *,
    vocabulary_size: int,
    smoothing: float,
    seed: int,
    device: torch.device,
    advance: Callable[[], object],
    recipe: Recipe,
) -> dict[str, Learner]:
    """Train `dense` and `fused` from the same weights on the same batches; `advance` follows each step of both."""
    pair = build_pair(vocabulary_size, smoothing=smoothing, seed=seed, recipe=recipe, device=device)
    steps = number_of_steps(len(rows), recipe)
    learners = {name: Learner(model, recipe, steps) for name, model in pair.items()}
    for batch in batches(rows, seed=seed, device=device, recipe=recipe):
        for learner in learners.values():
            learner.step(batch)
        advance()
    return learners


def build_pair(
    vocabulary_size: int, *, smoothing: float, seed: int, recipe: Recipe, device: torch.device
) -> dict[str, Any]:
    """Return a small Llama with fresh random weights in float32, `dense`, and its patched copy, `fused`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    dense = LlamaForCausalLM(config).to(device).train()
    return {"dense": dense, "fused": patch_model(copy.deepcopy(dense), smoothing=smoothing)}


def number_of_steps(rows: int, recipe: Recipe) -> int:
    """Return the training steps of one model."""
    return recipe.epochs * -(-rows // recipe.batch_size)


def batches(
    rows: Sequence[Tokens], *, seed: int, device: torch.device, recipe: Recipe
) -> Iterator[Batch]:
    """Yield all batches of a training run: every epoch in a new order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows), recipe.batch_size):
            chosen = order[start : start + recipe.batch_size]
            yield collate([rows[index] for index in chosen], device)


@torch.no_grad()
def answer(model: Any, rows: Sequence[Tokens], device: torch.device) -> Answers:
    """Return what the model makes of each token of the rows' completions, the right ones before it given."""
    model.eval()
    parts = []
    for start in range(0, len(rows), 100):
        batch = collate(rows[start : start + 100], device)
        logits = model(input_ids=batch.input_ids).logits[:, :-1]  # (B, T - 1, V)
        target = batch.labels[:, 1:]  # (B, T - 1)
        asked = target != IGNORE_INDEX
        parts.append(_score(logits[asked], target[asked]))
    model.train()
    return Answers(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _score(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_probability = logits.double().log_softmax(-1)  # (N, V)
    highest, predicted = log_probability.max(-1)  # (N,), (N,)
    right = log_probability.gather(-1, target[:, None])[:, 0]  # (N,)
    return highest.exp(), predicted == target, -right


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
