"""What `levelhead sft --calibration-aware` adds to a run: questions as tokens, E-steps, regimes."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

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
from levelhead.scoring import Prompter, Question

from ..errors import CliError
from ..examples import IDS, Collator, Encoder, Tokens
from .options import Options

_FILE = "expectation.safetensors"  # in a checkpoint: the result of the last E-step before it
_MODEL_INPUTS = ("input_ids", "labels", "attention_mask")
_HINT = (
    'each row must have "question", a text, "choices", a list of texts, and "answer": the letter, the '
    "index (from 0) or the text of the right choice"
)
_INT = pa.int32()


@dataclass(frozen=True)
class QuestionTokens(Tokens):
    """A multiple-choice question and its answer as the model reads them."""

    choices: list[int]  # the token of each letter, in the order in which the choices are shown
    answer: int  # index into them
    answer_position: int  # of the token that predicts the letter

    @property
    def supervised(self) -> int:
        """Positions with a loss; none if the answer was cut off."""
        return super().supervised if len(self.labels) > self.answer_position + 1 else 0


def question_encoder(tokenizer: Any, *, completion_only: bool) -> Encoder:
    """Return the encoder of questions: as `levelhead score` asks them, then the letter and EOS.

    Args:
        tokenizer: The model's.
        completion_only: Whether the letter and EOS alone have a loss, or every token.

    Raises:
        CliError: The tokenizer cannot do it.
    """
    if tokenizer.eos_token_id is None:
        raise CliError(
            "the tokenizer has no EOS token, so no answer could end; set its eos_token and save it again"
        )
    try:
        prompter = Prompter(tokenizer)
    except ValueError as error:
        raise CliError(str(error)) from error

    def encode(row: dict[str, Any]) -> QuestionTokens:
        question = Question.from_row(row)
        prompt = prompter(question)
        answer = prompt.order.index(question.answer)
        ids = [*prompt.input_ids, prompt.letter_ids[answer], tokenizer.eos_token_id]
        asked = len(prompt.input_ids)
        without = asked if completion_only else 1  # nothing predicts the first token
        labels = [IGNORE_INDEX] * without + ids[without:]
        return QuestionTokens(ids, labels, list(prompt.letter_ids), answer, asked - 1)

    schema = pa.schema(
        {"input_ids": IDS, "labels": IDS, "choices": IDS, "answer": _INT, "answer_position": _INT}
    )
    return Encoder(encode, _HINT, schema)


class QuestionCollator(Collator):
    """Pads questions; those of training come with what the objective and the E-step need.

    Args:
        padding: Token that fills up `input_ids`.
        width: C, the most choices that a question has.
    """

    def __init__(self, padding: int, width: int) -> None:
        super().__init__(padding)
        self._width = width

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return tensors (rows, tokens of the longest row); of numbered rows `choices`, (rows, C), too."""
        batch = super().__call__(rows)
        if "question" in rows[0]:
            choices = torch.full((len(rows), self._width), -1)
            for padded, row in zip(choices, rows, strict=True):
                padded[: len(row["choices"])] = torch.tensor(row["choices"])
            batch["choices"] = choices
            for name in ("answer_position", "question"):
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch


