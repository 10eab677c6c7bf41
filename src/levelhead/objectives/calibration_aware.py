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
from ..calibration.predictions import as_tensor
from ..ops.statistics import statistics_dtype
from .checks import (
    Wrong,
    check_choices,
    check_floats,
    check_integers,
    check_shape,
    few_choices,
    no_probability,
    refuse,
    which_choices,
)

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
    """Return the probability of each choice of a question: the softmax over its letters alone.

    Args:
        picked: logits of the letters, (..., C): `LogitStats.picked` at the position that predicts the answer.
        choices: vocabulary ids of the letters, (..., C), integer; negative where a question has
            fewer choices than others, which may then hold any logit.

    Returns:
        (..., C), in [0, 1], 0 where there is no choice; dtype of `picked`. Differentiable. NaN where a
        logit of the question is NaN or +inf, or all are -inf.

    Raises:
        TypeError: `picked` is not floating point, or `choices` not integer.
        ValueError: shapes or devices differ, or a question has fewer than two choices. Values on an
            accelerator, or in a compiled graph, are not looked at; there such a question gets NaN.

    Example:
        >>> import torch
        >>> choice_probabilities(torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[65, 66, -1]]))
        tensor([[0.5000, 0.5000, 0.0000]])
    """
    check_floats(picked=picked)
    check_integers(choices=choices)
    if picked.shape != choices.shape:
        raise ValueError(
            f"picked and choices must have the same shape, got {tuple(picked.shape)} and "
            f"{tuple(choices.shape)}; pass one logit for each letter of each question"
        )
    if picked.device != choices.device:
        raise ValueError(
            f"picked is on {picked.device} but choices is on {choices.device}; move one"
        )
    check_choices(picked)
    there = choices >= 0
    nothing = picked.new_full(there.shape, -torch.inf)
    return picked.where(there, refuse(nothing, few_choices(there))).softmax(-1)


def confidence_bins(
    probabilities: Tensor, target: Tensor, *, bins: int = 10, valid: Tensor | None = None
) -> BinCounts:
    """E-step: count the questions in each question's bin of confidence, and how many of them are right.

    Bins have equal width and hold their lower edge; the last one holds 1, too. Computed in float64.

    Args:
        probabilities: of all training questions, (N, C), in [0, 1].
        target: index of the right choice, (N,), integer in [0, C).
        bins: number of bins of [0, 1].
        valid: which choices there are, (N, C), bool; None: all of them. Where there is none,
            `probabilities` may hold anything.

    Returns:
        BinCounts, (N,), on the device of `probabilities`.

    Raises:
        TypeError: as `levelhead.calibration.reliability`, or what is given is no tensor or of another dtype.
        ValueError: shapes do not go together, there is no question, one has fewer than two choices, a
            probability is outside [0, 1] or NaN, or a target is not one of the choices.

    Example:
        >>> import torch
        >>> p = torch.tensor([[0.95, 0.05], [0.92, 0.08], [0.4, 0.6]])
        >>> confidence_bins(p, torch.tensor([0, 1, 1]))
        BinCounts(right=tensor([1, 1, 1]), size=tensor([2, 2, 1]))
    """
    p, answer, there = _questions(probabilities, target, valid)
    confidence, predicted = p.masked_fill(~there, -1).max(-1)
    counts = _of_bins(confidence, predicted == answer, bins)
    return BinCounts(*(column.to(probabilities.device) for column in counts))


def classwise_bins(
    probabilities: Tensor, target: Tensor, *, bins: int = 10, valid: Tensor | None = None
) -> BinCounts:
    """E-step of the classwise error: the bins of `confidence_bins` for each choice by itself.

    Args:
        probabilities: as `confidence_bins`.
        target: as `confidence_bins`.
        bins: as `confidence_bins`.
        valid: as `confidence_bins`; a choice counts among the questions that have it.

    Returns:
        BinCounts, (N, C), on the device of `probabilities`.

    Raises:
        TypeError: as `confidence_bins`.
        ValueError: as `confidence_bins`.

    Example:
        >>> import torch
        >>> p = torch.tensor([[0.95, 0.05], [0.92, 0.08]])
        >>> classwise_bins(p, torch.tensor([0, 1])).size.tolist()
        [[2, 2], [2, 2]]
    """
    p, answer, there = _questions(probabilities, target, valid)
    right = torch.zeros(p.shape, dtype=torch.int64)
    size = torch.zeros_like(right)
    for choice, rows in enumerate(there.unbind(1)):
        if rows.any():
            counts = _of_bins(p[rows, choice], (answer == choice)[rows], bins)
            right[rows, choice], size[rows, choice] = counts
    return BinCounts(right.to(probabilities.device), size.to(probabilities.device))


