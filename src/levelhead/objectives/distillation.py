"""Distillation from a teacher's few largest probabilities: the loss of FIRST, without the student's logits.

References:
    Shum et al. 2024, https://arxiv.org/abs/2408.12168 (FIRST).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, logical_and

from ..calibration.predictions import check_choice
from ..ops import checks, linear_logit_stats
from ..ops.api import Impl, _autocast
from ..ops.checks import IGNORE_INDEX
from ..ops.gather import linear_gather
from ..ops.statistics import statistics_dtype
from .checks import (
    check_floats,
    no_candidates,
    no_log_probs,
    outside,
    refuse,
    twice,
)

Normalisation = Literal["renormalised", "full", "other"]
Reduction = Literal["mean", "sum", "batchmean", "none"]


class _Student(NamedTuple):
    """What the student's logits are made of."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    softcap: float | None
    logit_scale: float
    impl: Impl | None = None


_PAD = (
    "give each candidate once, pad with the log-probability -inf, and mark a token without a teacher by ignore_index "
    "as its first id"
)

# The least probability that 1 - sum resolves, beside a logsumexp of some tens.
_FLOOR = {torch.float32: 1e-6, torch.float64: 1e-14}


def distillation_loss(
    input: Tensor,  # noqa: A002 (torch's argument name)
    linear_weight: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    *,
    normalisation: Normalisation = "renormalised",
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    impl: Impl | None = None,
) -> Tensor:
    r"""Divergence of a student from the k largest probabilities of a teacher, without the student's logits in memory.

    Per token, ``KL(t || s) = sum_j t_j (log t_j - log s_j)`` in nats, with the student's logits ``z`` (see
    :func:`levelhead.linear_logit_stats`) at the teacher's ids, and

    - ``"renormalised"``: ``t`` and ``s`` are both scaled to sum to one over the k ids. The logsumexp cancels, and the
      loss takes k dot products a token instead of V.
    - ``"full"``: ``s`` is the student's softmax over the vocabulary; ``t``, scaled to sum to one, has no mass
      elsewhere.
    - ``"other"``: both keep their probabilities, and what is left of the vocabulary is one more bucket, ``1 - sum``.

    Precision: that of :func:`levelhead.linear_logit_stats`, all of it in logarithms, but for the student's other
    bucket. Its probability ``p`` is what the sum leaves of one, so with a teacher's ``t`` loss and gradient are off by
    up to some ``3e-7 t / p`` (float32; ``1e-15 t / p`` in float64). Where ``p`` is below 1e-6 (1e-14) it is taken for
    1e-6: the loss is then ``t log(1e-6 / p)`` nats too small, and the gradient of the other logits ``1e-6 / p`` times.

    Args:
        input: the student's hidden states, shape ``(..., D)``.
        linear_weight: its output embedding, shape ``(V, D)``; for DTensors see :func:`levelhead.linear_cross_entropy`.
        teacher_ids: distinct ids of the teacher's k largest probabilities, shape ``(..., k)``, integer. A token whose
            first id is ``ignore_index`` counts nowhere, whatever else it holds.
        teacher_log_probs: their log-probabilities over the whole vocabulary, shape ``(..., k)``. Not differentiated.
            -inf pads: there is no candidate, whatever id stands there. A token that counts has one at least.
        normalisation: ``"renormalised"``, ``"full"`` or ``"other"``.
        linear_bias: shape ``(V,)``.
        softcap: bound of the student's logits, ``> 0``; None for none.
        logit_scale: factor on projection and bias; the inverse of a temperature.
        ignore_index: see ``teacher_ids``.
        reduction: ``"mean"`` over the tokens that count (NaN if none does), ``"sum"``, ``"none"``, or ``"batchmean"``,
            the sum over the tokens and the mean over the first dimension (NaN if it is empty), as in the paper.
        impl: see :func:`levelhead.linear_logit_stats`.

    Returns:
        A scalar, or the loss of each token, shape ``(...)``; in [0, inf) up to rounding; float32, or float64 for
        float64 inputs.

    Raises:
        TypeError: what is no tensor; a dtype that is not supported, or dtypes that do not go together.
        ValueError: shapes or devices that do not go together; an option out of its range; a token that counts with an
            id twice, with no candidate, or with log-probabilities that are NaN or of a sum above 1.
        IndexError: an id of a candidate outside ``[0, V)``.

        What is wrong with ids or log-probabilities raises where no host synchronisation is needed to look at them
        (eager CPU). Elsewhere it makes the token's loss NaN.

    References:
        Shum et al. 2024, https://arxiv.org/abs/2408.12168 (FIRST).

    Example:
        >>> import torch
        >>> from levelhead.ops import linear_topk
        >>> teacher, student, weight = torch.randn(7, 8), torch.randn(7, 8), torch.randn(32, 8)
        >>> top = linear_topk(teacher, weight, k=5)
        >>> distillation_loss(student, weight, top.indices, top.log_probs).shape
        torch.Size([])
    """
    _check(input, linear_weight, linear_bias, teacher_ids, teacher_log_probs)
    check_choice("normalisation", normalisation, get_args(Normalisation))
    check_choice("reduction", reduction, get_args(Reduction))
    checks.check_ignore_index(ignore_index)
    if reduction == "batchmean" and input.dim() < 2:
        raise ValueError(
            "reduction='batchmean' needs a first dimension of tokens, and input of shape "
            f"{tuple(input.shape)} is one token; use 'sum'"
        )
    student = _Student(input, linear_weight, linear_bias, softcap, logit_scale, impl)
    # Beside a narrow dtype torch wraps a number around before it compares.
    counts = teacher_ids[..., 0].long() != ignore_index
    losses = _losses(student, teacher_ids, teacher_log_probs, counts, normalisation)
    if reduction == "none":
        return losses
    if reduction == "mean":
        return losses.sum() / counts.sum()
    return losses.sum() / (len(losses) if reduction == "batchmean" else 1)


