"""Calibration-aware fine-tuning on multiple-choice questions: the regulariser of RCFT.

The expected calibration error is made trainable as in an EM algorithm. The E-step sorts every training
question into bins of confidence and takes the accuracy of each bin; the M-step pulls the probabilities
of each question towards the accuracy of the bin it was sorted into. All it needs of the logits is those
of the letters at the position of the answer: `picked` of `levelhead.linear_logit_stats`.

    questions:  N, each with C choices; p_ij the probability of choice j, softmax over the C letters
    E-step:     k(i) the bin of max_j p_ij;  n_k the questions in bin k;  acc_k the share answered right
    M-step:     L = sum_i 1 / n_k(i) * sum_j (p_ij - t_ij)**2,  t_ij from acc_k(i), not differentiated

References:
    Xiao et al. Restoring calibration for aligned large language models: a calibration-aware fine-tuning
    approach. ICML 2025, https://arxiv.org/abs/2505.01997.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..calibration import reliability

# Of gamma, which puts the runner-up at tanh(log 3) = 0.8 where no answer of the bin was right, and higher elsewhere.
_LOG3 = math.log(3)


class BinCounts(NamedTuple):
    """What the E-step found for each of N questions, or for each of its C choices.

    Whole numbers, because FSDP and DeepSpeed round what a model is given in floating point.

    Attributes:
        right: questions in the bin whose answer is right, (N,); by class, questions in the bin whose
            answer is this choice, (N, C). int64.
        size: questions in the bin, at least 1, (N,); by class, (N, C), 0 for a choice that is not
            there. int64.
    """

    right: Tensor
    size: Tensor


def choice_probabilities(picked: Tensor, choices: Tensor) -> Tensor:
    """Probability of each choice of a question: the softmax over its letters alone.

    Args:
        picked: logits of the letters, (..., C): `LogitStats.picked` at the position that predicts the answer.
        choices: vocabulary ids of the letters, (..., C), integer; negative where a question has
            fewer choices than others.

    Returns:
        (..., C), in [0, 1], 0 where there is no choice; dtype of `picked`. Differentiable.

    Raises:
        ValueError: the shapes differ, or there is room for fewer than two choices.

    References:
        Xiao et al. 2025, https://arxiv.org/abs/2505.01997.

    Example:
        >>> import torch
        >>> choice_probabilities(torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[65, 66, -1]]))
        tensor([[0.5000, 0.5000, 0.0000]])
    """
    if picked.shape != choices.shape:
        raise ValueError(
            f"picked and choices must have the same shape, got {tuple(picked.shape)} and "
            f"{tuple(choices.shape)}; pass one logit for each letter of each question"
        )
    _check_choices(picked)
    return picked.masked_fill(choices < 0, -torch.inf).softmax(-1)


def confidence_bins(
    probabilities: Tensor, target: Tensor, *, bins: int = 10, valid: Tensor | None = None
) -> BinCounts:
    """E-step: how many questions are in each question's bin of confidence, and how many of them are right.

    Bins have equal width and hold their lower edge; the last one holds 1, too. Computed in float64.

    Args:
        probabilities: of all training questions, (N, C), in [0, 1].
        target: index of the right choice, (N,), integer in [0, C).
        bins: number of bins of [0, 1].
        valid: which choices there are, (N, C), bool; None: all of them.

    Returns:
        BinCounts, (N,), on the device of `probabilities`.

    Raises:
        TypeError: as `levelhead.calibration.reliability`.
        ValueError: shapes do not go together, there is no question, a probability is outside [0, 1] or
            NaN, or a target is not one of the choices.

    References:
        Xiao et al. 2025, https://arxiv.org/abs/2505.01997.

    Example:
        >>> import torch
        >>> p = torch.tensor([[0.95, 0.05], [0.92, 0.08], [0.4, 0.6]])
        >>> confidence_bins(p, torch.tensor([0, 1, 1]))
        BinCounts(right=tensor([1, 1, 1]), size=tensor([2, 2, 1]))
    """
    _check_questions(probabilities, target, valid)
    confidence, answer = probabilities.max(-1)
    counts = _of_bins(confidence, answer == target, bins)
    return BinCounts(*(column.to(probabilities.device) for column in counts))


def classwise_bins(
    probabilities: Tensor, target: Tensor, *, bins: int = 10, valid: Tensor | None = None
) -> BinCounts:
    """E-step by class: the bins of `confidence_bins` for the probability of each choice by itself.

    The regulariser it belongs to is that of the classwise error, the mean over the C choices. A
    choice counts among the questions that have it.

    Args:
        probabilities: as `confidence_bins`.
        target: as `confidence_bins`.
        bins: as `confidence_bins`.
        valid: as `confidence_bins`.

    Returns:
        BinCounts, (N, C), on the device of `probabilities`.

    Raises:
        TypeError: as `confidence_bins`.
        ValueError: as `confidence_bins`.

    References:
        Xiao et al. 2025, https://arxiv.org/abs/2505.01997.

    Example:
        >>> import torch
        >>> p = torch.tensor([[0.95, 0.05], [0.92, 0.08]])
        >>> classwise_bins(p, torch.tensor([0, 1]))
        BinCounts(right=tensor([[1, 1],
                [1, 1]]), size=tensor([[2, 2],
                [2, 2]]))
    """
    _check_questions(probabilities, target, valid)
    right = torch.zeros(probabilities.shape, dtype=torch.int64)
    size = torch.zeros_like(right)
    for choice in range(probabilities.shape[1]):
        there = slice(None) if valid is None else valid[:, choice].cpu()
        p, chosen = probabilities[:, choice].cpu()[there], (target == choice).cpu()[there]
        if len(p):
            right[there, choice], size[there, choice] = _of_bins(p, chosen, bins)
    return BinCounts(right.to(probabilities.device), size.to(probabilities.device))


def rank_preserving_target(
    probabilities: Tensor, accuracy: Tensor, *, valid: Tensor | None = None
) -> Tensor:
    """What the probabilities of a question should be, if its answer is right with probability `accuracy`.

    The likeliest choice (of equals, the first) gets `accuracy`; the others share the rest in the
    order they have. With s the second largest probability and m = C - 1 the number of the others,

        gamma = log(3) / (s * (1 - accuracy))
        a     = (1 - accuracy) / (m + sum of tanh(gamma * p_j) over the others)
        t_j   = a * (1 + tanh(gamma * p_j))

    so that the others sum to 1 - accuracy and lie in [a, 2a]. The paper has this for four choices. Of its
    two threes, the one added to the sum is m here; that of gamma stays, so that how the others compare with one
    another does not depend on how many there are. The likeliest choice may get less than others: where
    accuracy is 0, nothing.

    Args:
        probabilities: (..., C), in [0, 1].
        accuracy: of the bin of each question, (...), in [0, 1].
        valid: which choices there are, (..., C), bool; None: all of them. Where there is none: 0.

    Returns:
        (..., C), in [0, 1], sums to 1; dtype of `probabilities`; carries no gradient.

    Raises:
        ValueError: shapes do not go together, or there is room for fewer than two choices.

    References:
        Xiao et al. 2025, https://arxiv.org/abs/2505.01997.

    Example:
        >>> import torch
        >>> rank_preserving_target(torch.tensor([0.9, 0.06, 0.03, 0.01]), torch.tensor(0.6))
        tensor([0.6000, 0.1503, 0.1419, 0.1078])
    """
    _check_choices(probabilities)
    _check_shape("accuracy", accuracy, probabilities.shape[:-1])
    p, accuracy = probabilities.detach(), accuracy.detach()[..., None]
    choice = torch.arange(p.shape[-1], device=p.device)
    first = choice == p.argmax(-1, keepdim=True)
    others = ~first if valid is None else ~first & valid
    p_others = p.where(others, 0)
    second, rest = p_others.amax(-1, keepdim=True), 1 - accuracy
    # As shares of the runner-up: gamma itself may overflow, and 0 * inf is not a number.
    shares = p_others / second.where(second > 0, 1)
    bent = torch.tanh(_LOG3 * shares / rest.clamp_min(torch.finfo(rest.dtype).tiny))
    parts = (1 + bent).where(others, 0)
    # Without others there is nothing to divide by.
    return accuracy.where(first, rest * parts / parts.sum(-1, keepdim=True).clamp_min(1)).to(p)


def ece_loss(
    probabilities: Tensor, right: Tensor, size: Tensor, *, valid: Tensor | None = None
) -> Tensor:
    """M-step: the squared distance of each question to `rank_preserving_target`, over the size of its bin.

        loss_i = 1 / size_i * sum_j (p_ij - t_ij)**2,  t_i of the accuracy right_i / size_i

    Summed over all N training questions this is L, the sum over the bins of their means. A batch of B
    has about B / N of it.

    Args:
        probabilities: of the questions of a batch, (B, C).
        right: from the E-step over the whole training set, (B,).
        size: the same, (B,).
        valid: which choices there are, (B, C), bool; None: all of them.

    Returns:
        (B,), at least 0; dtype of `probabilities`, in which it is differentiable.

    Raises:
        ValueError: shapes do not go together, or there is room for fewer than two choices.

    References:
        Xiao et al. 2025, https://arxiv.org/abs/2505.01997.

    Example:
        >>> import torch
        >>> p = torch.tensor([[0.9, 0.1]])
        >>> ece_loss(p, right=torch.tensor([1]), size=torch.tensor([2]))
        tensor([0.1600])
    """
    _check_shape("right", right, probabilities.shape[:-1])
    _check_shape("size", size, probabilities.shape[:-1])
    target = rank_preserving_target(probabilities, _ratio(right, size, probabilities), valid=valid)
    return (probabilities - target).square().sum(-1) / size


def classwise_ece_loss(probabilities: Tensor, right: Tensor, size: Tensor) -> Tensor:
    """M-step by class: the squared distance of each probability to the frequency of its bin.

        loss_i = 1 / C * sum_j 1 / size_ij * (p_ij - right_ij / size_ij)**2

    Args:
        probabilities: of the questions of a batch, (B, C); C is that of the whole training set.
        right: from `classwise_bins` over the whole training set, (B, C).
        size: the same, (B, C); 0 where there is no choice, which has no loss.

    Returns:
        (B,), at least 0; dtype of `probabilities`, in which it is differentiable.

    Raises:
        ValueError: shapes do not go together, or there is room for fewer than two choices.

    References:
        Xiao et al. 2025, https://arxiv.org/abs/2505.01997.

    Example:
        >>> import torch
        >>> p = torch.tensor([[0.9, 0.1]])
        >>> classwise_ece_loss(p, right=torch.tensor([[1, 1]]), size=torch.tensor([[2, 2]]))
        tensor([0.0800])
    """
    _check_choices(probabilities)
    _check_shape("right", right, probabilities.shape)
    _check_shape("size", size, probabilities.shape)
    squares = (probabilities - _ratio(right, size, probabilities)).square()
    return (squares / size.clamp_min(1)).where(size > 0, 0).mean(-1)


def _ratio(right: Tensor, size: Tensor, like: Tensor) -> Tensor:
    return right.to(like.dtype) / size.clamp_min(1)


def _of_bins(confidence: Tensor, correct: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Right ones in the bin of each of N confidences, and all in it, (N,) int64 on the CPU."""
    confidence = confidence.detach().cpu().double()
    # A sum of float32 rounded up is no probability outside [0, 1].
    confidence = confidence.clamp(max=1)
    table = reliability(confidence, correct, bins=bins)
    index = torch.bucketize(confidence, table.edges[1:-1], right=True)
    right = (table.accuracy * table.count).nan_to_num().round().long()
    return right[index], table.count[index]


