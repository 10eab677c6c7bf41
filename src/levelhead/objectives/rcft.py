"""RCFT at the head of a patched model: the loss of all tokens, and the ECE regulariser, in one pass without logits.

References:
    Xiao et al. 2025, https://arxiv.org/abs/2505.01997.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..heads.head import find_head, logit_stats_at
from ..ops import checks, linear_logit_stats
from ..ops.checks import IGNORE_INDEX
from ..ops.loss import token_loss
from ..ops.statistics import statistics_dtype
from .calibration_aware import choice_probabilities, classwise_ece_loss, ece_loss
from .checks import check_integers, outside, refuse, twice

_NO_CHOICE = "-1 stands for none"
_POSITION = "it is where the letter is predicted, one before where it stands in input_ids"


@dataclass(frozen=True)
class CalibrationAware:
    """What `levelhead.integrations.set_objective` makes a patched model train on for RCFT.

    The loss of a batch is that of an average over tokens, of which the training set has M:

        sum over the tokens of the batch of -log p, and M * ece_weight * `ece_loss` of each question,
        over the number of its tokens

    so that over all batches its mean is the mean of -log p plus `ece_weight` times the regulariser L,
    whatever the sizes of batches, accumulation and ranks. A batch holds, beside `input_ids` and `labels`:

    - `choices`, (B, C): vocabulary ids of the letters of each question, -1 for none;
    - `answer_position`, (B,): where the letter is predicted, one before where it stands in `input_ids`;
    - `bin_right` and `bin_size`, (B,), or (B, C) by class: what the E-step over the whole training
      set found for these questions; see `levelhead.objectives.calibration_aware`.

    Attributes:
        tokens: M, how many tokens of the training set have a label.
        ece_weight: lambda of the paper, at least 0.
        classwise: whether the regulariser is that of the classwise error.
        label_smoothing: of the loss of the tokens, in [0, 1]; the paper has none.
        columns: names of the four tensors above.

    Raises:
        ValueError: an attribute is out of its range.

    References:
        Xiao et al. 2025, https://arxiv.org/abs/2505.01997.

    Example:
        >>> model = set_objective(patch_model(model), CalibrationAware(tokens=120_000))
        >>> batch = {"input_ids": ids, "labels": ids, "choices": letters, "answer_position": at}
        >>> loss = model(**batch, bin_right=bins.right, bin_size=bins.size).loss
    """

    tokens: int
    ece_weight: float = 1.0
    classwise: bool = False
    label_smoothing: float = 0.0
    columns: ClassVar[tuple[str, ...]] = (
        "choices",
        "answer_position",
        "bin_right",
        "bin_size",
    )

    def __post_init__(self) -> None:
        in_range = (
            self.tokens >= 1 and 0 <= self.ece_weight < math.inf and 0 <= self.label_smoothing <= 1
        )
        if not in_range:
            raise ValueError(
                "tokens must be at least 1, ece_weight finite and at least 0, label_smoothing in [0, 1]; got "
                f"{self.tokens}, {self.ece_weight} and {self.label_smoothing}"
            )

    def __call__(
        self,
        input: Tensor,  # noqa: A002 (torch's argument name)
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        choices: Tensor,
        answer_position: Tensor,
        bin_right: Tensor,
        bin_size: Tensor,
    ) -> Tensor:
        """Loss of each token; that of a question is added at its answer.

        Args:
            input: hidden states, (B, T, D).
            linear_weight: the output embedding, (V, D).
            target: the token to predict at each position, (B, T), integer; -100 for none.
            linear_bias: (V,), or None.
            softcap: bound of the logits, or None.
            logit_scale: factor on projection and bias.
            choices: see the class; (B, C), integer.
            answer_position: see the class; (B,), integer.
            bin_right: see the class; (B,), or (B, C) by class, integer.
            bin_size: see the class; (B,), or (B, C) by class, integer.

        Returns:
            (B, T), nats and, at the answers, the scaled regulariser; float32, or float64 for float64 inputs.

        Raises:
            TypeError: as `levelhead.linear_logit_stats`, or a column is no tensor of integers.
            ValueError: the same, what the E-step found does not go with the choices, or a question has a choice twice.
            IndexError: a target or a choice is outside the vocabulary, or an answer outside the tokens. Where values
                are not looked at (on an accelerator, in a compiled graph) the losses of the row are NaN.
            RuntimeError: as `levelhead.linear_logit_stats`.
        """
        sound = _sound(input, linear_weight, target, choices, answer_position)
        there = torch.arange(target.shape[-1], device=input.device) == answer_position[:, None]
        answer_position = answer_position.clamp(0, target.shape[-1] - 1)
        letters = choices[:, None].where(there[..., None], -1)  # (B, T, C); -1 picks nothing
        stats = linear_logit_stats(
            input,
            linear_weight,
            torch.cat([target[..., None], letters], -1),
            linear_bias=linear_bias,
            softcap=softcap,
            logit_scale=logit_scale,
        )
        counts = target.long() != IGNORE_INDEX
        # Ignored positions may hold NaN: masked here, they have no gradient.
        fields = (stats.max, stats.relative_logsumexp, stats.picked[..., 0], stats.relative_mean)
        largest, logsumexp, picked, mean = (field.where(counts, 0) for field in fields)
        losses = token_loss(largest, logsumexp, picked, mean, self.label_smoothing, 0.0)
        rows = torch.arange(len(choices), device=input.device)
        picked = stats.picked[rows, answer_position, 1:]
        question = self.tokens * self.ece_weight * self._ece(picked, choices, bin_right, bin_size)
        return sound * (losses + question[:, None].where(there, 0))

    def _ece(self, picked: Tensor, choices: Tensor, right: Tensor, size: Tensor) -> Tensor:
        probabilities = choice_probabilities(picked, choices)
        if self.classwise:
            return classwise_ece_loss(probabilities, right, size)
        return ece_loss(probabilities, right, size, valid=choices >= 0)


def _sound(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor,
    choices: Tensor,
    answer_position: Tensor,
) -> Tensor:
    """Refuse columns that do not go with the tokens; return 1 for each row, (B, 1), NaN where nobody can look."""
    checks.check_tensor("input", input)
    checks.check_tensor("linear_weight", linear_weight)
    check_integers(target=target, choices=choices, answer_position=answer_position)
    if not (
        target.dim() == choices.dim() == 2
        and len(target) == len(choices)
        and answer_position.shape == choices.shape[:1]
    ):
        raise ValueError(
            "target must have shape (B, T), choices (B, C) and answer_position (B,), got "
            f"{tuple(target.shape)}, {tuple(choices.shape)} and {tuple(answer_position.shape)}"
        )
    entries, tokens = len(linear_weight), target.shape[1]
    counts, there = target.long() != IGNORE_INDEX, choices >= 0
    sound = torch.ones(len(target), 1, dtype=statistics_dtype(input.dtype), device=target.device)
    return refuse(
        sound,
        outside("target", target, entries, "-100 stands for none", there=counts),
        outside("choices", choices, entries, _NO_CHOICE, there=there),
        outside("answer_position", answer_position, tokens, _POSITION),
        twice("choices", choices, "each letter is another token"),
    )


@torch.no_grad()
def choice_logits(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, questions: int
) -> Tensor:
    """Logits of the choices of all training questions, for the E-step; the same on every rank.

    The model answers in eval mode, as it will be used. It may be wrapped (DDP, FSDP, DeepSpeed): then
    every rank takes its own batches, as many as the others, and each question is in one of them at least.
    No logits are made but those of the choices.

    Args:
        model: the model, or its wrapper; left in the mode it was in.
        batches: of questions, each with `input_ids`, `attention_mask`, `choices` and `answer_position` as of
            `CalibrationAware`, and `question`, (B,): which ones these are.
        questions: N, how many there are on all ranks.

    Returns:
        (N, C) float32, -inf for a choice that is not there; on the device of the batches.

    Raises:
        TypeError: a column is no tensor of integers.
        IndexError: a question is not one of N, its answer outside the tokens, or a choice outside the vocabulary.
        ValueError: `patch_model` would refuse the model.
        RuntimeError: a question was in no batch.
    """
    head = find_head(model)
    training = model.training
    model.eval()
    try:
        found: Tensor | None = None
        for batch in batches:
            choices, position = batch["choices"], batch["answer_position"]
            check_integers(choices=choices, answer_position=position, question=batch["question"])
            tokens = batch["input_ids"].shape[-1]
            # Also on an accelerator: an E-step is long enough to wait for it.
            outside("answer_position", position, tokens, _POSITION).look()
            outside("question", batch["question"], questions, "number all questions from 0").look()
            there, size = choices >= 0, head.transform.vocab_size or head.modules[0].out_features
            outside("choices", choices, size, _NO_CHOICE, there=there).look()
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            stats = logit_stats_at(model, head, inputs | {"use_cache": False}, position, choices)
            picked = stats.picked.float()
            if found is None:
                found = picked.new_full((questions, choices.shape[1]), -torch.inf)
            found[batch["question"]] = picked.masked_fill(~there, -torch.inf)
    finally:
        model.train(training)
    if found is None:
        raise RuntimeError("there is no batch of questions, so there is no E-step")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    missing = found.isneginf().all(-1)
    if missing.any():
        raise RuntimeError(
            f"question {int(missing.nonzero()[0])} of {questions} was in no batch "
            f"({int(missing.sum())} such); every question must be in one"
        )
    return found
