"""What `levelhead sft --calibration-aware` adds to a run: the E-steps, and the regime before and after."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from levelhead.integrations import set_objective
from levelhead.objectives.calibration_aware import (
    BinCounts,
    choice_probabilities,
    classwise_bins,
    confidence_bins,
)
from levelhead.objectives.rcft import CalibrationAware, choice_logits
from levelhead.objectives.regime import Regime, calibration_regime
from levelhead.ops.checks import IGNORE_INDEX

from ..errors import CliError
from .tokens import Tokens

_FILE = "expectation.safetensors"  # in a checkpoint: what the last E-step before it found
_OF_RCFT = ("ece", "ece_weight", "em_refresh")
_MODEL_INPUTS = (*Tokens._fields, "attention_mask")


def complete(arguments: argparse.Namespace) -> None:
    """Sets what the options of calibration-aware fine-tuning leave open.

    Raises:
        CliError: They do not go together, or not with others.
    """
    method = arguments.calibration_aware
    given = [name for name in (*_OF_RCFT, "critical_accuracy") if vars(arguments)[name] is not None]
    if method is None:
        if given:
            raise CliError(f"{_named(given)} needs --calibration-aware cft or rcft")
        return
    if arguments.teacher:
        raise CliError(
            "--calibration-aware learns from answers, --teacher from a teacher; take one"
        )
    if method == "cft":
        if set(given) & set(_OF_RCFT):
            raise CliError(
                f"{_named([name for name in given if name in _OF_RCFT])} is of --calibration-aware rcft; "
                "cft has no regulariser"
            )
    elif arguments.temperature != 1 or arguments.softcap is not None:
        raise CliError(
            "--calibration-aware rcft calibrates the model as it will be used, and --temperature and "
            "--softcap hold in training alone; leave them out"
        )
    arguments.smoothing = arguments.smoothing or 0.0
    if method == "rcft":
        arguments.ece = arguments.ece or "confidence"
        arguments.ece_weight = 1.0 if arguments.ece_weight is None else arguments.ece_weight
        arguments.em_refresh = arguments.em_refresh or "epoch"


def _named(options: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in options)


class Expectation(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Lets the model answer all training questions where an E-step is due, and hands out what it found.

    An E-step depends on the number of the optimiser step alone, and goes into the checkpoint, so that
    a run that is resumed is the same run. The first one also tells the regime before training.

    Args:
        arguments: The command line, complete.
        tables: Of QuestionTokens: "data", the training questions, and maybe "eval".

    Attributes:
        questions: The tables, each question with its number.
    """

    def __init__(self, arguments: argparse.Namespace, tables: dict[str, Dataset]) -> None:
        self.questions = {
            name: table.add_column("question", list(range(len(table))))
            for name, table in tables.items()
        }
        self._arguments = arguments
        self._before: Regime | None = None
        self._found: BinCounts | None = None
        self._due = False

    @property
    def width(self) -> int:
        """C, the most choices that a question has."""
        return max(len(row) for table in self.questions.values() for row in table["choices"])

    def set_objective(self, model: Any) -> None:
        """Makes a patched model train on the loss of RCFT; for CFT it has the loss it needs."""
        arguments = self._arguments
        if arguments.calibration_aware == "rcft":
            labels = self.questions["data"].with_format("arrow")["labels"]
            tokens = sum(
                pc.sum(pc.not_equal(pc.list_flatten(part), IGNORE_INDEX)).as_py()
                for part in labels.chunks
            )
            rcft = CalibrationAware(
                tokens,
                ece_weight=arguments.ece_weight,
                classwise=arguments.ece == "classwise",
                label_smoothing=arguments.smoothing,
            )
            set_objective(model, rcft)

    def on_train_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Goes on from the last E-step before the checkpoint."""
        if state.global_step:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE
            with safe_open(path, "pt") as file:
                self._found = BinCounts(*(file.get_tensor(name) for name in BinCounts._fields))
                self._before = Regime(**json.loads(file.metadata()["before"]))

    def on_step_begin(
        self, args: Any, state: Any, _control: Any, *, train_dataloader: Any, **_: Any
    ) -> None:
        """Sees whether an E-step is due before this optimiser step."""
        every = self._arguments.em_refresh
        if every == "epoch":
            every = -(-len(train_dataloader) // args.gradient_accumulation_steps)
        step = state.global_step
        self._due = step % every == 0 if isinstance(every, int) else step == 0

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Writes into the checkpoint what the last E-step found."""
        if args.should_save and self._found is not None and self._before is not None:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE
            tensors = {name: x.cpu().contiguous() for name, x in self._found._asdict().items()}
            save_file(tensors, path, metadata={"before": json.dumps(asdict(self._before))})

    def inputs(self, trainer: Any, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a batch of training questions is to the model, after an E-step if one is due."""
        if self._due:
            self._due = False
            self._estimate(trainer, model)
        inputs = {name: batch[name] for name in _MODEL_INPUTS}
        if self._arguments.calibration_aware == "cft" or self._found is None:
            return inputs
        found = BinCounts(*(x.to(batch["question"].device) for x in self._found))
        inputs |= {name: batch[name] for name in ("choices", "answer_position")}
        return inputs | {
            "bin_right": found.right[batch["question"]],
            "bin_size": found.size[batch["question"]],
        }

    def regimes(self, trainer: Any) -> dict[str, Regime]:
        """Before and after training, on the training questions and on those of --eval."""
        names = {"data": "training questions, after", "eval": "held-out questions, after"}
        found = {} if self._before is None else {"training questions, before": self._before}
        for name, table in self.questions.items():
            probabilities, _, answer = _answers(trainer, trainer.model_wrapped, table)
            found[names[name]] = self._regime(probabilities, answer)
        return found

    def _estimate(self, trainer: Any, model: Any) -> None:
        probabilities, valid, answer = _answers(trainer, model, self.questions["data"])
        bins = classwise_bins if self._arguments.ece == "classwise" else confidence_bins
        self._found = bins(probabilities, answer, valid=valid)
        if self._before is None:
            self._before = self._regime(probabilities, answer)

    def _regime(self, probabilities: Tensor, answer: Tensor) -> Regime:
        confidence, said = probabilities.max(-1)
        critical_accuracy = self._arguments.critical_accuracy
        return calibration_regime(confidence, said == answer, critical_accuracy=critical_accuracy)


def _answers(trainer: Any, model: Any, table: Dataset) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (N, C) of the choices of numbered questions, which there are, and the right ones (N,)."""
    logits = choice_logits(model, trainer.get_eval_dataloader(table), questions=len(table)).cpu()
    valid = ~logits.isneginf()
    probabilities = choice_probabilities(logits, torch.where(valid, 0, -1))
    return probabilities, valid, torch.tensor(table["answer"][:])