def _check_choices(values: Tensor) -> None:
    if values.ndim < 1 or values.shape[-1] < 2:
        raise ValueError(
            f"a question needs two choices at least, got shape {tuple(values.shape)}; the last dimension "
            "holds the choices"
        )


def _check_shape(name: str, values: Tensor, shape: torch.Size) -> None:
    if values.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} to go with the probabilities, got "
            f"{tuple(values.shape)}; pass what the E-step gave for these questions"
        )


def _check_questions(probabilities: Tensor, target: Tensor, valid: Tensor | None) -> None:
    if probabilities.ndim != 2 or target.shape != probabilities.shape[:1] or not len(target):
        raise ValueError(
            "probabilities must have shape (N, C) and target (N,), of one question at least, got "
            f"{tuple(probabilities.shape)} and {tuple(target.shape)}"
        )
    _check_choices(probabilities)
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(
            f"target must hold integers, the index of the right choice, got {target.dtype}"
        )
    inside = (target >= 0) & (target < probabilities.shape[1])
    if valid is not None:
        _check_shape("valid", valid, probabilities.shape)
        there = valid.gather(1, target.clamp(0, probabilities.shape[1] - 1).long()[:, None])[:, 0]
        inside = inside & there
    if not bool(inside.all()):
        first = int((~inside).nonzero()[0])
        raise ValueError(
            f"target is {int(target[first])} for question {first}, which has no such choice; it must be an "
            f"index from 0 on, below {probabilities.shape[1]}"
        )