@dataclass(frozen=True)
class Distillation:
    """:func:`distillation_loss` as the objective of a patched model; see `levelhead.integrations.set_objective`.

    Precision and units are those of :func:`distillation_loss`: float32 (float64 for float64 inputs), nats.

    Attributes:
        normalisation: ``"renormalised"``, ``"full"`` or ``"other"``.
        columns: what a training batch holds beside its labels, aligned with what each position predicts:
            ``teacher_ids`` (B, T, k), -100 where there is no teacher, and ``teacher_log_probs`` (B, T, k), as float32
            or as its bits in int32, which FSDP and DeepSpeed do not round as they round inputs.

    Raises:
        ValueError: ``normalisation`` is unknown.

    Example:
        >>> model = set_objective(patch_model(model), Distillation("renormalised"))
        >>> batch = {"input_ids": ids, "labels": ids, "teacher_ids": top.indices}
        >>> loss = model(**batch, teacher_log_probs=top.log_probs).loss
    """

    normalisation: Normalisation = "renormalised"
    columns: ClassVar[tuple[str, ...]] = ("teacher_ids", "teacher_log_probs")

    def __post_init__(self) -> None:
        check_choice("normalisation", self.normalisation, get_args(Normalisation))

    def __call__(
        self,
        input: Tensor,  # noqa: A002
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        teacher_ids: Tensor,
        teacher_log_probs: Tensor,
    ) -> Tensor:
        """Return the loss of each token.

        Args:
            input: the student's hidden states, shape ``(..., T, D)``.
            linear_weight: its output embedding, shape ``(V, D)``.
            target: the token to predict at each position, shape ``(..., T)``, of which only -100, for none, counts.
            linear_bias: shape ``(V,)``, or None.
            softcap: bound of the student's logits, or None.
            logit_scale: factor on projection and bias.
            teacher_ids: shape ``(..., T, k)``, integer.
            teacher_log_probs: shape ``(..., T, k)``, float32 or its bits in int32.

        Returns:
            Nats, shape ``(..., T)``; 0 where the target is -100; float32, or float64 for float64 inputs.

        Raises:
            TypeError: as :func:`distillation_loss`.
            ValueError: as :func:`distillation_loss`.
            IndexError: as :func:`distillation_loss`.
        """
        checks.check_tensor("teacher_log_probs", teacher_log_probs)
        if teacher_log_probs.dtype == torch.int32:
            teacher_log_probs = teacher_log_probs.view(torch.float32)
        _check(input, linear_weight, linear_bias, teacher_ids, teacher_log_probs)
        counts = logical_and(
            teacher_ids[..., 0].long() != IGNORE_INDEX, target.long() != IGNORE_INDEX
        )
        student = _Student(input, linear_weight, linear_bias, softcap, logit_scale)
        return _losses(student, teacher_ids, teacher_log_probs, counts, self.normalisation)


def _losses(
    student: _Student,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    counts: Tensor,
    normalisation: Normalisation,
) -> Tensor:
    """Return the loss of each token, (...), 0 where it does not count."""
    # Tokens that count nowhere may hold NaN: student and teacher become uniform there, with a sum that is below 1 for
    # any k. The logarithm of k would be a constant to the compiler.
    teacher = teacher_log_probs.detach().to(statistics_dtype(student.input.dtype))
    row = counts[..., None]
    teacher = teacher.where(row, -30)
    candidates = teacher != -torch.inf
    there = logical_and(row, candidates)
    ids = teacher_ids.long().where(there, -1)  # which picks nothing
    teacher = refuse(
        teacher,
        outside("teacher_ids", ids, len(student.linear_weight), _PAD, there=there),
        twice("teacher_ids", ids, _PAD),
        no_candidates(candidates),
        no_log_probs(teacher),
    )
    pick = _picked if normalisation == "renormalised" else _picked_of_all
    picked, logsumexp = pick(student, ids)
    if logsumexp is not None:
        logsumexp = logsumexp.where(counts, 0)
    picked = picked.where(row, 0).where(candidates, -torch.inf)  # no candidate is in no sum
    return _divergence(teacher, picked, logsumexp, normalisation).where(counts, 0)


