"""What CFT, RCFT and temperature restore of the calibration that DPO took: `python -m benchmarks.calibration_aware`.

A small Llama learns multiple-choice questions whose answers are uncertain by construction: three words, each with
an effect on the log-odds of four letters, and a label drawn from the resulting p*(y | x). So the most that any model
can get right is known, a* = E[max p*]. Per seed, with new questions for each, DPO goes on from SFT, the others from
DPO:

    SFT           letters alone, cross-entropy
    DPO           TRL's DPOTrainer; chosen: the drawn label, rejected: another letter
    temperature   DPO's choice logits / T, T fitted to the NLL of held-out questions
    CFT           letters alone, cross-entropy
    RCFT          all tokens, and the ECE regulariser, E-step once or at every epoch
    no regulariser  RCFT with lambda = 0: what its loss of the question's tokens does by itself

All are asked the same test questions, with labels of their own. The file is written after every seed.
"""

import copy
import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import scipy.stats
import torch
import transformers
import trl
from rich.progress import track
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from levelhead import patch_model, unpatch_model
from levelhead.calibration import calibration_error, classwise_calibration_error, fit_temperature
from levelhead.integrations import set_objective
from levelhead.objectives.calibration_aware import choice_probabilities, confidence_bins
from levelhead.objectives.rcft import CalibrationAware, choice_logits

from .step import machine

RESULTS = Path(__file__).parent / "results" / "calibration_aware.json"
LETTERS = "ABCD"
BINS = 10
_END = "<|end|>"


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates; the same for every seed."""

    seeds: int = 5
    words: int = 16  # for each of three places
    effect: float = 1.2  # standard deviation of a word's effect on the logits of p*
    training: int = 2000  # questions; SFT, preferences and fine-tuning have some each
    held_out: int = 1000  # for the temperature
    test: int = 4000
    hidden_size: int = 64
    layers: int = 2
    batch_size: int = 32
    sft_epochs: int = 10
    sft_rate: float = 2e-3
    dpo_epochs: int = 3
    dpo_rate: float = 2e-4
    dpo_beta: float = 0.1
    tune_epochs: int = 5
    tune_rate: float = 5e-4
    ece_weight: float = 1.0


@dataclass(frozen=True)
class Questions:
    """N questions."""

    words: Tensor  # (N, 3)
    truth: Tensor  # (N, 4) float64, p*
    label: Tensor  # (N,)

    def prompts(self) -> list[str]:
        """What the model reads."""
        return [
            " ".join(f"w{place}_{word}" for place, word in enumerate(row)) for row in self.words
        ]


class World:
    """The effects of the words, and questions about them."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(1000 + seed)
        self._recipe = recipe
        self._effects = recipe.effect * torch.randn(
            3, recipe.words, len(LETTERS), generator=self._generator, dtype=torch.float64
        )

    def questions(self, n: int) -> Questions:
        """New ones, with labels drawn from p*."""
        words = torch.randint(self._recipe.words, (n, 3), generator=self._generator)
        truth = sum(self._effects[place, words[:, place]] for place in range(3)).softmax(-1)
        label = torch.multinomial(truth, 1, generator=self._generator)[:, 0]
        return Questions(words, truth, label)

    def others(self, label: Tensor) -> Tensor:
        """Another letter than each label, evenly drawn."""
        step = torch.randint(1, len(LETTERS), label.shape, generator=self._generator)
        return (label + step) % len(LETTERS)