def rank_preserving_target(
    probabilities: Tensor, accuracy: Tensor, *, valid: Tensor | None = None
) -> Tensor:
    """Return what the probabilities of a question should be, if its answer is right with probability `accuracy`.

    The likeliest choice (of equals, the first) gets `accuracy`; the others share the rest in the
    order they have. With s the second largest probability and m = C - 1 the number of the others,

        gamma = log(3) / (s * (1 - accuracy))
        a     = (1 - accuracy) / (m + sum of tanh(gamma * p_j) over the others)
        t_j   = a * (1 + tanh(gamma * p_j))

    so that the others sum to 1 - accuracy and lie in [a, 2a]. The paper has this for four choices. Of its
    two threes, the one added to the sum is m here; that of gamma stays, so that how the others compare
    does not depend on their number. The likeliest choice may get less than others: where accuracy is 0, nothing.

    Args:
        probabilities: (..., C), in [0, 1].
        accuracy: of the bin of each question, (...), in [0, 1].
        valid: which choices there are, (..., C), bool; None: all of them. Where there is none,
            `probabilities` may hold anything.

    Returns:
        (..., C), in [0, 1], sums to 1; 0 where there is no choice; dtype of `probabilities`; carries no
        gradient.

    Raises:
        TypeError: what is given is no tensor, or of another dtype.
        ValueError: shapes or devices do not go together, a question has fewer than two choices, or a
            probability or an accuracy is NaN or outside [0, 1]. Values on an accelerator, or in a
            compiled graph, are not looked at; there they make the targets of their question NaN.

    Example:
        >>> import torch
        >>> rank_preserving_target(torch.tensor([0.9, 0.06, 0.03, 0.01]), torch.tensor(0.6))
        tensor([0.6000, 0.1503, 0.1419, 0.1078])
    """
    there = which_choices(probabilities, valid)
    check_floats(accuracy=accuracy)
    check_shape("accuracy", accuracy, probabilities.shape[:-1], probabilities.device)
    accuracy = accuracy.detach()
    no_accuracy = Wrong(
        ~torch.logical_and(accuracy >= 0, accuracy <= 1),
        accuracy,
        lambda at, found: (
            f"accuracy{at} is {found:g}, outside [0, 1]; pass the share of right answers of the bin"
        ),
    )
    p = probabilities.detach()
    checked = refuse(accuracy[..., None], no_accuracy, few_choices(there), no_probability(p, there))
    return _target(p, checked, there)


def _target(p: Tensor, accuracy: Tensor, there: Tensor) -> Tensor:
    """The target (..., C) of checked questions, given the accuracy (..., 1)."""
    choice = torch.arange(p.shape[-1], device=p.device)
    first = choice == p.masked_fill(~there, -1).argmax(-1, keepdim=True)
    others = torch.logical_and(~first, there)
    p_others = p.where(others, 0)
    second, rest = p_others.amax(-1, keepdim=True), 1 - accuracy
    # As shares of the runner-up: gamma itself may overflow, and 0 * inf is not a number.
    shares = p_others / second.where(second > 0, 1)
    bent = torch.tanh(_LOG3 * shares / rest.clamp_min(torch.finfo(rest.dtype).tiny))
    parts = (1 + bent).where(others, 0)
    return accuracy.where(first, rest * parts / parts.sum(-1, keepdim=True)).to(p)


def ece_loss(
    probabilities: Tensor, right: Tensor, size: Tensor, *, valid: Tensor | None = None
) -> Tensor:
    """M-step: the squared distance of each question to `rank_preserving_target`, over the size of its bin.

        loss_i = 1 / size_i * sum_j (p_ij - t_ij)**2,  t_i of the accuracy right_i / size_i

    Summed over all N training questions this is L, the sum over the bins of their means. A batch of B
    has about B / N of it.

    Args:
        probabilities: of the questions of a batch, (B, C), in [0, 1].
        right: from the E-step over the whole training set, (B,), integer in [0, size].
        size: the same, (B,), integer, at least 1.
        valid: as `rank_preserving_target`.

    Returns:
        (B,), at least 0; dtype of `probabilities`, in which it is differentiable.

    Raises:
        TypeError: as `rank_preserving_target`.
        ValueError: as `rank_preserving_target`, or no bin has these numbers of questions. Where
            values are not looked at, the loss of the question is NaN.

    Example:
        >>> import torch
        >>> ece_loss(torch.tensor([[0.9, 0.1]]), right=torch.tensor([1]), size=torch.tensor([2]))
        tensor([0.1600])
    """
    there = which_choices(probabilities, valid)
    _check_counts(right, size, probabilities.shape[:-1], probabilities.device)
    p = probabilities.to(statistics_dtype(probabilities.dtype)).where(there, 0)
    accuracy = refuse(
        (right.to(p.dtype) / size)[..., None],
        *_no_bins(right, size, least=1),
        few_choices(there),
        no_probability(probabilities, there),
    )
    losses = (p - _target(p.detach(), accuracy, there)).square().sum(-1) / size
    return losses.to(probabilities.dtype)


