"""Trustworthy maximisation: a teacher's k largest probabilities, changed so that its confidence is its accuracy.

FIRST (Shum et al. 2024, https://arxiv.org/abs/2408.12168) distils a teacher whose k largest probabilities were
recalibrated on held-out data. Both of its ways keep the order of the ids, so the teacher's accuracy stays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..calibration import calibration_error

Method = Literal["temperature", "smoothing"]


def scale_probabilities(log_probs: Tensor, temperature: float) -> Tensor:
    """Softmax over the k probabilities themselves, ``exp(p_i / temperature) / sum_j exp(p_j / temperature)``.

    Of probabilities, not of logits, as in the paper: the ratio of the two largest is at most ``exp(1 / temperature)``,
    and the result sums to one over the k, whatever mass the vocabulary beyond them had.

    Args:
        log_probs: log-probabilities, shape ``(..., k)``; nats.
        temperature: above 0; about 0.2 to 0.3 changes a confident teacher least, a large one makes all k equal.

    Returns:
        Log-probabilities, shape ``(..., k)``, in the dtype of ``log_probs``.

    Raises:
        ValueError: ``temperature`` is not above 0.

    References:
        Shum et al. 2024, https://arxiv.org/abs/2408.12168 (trustworthy maximisation).

    Example:
        >>> probability = torch.tensor([0.90, 0.05, 0.02, 0.01, 0.01])
        >>> round(scale_probabilities(probability.log(), 0.3).exp()[0].item(), 3)
        0.823
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be a number above 0, got {temperature}")
    return (log_probs.exp() / temperature).log_softmax(-1)


def smooth_probabilities(log_probs: Tensor, smoothing: float) -> Tensor:
    """Move ``smoothing`` from the largest of k probabilities to the others, in equal parts; their sum stays.

    Less is moved where the largest would fall below the second: then both are equal.

    Args:
        log_probs: log-probabilities, descending, shape ``(..., k)``; nats.
        smoothing: in [0, 1].

    Returns:
        Log-probabilities, shape ``(..., k)``, in the dtype of ``log_probs``; with k = 1 the same.

    Raises:
        ValueError: ``smoothing`` lies outside [0, 1].

    References:
        Shum et al. 2024, https://arxiv.org/abs/2408.12168, which compares it with the temperature.

    Example:
        >>> smooth_probabilities(torch.tensor([0.90, 0.06, 0.04]).log(), 0.1).exp()
        tensor([0.8000, 0.1100, 0.0900])
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must lie in [0, 1], got {smoothing}")
    p = log_probs.exp()
    others = p.shape[-1] - 1
    if others == 0:
        return log_probs
    moved = (p[..., :1] - p[..., 1:2]).mul(others / (others + 1)).clamp(0, smoothing)
    return torch.cat([p[..., :1] - moved, p[..., 1:] + moved / others], -1).log()


_METHODS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "temperature": scale_probabilities,
    "smoothing": smooth_probabilities,
}


@dataclass(frozen=True)
class Recalibration:
    """How a teacher's k largest probabilities are changed, and the calibration errors that chose it.

    Attributes:
        method: "temperature" (:func:`scale_probabilities`) or "smoothing" (:func:`smooth_probabilities`).
        value: its parameter.
        positions: how many held-out predictions chose it.
        accuracy: share of them that was right.
        ece_before: expected calibration error of the teacher's own largest probability, in [0, 1].
        ece_after: that of the recalibrated one.
        curve: every value tried, ascending, with its error.

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

    def __call__(self, log_probs: Tensor) -> Tensor:
        """Recalibrate the k largest log-probabilities of each prediction.

        Args:
            log_probs: log-probabilities, descending, shape ``(..., k)``; nats.

        Returns:
            Log-probabilities, descending, shape ``(..., k)``, in the dtype of ``log_probs``.
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
        TypeError: ``correct`` does not hold numbers.
        ValueError: shapes do not fit, there is no prediction or k is 1; a value is NaN, or no outcome; ``method`` is
            unknown.

    References:
        Shum et al. 2024, https://arxiv.org/abs/2408.12168 (trustworthy maximisation).

    Example:
        >>> log_probs = torch.tensor([[0.97, 0.02], [0.97, 0.02]]).log()
        >>> recalibrate(log_probs, [True, False]).ece_after < 0.3
        True
    """
    if method not in get_args(Method):
        raise ValueError(f"unknown method {method!r}; expected 'temperature' or 'smoothing'")
    log_probs = torch.as_tensor(log_probs).double()
    if log_probs.dim() != 2 or log_probs.shape[1] < 2:
        raise ValueError(
            f"log_probs must have shape (N, k) with k >= 2, got {tuple(log_probs.shape)}; one "
            "probability alone leaves nothing to move"
        )

    def error(value: float) -> float:
        confidence = _METHODS[method](log_probs, value)[:, 0].exp().clamp(max=1)
        return calibration_error(confidence, correct, bins=bins)

    first, last = (1, 10) if method == "temperature" else (0, 9)
    errors = {step / 10: error(step / 10) for step in range(first, last + 1)}
    best = round(50 * min(errors, key=lambda value: (errors[value], value)))
    for step in range(max(best - 5, first), min(best + 5, 50) + 1):
        errors.setdefault(step / 50, error(step / 50))
    value = min(errors, key=lambda value: (errors[value], value))
    right = torch.as_tensor(correct).double()
    return Recalibration(
        method=method,
        value=value,
        positions=len(log_probs),
        accuracy=right.mean().item(),
        ece_before=calibration_error(log_probs[:, 0].exp().clamp(max=1), correct, bins=bins),
        ece_after=errors[value],
        curve=sorted(errors.items()),
    )