def make_tokenizer(recipe: Recipe) -> Any:
    """One token a word."""
    words = [f"w{place}_{word}" for place in range(3) for word in range(recipe.words)]
    vocabulary = {token: i for i, token in enumerate(["<|pad|>", _END, *LETTERS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token=_END, model_max_length=16
    )


def make_model(recipe: Recipe, tokenizer: Any, seed: int) -> Any:
    """A new Llama."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=2 * recipe.hidden_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=4,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batch(questions: Questions, tokenizer: Any, *, completion_only: bool) -> dict[str, Tensor]:
    """All of them as the model is given them; all have the same length."""
    texts = [
        f"{prompt} {LETTERS[label]} {_END}"
        for prompt, label in zip(questions.prompts(), questions.label, strict=True)
    ]
    ids = tokenizer(texts, return_tensors="pt")["input_ids"]
    n, at = len(ids), ids.shape[1] - 3  # where the letter is predicted
    labels = ids.clone()
    if completion_only:
        labels[:, : at + 1] = -100
    letters = torch.tensor(tokenizer.convert_tokens_to_ids(list(LETTERS)))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "choices": letters.expand(n, -1),
        "answer_position": torch.full((n,), at),
        "question": torch.arange(n),
    }


def batches(rows: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """In the order of the rows."""
    for start in range(0, len(rows["question"]), size):
        yield {name: column[start : start + size] for name, column in rows.items()}


def train(
    model: Any,
    rows: dict[str, Tensor],
    label: Tensor,
    recipe: Recipe,
    *,
    epochs: int,
    rate: float,
    seed: int,
    ece_weight: float | None = None,
    refresh: str = "epoch",
) -> Any:
    """A trained copy of `model`; with `ece_weight`, on the regulariser too."""
    model = patch_model(copy.deepcopy(model), smoothing=0.0).train()
    n = len(label)
    if ece_weight is not None:
        tokens = int((rows["labels"][:, 1:] != -100).sum())
        set_objective(model, CalibrationAware(tokens, ece_weight=ece_weight))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    steps = epochs * math.ceil(n / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 1 / steps, steps)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        if ece_weight is not None and (epoch == 0 or refresh == "epoch"):
            logits = choice_logits(model, batches(rows, 500), questions=n)
            binned = confidence_bins(choice_probabilities(logits, rows["choices"]), label)
        order = torch.randperm(n, generator=generator)
        for some in batches({name: x[order] for name, x in rows.items()}, recipe.batch_size):
            which = some.pop("question")
            if ece_weight is None:
                some = {k: some[k] for k in ("input_ids", "attention_mask", "labels")}
            else:
                some |= {"bin_right": binned.right[which], "bin_size": binned.size[which]}
            model(**some).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


def align(
    model: Any, questions: Questions, world: World, recipe: Recipe, tokenizer: Any, seed: int
) -> Any:
    """A copy of `model` after DPO."""
    rejected = world.others(questions.label)
    data = datasets.Dataset.from_dict(
        {
            "prompt": questions.prompts(),
            "chosen": [f" {LETTERS[label]}" for label in questions.label],
            "rejected": [f" {LETTERS[label]}" for label in rejected],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            copy.deepcopy(model),
            ref_model=copy.deepcopy(model),
            args=trl.DPOConfig(
                folder,
                beta=recipe.dpo_beta,
                learning_rate=recipe.dpo_rate,
                num_train_epochs=recipe.dpo_epochs,
                per_device_train_batch_size=recipe.batch_size,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                dataloader_pin_memory=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    aligned = copy.deepcopy(model)  # without what trainers leave on a model
    aligned.load_state_dict(trainer.model.state_dict())
    return aligned


def metrics(probabilities: Tensor, questions: Questions) -> dict[str, float]:
    """Of the answers to the test questions."""
    confidence, answer = probabilities.max(-1)
    correct = answer == questions.label
    rows = torch.arange(len(answer))
    return {
        "accuracy": correct.double().mean().item(),
        "expected_accuracy": questions.truth[rows, answer].mean().item(),
        "confidence": confidence.mean().item(),
        "ece": calibration_error(confidence, correct, bins=BINS),
        "classwise_ece": classwise_calibration_error(probabilities, questions.label, bins=BINS),
        "nll": -probabilities[rows, questions.label].log().mean().item(),
        "distance": (probabilities - questions.truth).abs().sum(-1).mean().item() / 2,
    }


def repetition(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Every model of one seed, asked the test questions."""
    world, tokenizer = World(recipe, seed), make_tokenizer(recipe)
    sft_data, preferences, tune_data = (world.questions(recipe.training) for _ in range(3))
    held_out, test = world.questions(recipe.held_out), world.questions(recipe.test)

    def logits(model: Any, questions: Questions) -> Tensor:
        rows = batch(questions, tokenizer, completion_only=True)
        return choice_logits(model, batches(rows, 500), questions=len(questions.label)).double()

    letters_alone = batch(tune_data, tokenizer, completion_only=True)
    everything = batch(tune_data, tokenizer, completion_only=False)
    sft = train(
        make_model(recipe, tokenizer, seed),
        batch(sft_data, tokenizer, completion_only=True),
        sft_data.label,
        recipe,
        epochs=recipe.sft_epochs,
        rate=recipe.sft_rate,
        seed=seed,
    )
    dpo = align(unpatch_model(sft), preferences, world, recipe, tokenizer, seed)
    tuning: dict[str, Any] = {"epochs": recipe.tune_epochs, "rate": recipe.tune_rate, "seed": seed}
    rcft = {"rows": everything, "label": tune_data.label, "recipe": recipe, **tuning}
    temperature = fit_temperature(logits(dpo, held_out), held_out.label)
    said = {
        "SFT": logits(sft, test),
        "DPO": logits(dpo, test),
        "temperature": logits(dpo, test) / temperature,
        "CFT": logits(train(dpo, letters_alone, tune_data.label, recipe, **tuning), test),
        "RCFT, E-step once": logits(
            train(dpo, **rcft, ece_weight=recipe.ece_weight, refresh="once"), test
        ),
        "RCFT": logits(train(dpo, **rcft, ece_weight=recipe.ece_weight), test),
        "no regulariser": logits(train(dpo, **rcft, ece_weight=0.0), test),
    }
    return {
        "seed": seed,
        "best_accuracy": test.truth.max(-1).values.mean().item(),
        "temperature": temperature,
        "models": {name: metrics(z.softmax(-1), test) for name, z in said.items()},
    }


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over the seeds of each metric of each model, with its 95% t-interval."""
    names = seeds[0]["models"]
    return {
        name: {
            metric: _interval([seed["models"][name][metric] for seed in seeds])
            for metric in names[name]
        }
        for name in names
    }


def differences(seeds: list[dict[str, Any]], to: str = "CFT") -> dict[str, Any]:
    """Mean over the seeds of what each model has more than another, which met the same questions."""
    return {
        name: {
            metric: _interval([s["models"][name][metric] - s["models"][to][metric] for s in seeds])
            for metric in ("accuracy", "ece", "classwise_ece", "nll")
        }
        for name in seeds[0]["models"]
        if name != to
    }


def _interval(values: list[float]) -> dict[str, float]:
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return {"mean": mean}
    half = scipy.stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def main() -> None:
    """Run every seed and write results/calibration_aware.json."""
    recipe, began = Recipe(), time.perf_counter()
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    where = machine() | {"transformers": transformers.__version__, "trl": trl.__version__}
    seeds: list[dict[str, Any]] = []
    for seed in track(range(recipe.seeds), "seeds"):
        seeds.append(repetition(recipe, seed))
        content = {
            "machine": where,
            "recipe": asdict(recipe) | {"bins": BINS},
            "seconds": time.perf_counter() - began,
            "summary": summary(seeds),
            "more_than_CFT": differences(seeds),
            "seeds": seeds,
        }
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(RESULTS)


if __name__ == "__main__":
    main()
