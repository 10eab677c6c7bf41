"""Multiple-choice questions through a causal language model: what it answers, and how sure it is.

The papers on calibration disagree about what confidence is: the largest probability or the largest
logit over the whole vocabulary where the model predicts the letter of its answer (Plaut et al.
2025), or a softmax over the letters alone (Xiao et al. 2025). A score has them all, from one pass
through the model, whose logits are never kept.

References:
    Plaut, Nguyen, Trinh. Probabilities of chat LLMs are miscalibrated but still predict correctness
    on multiple-choice Q&A. TMLR 2025, https://arxiv.org/abs/2402.13213
    Xiao et al. Restoring calibration for aligned large language models. ICML 2025,
    https://arxiv.org/abs/2505.01997
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ..heads.head import find_head
from .prompts import Phrasing, Prompter
from .questions import Question
from .scores import Confidence, Score, position_limit, score_prompts

__all__ = ["Prompter", "Question", "Score", "score_questions"]


def score_questions(
    model: nn.Module,
    tokenizer: Any,
    questions: Iterable[Question | Mapping[str, Any]],
    *,
    phrasing: Phrasing = "first",
    seed: int | None = 42,
    chat_template: bool | None = None,
    batch_size: int = 8,
    confidence: Confidence = "msp",
) -> Iterator[Score]:
    """Yield how a model answers multiple-choice questions, one score each, in their order.

    Each question is asked once, with its options behind the letters A, B, ... in an order drawn by
    the seed; the answer is the letter with the largest logit after the prompt. See `Score` for what
    is measured, `Prompter` for how it is asked. All questions are read and checked before the first
    is scored. One forward of the backbone per batch; the logits are never kept.

    Args:
        model: a causal language model in eval mode, whose head `levelhead.patch_model` would take.
        tokenizer: the model's own.
        questions: `Question` objects, or rows as `Question.from_row` takes them; one without an id
            gets its number, from 1 on.
        phrasing: "first" or "second" of two ways to ask.
        seed: of the order of the options; None: the order of the data.
        chat_template: whether to ask in a chat; None: if the tokenizer has a template.
        batch_size: questions per forward.
        confidence: "msp" or "choice_probability": what `Score.confidence` shall be.

    Yields:
        Scores, from statistics in float32 (float64 for float64 models).

    Raises:
        TypeError: `model` is no module.
        ValueError: an argument or a question cannot be used; a question is named by its number.
        RuntimeError: the model does not call its head, or in a way that is not understood.

    References:
        Plaut et al. 2025, https://arxiv.org/abs/2402.13213 ("msp"). Xiao et al. 2025,
        https://arxiv.org/abs/2505.01997 ("choice_probability").

    Example:
        >>> rows = [{"question": "2 + 2?", "choices": ["3", "4"], "answer": "4"}]
        >>> scores = list(score_questions(model.eval(), tokenizer, rows))
        >>> error = calibration_error([s.confidence for s in scores], [s.correct for s in scores])
    """
    prompter = Prompter(
        tokenizer,
        phrasing=phrasing,
        seed=seed,
        chat_template=chat_template,
        max_length=position_limit(find_head(model).model),
    )
    prompts = []
    for number, row in enumerate(questions, start=1):
        try:
            question = row if isinstance(row, Question) else Question.from_row(row)
            prompts.append(prompter(question))
        except ValueError as error:
            raise ValueError(f"question {number}: {error}") from error
    yield from score_prompts(
        model,
        prompts,
        batch_size=batch_size,
        confidence=confidence,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