class Expectation(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Runs an E-step on all training questions where one is due, and hands out its result.

    When an E-step is due depends on the number of the optimiser step alone, and its result goes into the
    checkpoint, so that a run that is resumed is the same run. The first one also tells the regime before training.

    Args:
        options: The options of the run, completed.
        tables: Of QuestionTokens: "data", the training questions, and maybe "eval".

    Attributes:
        questions: The tables, each question with its number.
    """

    def __init__(self, options: Options, tables: dict[str, Dataset]) -> None:
        self.questions = {
            name: table.add_column("question", list(range(len(table))))
            for name, table in tables.items()
        }
        self._options = options
        self._before: Regime | None = None
        self._bins: BinCounts | None = None
        self._due = False

    @property
    def width(self) -> int:
        """C, the most choices that a question has."""
        return max(len(row) for table in self.questions.values() for row in table["choices"])

    def set_objective(self, model: nn.Module) -> None:
        """Make a patched model train on the loss of RCFT; for CFT it has the loss it needs."""
        options = self._options
        if options.calibration_aware == "rcft":
            labels = self.questions["data"].with_format("arrow")["labels"]
            tokens = sum(
                pc.sum(pc.not_equal(pc.list_flatten(part), IGNORE_INDEX)).as_py()
                for part in labels.chunks
            )
            rcft = CalibrationAware(
                tokens,
                ece_weight=options.ece_weight or 0.0,  # completed: not None
                classwise=options.ece == "classwise",
                label_smoothing=options.smoothing or 0.0,
            )
            set_objective(model, rcft)

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """Go on from the last E-step before the checkpoint."""
        if state.global_step:
            with safe_open(_path(args, state), "pt") as file:
                self._bins = BinCounts(*(file.get_tensor(name) for name in BinCounts._fields))
                self._before = Regime(**json.loads(file.metadata()["before"]))

    def on_step_begin(
        self, args: Any, state: TrainerState, _control: Any, *, train_dataloader: Any, **_: Any
    ) -> None:
        """Decide whether an E-step is due before this optimiser step."""
        every = self._options.em_refresh
        if every == "epoch":
            every = -(-len(train_dataloader) // args.gradient_accumulation_steps)
        step = state.global_step
        self._due = step % every == 0 if isinstance(every, int) else step == 0

    def on_save(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """Write the result of the last E-step into the checkpoint."""
        if args.should_save and self._bins is not None and self._before is not None:
            tensors = {name: x.cpu().contiguous() for name, x in self._bins._asdict().items()}
            metadata = {"before": json.dumps(asdict(self._before))}
            save_file(tensors, _path(args, state), metadata=metadata)

    def inputs(
        self, trainer: Trainer, model: nn.Module, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the model's inputs for a batch of training questions; run an E-step before if one is due."""
        if self._due:
            self._due = False
            self._estimate(trainer, model)
        inputs = {name: batch[name] for name in _MODEL_INPUTS}
        if self._options.calibration_aware == "cft" or self._bins is None:
            return inputs
        right, size = (x.to(batch["question"].device) for x in self._bins)
        return inputs | {
            "choices": batch["choices"],
            "answer_position": batch["answer_position"],
            "bin_right": right[batch["question"]],
            "bin_size": size[batch["question"]],
        }

    def regimes(self, trainer: Trainer) -> dict[str, Regime]:
        """Return the regimes before and after training, on the training questions and on those of --eval."""
        names = {"data": "training questions, after", "eval": "held-out questions, after"}
        found = {} if self._before is None else {"training questions, before": self._before}
        for name, table in self.questions.items():
            probabilities, _, answer = _answers(trainer, trainer.model_wrapped, table)
            found[names[name]] = self._regime(probabilities, answer)
        return found

    def _estimate(self, trainer: Trainer, model: nn.Module) -> None:
        probabilities, valid, answer = _answers(trainer, model, self.questions["data"])
        bins = classwise_bins if self._options.ece == "classwise" else confidence_bins
        self._bins = bins(probabilities, answer, valid=valid)
        if self._before is None:
            self._before = self._regime(probabilities, answer)

    def _regime(self, probabilities: Tensor, answer: Tensor) -> Regime:
        confidence, predicted = probabilities.max(-1)
        return calibration_regime(
            confidence, predicted == answer, critical_accuracy=self._options.critical_accuracy
        )


def _path(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE


def _answers(trainer: Trainer, model: nn.Module, table: Dataset) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities (N, C) of the choices of numbered questions, which exist, and the right ones (N,)."""
    logits = choice_logits(model, trainer.get_eval_dataloader(table), questions=len(table)).cpu()
    valid = ~logits.isneginf()
    probabilities = choice_probabilities(logits, torch.where(valid, 0, -1))
    return probabilities, valid, torch.tensor(table["answer"][:])
