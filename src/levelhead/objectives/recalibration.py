"""Trustworthy maximisation: a teacher's k largest probabilities, changed so that its confidence is its accuracy.

FIRST (Shum et al. 2024, https://arxiv.org/abs/2408.12168) distils a teacher whose k largest probabilities were
recalibrated on held-out data. Both of its ways keep the order of the ids, so the teacher's accuracy stays.

References:
    Shum et al. 2024, https://arxiv.org/abs/2408.12168 (FIRST; its trustworthy maximisation).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..calibration import calibration_error
from ..calibration.predictions import as_number, as_tensor, check_choice
from ..ops.statistics import statistics_dtype
from .checks import Wrong, check_floats, no_candidates, no_log_probs, refuse

Method = Literal["temperature", "smoothing"]


def scale_probabilities(log_probs: Tensor, temperature: float) -> Tensor:
    """Return the softmax over the k probabilities themselves, ``exp(p_i / T) / sum_j exp(p_j / T)``.

    Of probabilities, not of logits, as in the paper: the ratio of the two largest is at most ``exp(1 / T)``, and the
    result sums to one over the k, whatever mass the vocabulary beyond them had. ``temperature`` is above 0; about 0.2
    to 0.3 changes a confident teacher least, a large one makes all k equal.

    ``log_probs`` and the result: ``(..., k)``, nats, in one dtype; -inf stands for no candidate and stays so. On an
    accelerator, or in a compiled graph, values are not looked at; there what would be refused becomes NaN.
    """
    temperature = as_number("temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature must be a number above 0, got {temperature}")
    p = _checked(log_probs).exp()
    none = log_probs == -torch.inf
    # Below the largest, so that a small temperature overflows to probability 0, and one that rounds to 0 divides.
    scaled = (p - p.amax(-1, keepdim=True)) / max(temperature, torch.finfo(p.dtype).tiny)
    scaled = scaled.masked_fill(none, -torch.inf).log_softmax(-1)
    return scaled.masked_fill(none, -torch.inf).to(log_probs.dtype)


def smooth_probabilities(log_probs: Tensor, smoothing: float) -> Tensor:
    """Move ``smoothing`` from the largest of k probabilities to the others, in equal parts; their sum stays.

    Less is moved where the largest would fall below the second: then both are equal. ``smoothing`` lies in [0, 1].

    ``log_probs`` (descending) and the result: as in ``scale_probabilities``; of one candidate the same.
    """
    smoothing = as_number("smoothing", smoothing)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must lie in [0, 1], got {smoothing}")
    largest, rest = _checked(log_probs, descending=True).tensor_split([1], -1)
    if not rest.shape[-1]:
        return log_probs
    there = rest != -torch.inf
    others = there.sum(-1, keepdim=True)
    moved = (largest.exp() - rest[..., :1].exp()) * others / (others + 1)
    moved = moved.clamp(0, smoothing)
    # Added as logarithms, or a probability that float32 does not hold would become -inf, no candidate.
    added = torch.logaddexp(rest, (moved / others.clamp_min(1)).log()).where(there, -torch.inf)
    left = (largest.exp() - moved).log().where(moved > 0, largest)
    return torch.cat([left, added], -1).to(log_probs.dtype)


def _checked(log_probs: Tensor, *, descending: bool = False) -> Tensor:
    """Return log-probabilities in the dtype to compute in, after all that is refused."""
    check_floats(log_probs=log_probs)
    if log_probs.dim() == 0 or log_probs.shape[-1] == 0:
        raise ValueError(
            f"log_probs must have shape (..., k) with k >= 1, got {tuple(log_probs.shape)}"
        )
    wide = log_probs.to(statistics_dtype(log_probs.dtype))
    wrongs = [no_log_probs(wide)] + ([_ascending(wide)] if descending else [])
    return refuse(wide, *wrongs)


def _ascending(log_probs: Tensor) -> Wrong:
    return Wrong(
        log_probs[..., 1:] > log_probs[..., :-1],
        log_probs[..., 1:],
        lambda at, found: (
            f"the log-probabilities of token {at[:-1]} are not descending, {found:.3g} follows a smaller one; sort "
            "them with their ids"
        ),
    )


_METHODS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "temperature": scale_probabilities,
    "smoothing": smooth_probabilities,
}


@dataclass(frozen=True)
class Recalibration:
    """How a teacher's k largest probabilities are changed, and the calibration errors that chose it.

    Attributes:
        method: "temperature", a softmax over the k probabilities themselves at the temperature ``value``, or
            "smoothing": ``value`` is moved from the largest to the others, in equal parts.
        value: its parameter.
        positions: how many held-out predictions chose it.
        accuracy: share of them that was right.
        ece_before: expected calibration error of the teacher's own largest probability, in [0, 1].
        ece_after: that of the recalibrated one.
        curve: every value tried, ascending, with its error.

    Raises:
        ValueError: ``method`` is unknown.

    References:
        Shum et al. 2024, https://arxiv.org/abs/2408.12168 (trustworthy maximisation).
    """

    method: Method
    value: float
    positions: int
    accuracy: float
    ece_before: float
    ece_after: float
    curve: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))

    def __call__(self, log_probs: Tensor) -> Tensor:
        """Recalibrate the k largest log-probabilities of each prediction.

        Args:
            log_probs: descending, shape ``(..., k)``; nats. -inf pads: what is no candidate stays none.

        Returns:
            Log-probabilities, descending, shape ``(..., k)``, in the dtype of ``log_probs``.

        Raises:
            TypeError: ``log_probs`` is no tensor of floating point, or ``value`` no number.
            ValueError: ``value`` is out of its range, k is 0, or log-probabilities are NaN, of a sum above 1 or
                (smoothing) not descending. On an accelerator, or in a compiled graph, values are not looked at; there
                the result of the token is NaN.
        """
        return _METHODS[self.method](log_probs, self.value)


def recalibrate(
    log_probs: Any, correct: Any, *, method: Method = "temperature", bins: int = 10
) -> Recalibration:
    """Choose a recalibration by the calibration error of held-out predictions.

    Values are tried in steps of 0.1, temperatures over (0, 1] and smoothings over [0, 1), and then in steps of 0.02
    around the best, as in the paper for temperatures; of equal errors the first, smallest value wins.

    Args:
        log_probs: the teacher's k largest log-probabilities of each held-out prediction, descending, nats, shape
            ``(N, k)`` with ``k >= 2``.
        correct: whether the largest was that of the right token, shape ``(N,)``: booleans, or zeros and ones.
        method: "temperature" or "smoothing".
        bins: of equal width, of :func:`levelhead.calibration.calibration_error`.

    Returns:
        Recalibration; call it on log-probabilities to apply it.

    Raises:
        TypeError: ``log_probs`` or ``correct`` does not hold numbers.
        ValueError: shapes do not fit, there is no prediction or k is 1; log-probabilities are NaN, of a sum above 1,
            not descending or all -inf; an outcome is none; ``method`` is unknown.

    Example:
        >>> log_probs = torch.tensor([[0.97, 0.02], [0.97, 0.02]]).log()
        >>> found = recalibrate(log_probs, [True, False])
        >>> found.ece_after < 0.3, found(log_probs).shape
        (True, torch.Size([2, 2]))

    References:
        Shum et al. 2024, https://arxiv.org/abs/2408.12168 (trustworthy maximisation).
    """
    check_choice("method", method, get_args(Method))
    log_probs = as_tensor("log_probs", log_probs).double()
    if log_probs.dim() != 2 or log_probs.shape[1] < 2:
        raise ValueError(
            f"log_probs must have shape (N, k) with k >= 2, got {tuple(log_probs.shape)}; one "
            "probability alone leaves nothing to move"
        )
    log_probs = _checked(log_probs, descending=True)
    there = log_probs > -torch.inf
    refuse(log_probs, no_candidates(there))

    def error(value: float) -> float:
        confidence = _METHODS[method](log_probs, value)[:, 0].exp().clamp(max=1)
        return calibration_error(confidence, correct, bins=bins)

    first, last = (1, 10) if method == "temperature" else (0, 9)
    errors = {step / 10: error(step / 10) for step in range(first, last + 1)}
    best = round(50 * min(errors, key=lambda value: (errors[value], value)))
    for step in range(max(best - 5, first), min(best + 5, 50) + 1):
        errors.setdefault(step / 50, error(step / 50))
    value = min(errors, key=lambda value: (errors[value], value))
    right = as_tensor("correct", correct).double()
    return Recalibration(
        method=method,
        value=value,
        positions=len(log_probs),
        accuracy=right.mean().item(),
        ece_before=calibration_error(log_probs[:, 0].exp().clamp(max=1), correct, bins=bins),
        ece_after=errors[value],
        curve=sorted(errors.items()),
    )