def _picked_of_all(student: _Student, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the student's logits at ``ids``, (..., k), and their logsumexp over the vocabulary, relative to max."""
    stats = linear_logit_stats(
        student.input,
        student.linear_weight,
        ids,
        linear_bias=student.linear_bias,
        softcap=student.softcap,
        logit_scale=student.logit_scale,
        impl=student.impl,
    )
    return stats.picked - stats.max[..., None], stats.relative_logsumexp


def _picked(student: _Student, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the student's logits at ``ids`` alone, without a pass over the vocabulary."""
    input, linear_weight, linear_bias, softcap, logit_scale, impl = student  # noqa: A001
    if checks.any_dtensor(linear_weight):  # whose rows lie on several ranks
        return _picked_of_all(student, ids)[0], None
    x = _autocast(input)
    checks.check_options(softcap, logit_scale, impl, x)
    softcap = None if softcap is None else float(softcap)
    flat = (x.reshape(-1, x.shape[-1]), linear_weight, ids.reshape(-1, ids.shape[-1]))
    return linear_gather(*flat, linear_bias, softcap, float(logit_scale)).view_as(ids), None


def _divergence(
    teacher: Tensor, picked: Tensor, logsumexp: Tensor | None, normalisation: Normalisation
) -> Tensor:
    """Return KL(teacher || student) of log-probabilities and logits (..., k) at the teacher's ids; nats, (...)."""
    student = picked.log_softmax(-1) if logsumexp is None else picked - logsumexp[..., None]
    if normalisation == "other" and logsumexp is not None:
        student = torch.cat([student, _other(picked, logsumexp)[..., None]], -1)
        mass = teacher.logsumexp(-1, keepdim=True).clamp(max=0)
        teacher = torch.cat([teacher, torch.log(-torch.expm1(mass))], -1)
    else:
        teacher = teacher.log_softmax(-1)
    probability = teacher.exp()
    # 0 log 0 is 0, whatever the student says.
    return torch.where(probability != 0, probability * (teacher - student), 0).sum(-1)


def _other(picked: Tensor, logsumexp: Tensor) -> Tensor:
    """Return the log-probability (...) of all that is not picked; its gradient does not fade as it goes to 0.

    With r = logsumexp over the rest, log p = r - logsumexp, and d r = (d logsumexp - sum_k p_k d z_k) / p. The last
    two would cancel to nothing at the picked entries if autograd took 1 - sum apart, which rounds.
    """
    log_probs = (picked - logsumexp[..., None]).detach()
    mass = log_probs.logsumexp(-1).clamp(max=-_FLOOR[log_probs.dtype])
    value = torch.log(-torch.expm1(mass))
    share = log_probs.exp()
    inside = torch.where(share > 0, share * picked, 0).sum(-1)
    differential = (logsumexp - inside) / value.exp() - logsumexp
    return value + (differential - differential.detach())


def _check(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
) -> None:
    """Refuse types, shapes and devices that do not go together."""
    tensors = (input, linear_weight, teacher_ids, teacher_log_probs)
    if any(isinstance(tensor, torch.fx.Proxy) for tensor in tensors):
        raise TypeError(
            "distillation_loss takes tensors, got a torch.fx.Proxy; so that torch.fx.symbolic_trace does not look "
            'inside, name the function: torch.fx.wrap("distillation_loss") beside `from levelhead.objectives import '
            "distillation_loss`; or use torch.export.export"
        )
    checks.check_linear(_autocast(input), linear_weight, linear_bias)
    check_floats(teacher_log_probs=teacher_log_probs)
    checks.check_ids("teacher_ids", teacher_ids, input, several=True)
    if teacher_ids.dim() != input.dim() or teacher_ids.shape[-1] == 0:
        raise ValueError(
            f"teacher_ids must have shape {tuple(input.shape[:-1])} + (k,) with k >= 1, got "
            f"{tuple(teacher_ids.shape)}"
        )
    if teacher_log_probs.shape != teacher_ids.shape:
        raise ValueError(
            f"teacher_log_probs must have the shape of teacher_ids {tuple(teacher_ids.shape)}, got "
            f"{tuple(teacher_log_probs.shape)}"
        )
    if teacher_log_probs.device != input.device:
        raise ValueError(
            f"teacher_log_probs is on {teacher_log_probs.device} but input is on {input.device}; "
            "move one"
        )
