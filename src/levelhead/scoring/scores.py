"""How a model answers prompts: the statistics of its logits where it predicts the letter."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..heads.head import Head, find_head, logit_stats_at
from ..ops import LogitStats
from .prompts import Prompt

Confidence = Literal["msp", "choice_probability"]
_BATCHES_TO_SORT = 32  # by length, so that short prompts are not padded to the longest of all


class Score(NamedTuple):
    """How a model answered a question.

    With z the logits at the position that predicts the letter, and p = softmax(z):

    Attributes:
        question_id: of the question.
        group: of the question.
        answer: the letter of the right choice.
        prediction: the letter with the largest logit of all letters that were offered.
        correct: whether they are the same.
        confidence: `msp` or `choice_probability`, as was asked for.
        msp: maximum softmax probability, max_v p_v over the whole vocabulary.
        choice_probability: of `prediction`, by a softmax over the offered letters alone.
        max_logit: max_v z_v over the whole vocabulary, in nats.
        entropy: -sum_v p_v log p_v over the whole vocabulary, in nats.
        choice_logits: z of each offered letter, in nats.
        target: index of the right choice's letter: 0 for A.
        argmax_is_choice: whether no token has a larger logit than the one of `prediction`; if not,
            the model would have said something else, and `msp` is the probability of that.
        order: which choice of the data was shown behind each letter.
    """

    question_id: str
    group: str | None
    answer: str
    prediction: str
    correct: bool
    confidence: float
    msp: float
    choice_probability: float
    max_logit: float
    entropy: float
    choice_logits: list[float]
    target: int
    argmax_is_choice: bool
    order: list[int]


def score_prompts(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 8,
    confidence: Confidence = "msp",
    pad_token_id: int = 0,
) -> Iterator[Score]:
    """Yield the scores of prompts, in their order; the arguments are checked when the first is asked for.

    One forward of the backbone per batch, without the logits: the statistics are taken where the
    hidden states enter the head, at the last position, in float32 (float64 for float64 models).
    Batches are padded on the left, with `pad_token_id`, which no position attends to; a score does
    not depend on its batch beyond rounding. A question without an id gets its number, from 1 on.

    Raises:
        TypeError: `model` is no module.
        ValueError: an argument cannot be used, a prompt is longer than the model's
            max_position_embeddings, or a statistic is not finite.
        RuntimeError: the model does not call its head, or in a way that is not understood.
    """
    if confidence not in get_args(Confidence):
        valid = ", ".join(map(repr, get_args(Confidence)))
        raise ValueError(f"unknown confidence {confidence!r}; expected one of {valid}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    head = find_head(model)
    if model.training:
        raise ValueError(
            f"the {type(model).__name__} is in training mode, in which dropout would blur its "
            "scores; call model.eval() first"
        )
    if not head.transform.shift:
        raise ValueError(
            f"{type(head.model).__name__} is no causal language model: its loss does not take the "
            "logits of a position for the next token. Scoring knows causal ones only"
        )
    limit = position_limit(head.model)
    for number, prompt in enumerate(prompts, start=1):
        if limit is not None and len(prompt.input_ids) > limit:
            raise ValueError(
                f"the prompt of question {prompt.question.question_id or number} has "
                f"{len(prompt.input_ids)} tokens, more than the {limit} positions of the model; "
                "shorten the question, or leave it out"
            )
    window = batch_size * _BATCHES_TO_SORT
    for start in range(0, len(prompts), window):
        chunk = prompts[start : start + window]
        by_length = sorted(range(len(chunk)), key=lambda index: len(chunk[index].input_ids))
        scores: dict[int, Score] = {}
        for first in range(0, len(chunk), batch_size):
            indices = by_length[first : first + batch_size]
            batch = [chunk[index] for index in indices]
            stats = _stats(model, head, batch, pad_token_id)
            rows = _rows(stats)
            for index, prompt, row in zip(indices, batch, rows, strict=True):
                scores[index] = _score(prompt, str(start + index + 1), row, confidence)
        yield from (scores[index] for index in range(len(chunk)))


def position_limit(model: Any) -> int | None:
    """Return how many tokens a model of transformers, without a wrapper, can read; None: its config does not say."""
    config = model.config.get_text_config()
    limit: int | None = getattr(config, "max_position_embeddings", None)
    return limit


def _stats(model: nn.Module, head: Head, batch: list[Prompt], pad_token_id: int) -> LogitStats:
    """Return statistics of the logits at the last token of each prompt, (B,), picked (B, most letters)."""
    last = torch.full((len(batch),), -1)
    letters = _padded([prompt.letter_ids for prompt in batch], -1, "right")
    return logit_stats_at(model, head, _inputs(head.model, batch, pad_token_id), last, letters)


def _inputs(model: Any, batch: list[Prompt], pad_token_id: int) -> dict[str, Any]:
    """Return what the forward of `model` takes for prompts that end at the same position."""
    ids = [prompt.input_ids for prompt in batch]
    mask = _padded([[1] * len(row) for row in ids], 0, "left").to(model.device)
    inputs: dict[str, Any] = {
        "input_ids": _padded(ids, pad_token_id, "left").to(model.device),
        "attention_mask": mask,
        # Counted from the first token of each prompt, where the padding ends.
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "use_cache": False,
    }
    known = inspect.signature(type(model).forward).parameters
    return {name: value for name, value in inputs.items() if name in known}


def _padded(rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


class _Row(NamedTuple):
    logsumexp: float
    picked: list[float]
    max: float
    confidence: float
    entropy: float
    argmax: int


def _rows(stats: LogitStats) -> Iterator[_Row]:
    columns = (getattr(stats, field).tolist() for field in _Row._fields)
    return map(_Row._make, zip(*columns, strict=True))


def _score(prompt: Prompt, number: str, row: _Row, confidence: Confidence) -> Score:
    question, logits = prompt.question, row.picked[: len(prompt.letter_ids)]
    name = question.question_id or number
    if not all(map(math.isfinite, (row.logsumexp, row.entropy, row.max, *logits))):
        raise ValueError(
            f"the logits for question {name} are not finite: largest {row.max}, logsumexp "
            f"{row.logsumexp}, letters {logits}; check the model, and its dtype"
        )
    best = max(range(len(logits)), key=logits.__getitem__)
    target = prompt.order.index(question.answer)
    choice_probability = 1 / sum(math.exp(logit - logits[best]) for logit in logits)
    return Score(
        question_id=name,
        group=question.group,
        answer=ascii_uppercase[target],
        prediction=ascii_uppercase[best],
        correct=best == target,
        confidence=row.confidence if confidence == "msp" else choice_probability,
        msp=row.confidence,
        choice_probability=choice_probability,
        max_logit=row.max,
        entropy=row.entropy,
        choice_logits=logits,
        target=target,
        argmax_is_choice=row.argmax == prompt.letter_ids[best],
        order=list(prompt.order),
    )