def classwise_ece_loss(probabilities: Tensor, right: Tensor, size: Tensor) -> Tensor:
    """M-step of the classwise error: the squared distance of each probability to the frequency of its bin.

        loss_i = 1 / C * sum_j 1 / size_ij * (p_ij - right_ij / size_ij)**2

    Args:
        probabilities: of the questions of a batch, (B, C), in [0, 1]; C is that of the whole training set.
        right: from `classwise_bins` over the whole training set, (B, C), integer in [0, size].
        size: the same, (B, C), integer; 0 where there is no choice, which has no loss, whatever
            `probabilities` holds.

    Returns:
        (B,), at least 0; dtype of `probabilities`, in which it is differentiable.

    Raises:
        TypeError: as `ece_loss`.
        ValueError: as `ece_loss`.

    Example:
        >>> import torch
        >>> p = torch.tensor([[0.9, 0.1]])
        >>> classwise_ece_loss(p, right=torch.tensor([[1, 1]]), size=torch.tensor([[2, 2]]))
        tensor([0.0800])
    """
    which_choices(probabilities, None)
    _check_counts(right, size, probabilities.shape, probabilities.device)
    there = torch.logical_or(right != 0, size != 0)
    p = probabilities.to(statistics_dtype(probabilities.dtype)).where(there, 0)
    frequency = refuse(
        (right.to(p.dtype) / size).where(there, 0),
        *_no_bins(right, size, least=0),
        no_probability(probabilities, there),
    )
    squares = (p - frequency).square() / size.where(there, 1)
    return squares.mean(-1).to(probabilities.dtype)


def _of_bins(confidence: Tensor, correct: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Right ones in the bin of each of N confidences, and all in it, (N,) int64."""
    table = reliability(confidence, correct, bins=bins)
    index = torch.bucketize(confidence, table.edges[1:-1], right=True)
    return table.right[index], table.count[index]


def _check_counts(right: Tensor, size: Tensor, shape: torch.Size, device: torch.device) -> None:
    check_integers(right=right, size=size)
    check_shape("right", right, shape, device)
    check_shape("size", size, shape, device)


def _no_bins(right: Tensor, size: Tensor, *, least: int) -> tuple[Wrong, Wrong]:
    """Bins of fewer than `least` questions, and those with more right answers than questions."""
    too_small = Wrong(
        size < least,
        size,
        lambda at, found: (
            f"size{at} is {found}, below {least}; pass what the E-step found for these questions"
        ),
    )
    impossible = Wrong(
        torch.logical_or(right < 0, right > size),
        right,
        lambda at, found: (
            f"right{at} is {found}, outside [0, size]; pass what the E-step found for these questions"
        ),
    )
    return too_small, impossible


def _questions(
    probabilities: Tensor, target: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked questions on the CPU: probabilities (N, C) float64, answers (N,), and which choices there are (N, C)."""
    there = which_choices(probabilities, valid)
    check_integers(target=target)
    if probabilities.ndim != 2 or target.shape != probabilities.shape[:1] or not len(target):
        raise ValueError(
            "probabilities must have shape (N, C) and target (N,), of one question at least, got "
            f"{tuple(probabilities.shape)} and {tuple(target.shape)}"
        )
    p, answer = as_tensor("probabilities", probabilities), as_tensor("target", target).long()
    there = there.cpu()
    refuse(p, few_choices(there), no_probability(p, there))
    inside = (answer >= 0) & (answer < p.shape[1])
    inside &= there.gather(1, answer.clamp(0, p.shape[1] - 1)[:, None])[:, 0]
    if not bool(inside.all()):
        first = int((~inside).nonzero()[0])
        raise ValueError(
            f"target is {int(answer[first])} for question {first}, which has no such choice; it must be an "
            f"index from 0 on, below {p.shape[1]}"
        )
    # A sum of float32 rounded up is no probability outside [0, 1].
    return p.double().clamp(max=1), answer, there
