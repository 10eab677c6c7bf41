"""Temperature scaling: one number, fitted on held-out answers, that makes probabilities honest.

Dividing logits by T > 1 softens over-confident probabilities and changes no prediction. Fit T on a
split that neither trained the model nor reports its calibration.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .predictions import as_classes, as_tensor

BOUNDS = (0.01, 100.0)
_ENTRIES = 1 << 22  # logits at a time


def fit_temperature(logits: Any, target: Any) -> float:
    """The temperature T that minimises the negative log-likelihood of softmax(logits / T).

    In the inverse temperature b = 1 / T the likelihood of an exponential family is convex: its
    derivative, mean over rows of E_p[logit] - logit of the target, rises with b, and its only zero
    is found by Newton's method in log b, kept inside a bracket that halves at worst.

    Apply the result with `torch.softmax(logits / T, -1)`, or `torch.sigmoid(logits / T)` for (N,);
    hold out the rows it was fitted on: fitted and reported on the same rows, calibration looks
    better than it is.

    A score file without logits keeps (confidence, correct): the same function fits the temperature
    on the logit of the confidence, a recalibration of P(correct) with one number. Only for two
    classes is that the temperature of the model's softmax.

    Args:
        logits: (N, C), or (N,) for a binary outcome with probability sigmoid(logits / T); a tensor,
            an array or nested lists. -inf excludes a class. Taken in float64, a piece at a time.
        target: The right class of each row, (N,), integers in [0, C); for (N,) logits the outcome,
            0 or 1.

    Returns:
        T, in [0.01, 100], to a relative 1e-12 or so. The bounds are returned where there is no
        minimum between them: 0.01 if every target has its row's largest logit (any sharpening
        helps), 100 if the logits point away from the targets. 1 if all logits are equal, when T
        changes nothing.

    Raises:
        TypeError: `logits` or `target` does not hold numbers.
        ValueError: Shapes do not fit, nothing was given, a logit is NaN or +inf, a target is no class or has
            logit -inf.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0]] * 4)  # 98 % sure,
        >>> target = torch.tensor([0, 0, 0, 1])  # right 3 times of 4
        >>> temperature = fit_temperature(logits, target)
        >>> round(temperature, 3)
        3.641
        >>> torch.softmax(logits / temperature, -1)[0].round(decimals=3).tolist()
        [0.75, 0.25]
        >>> confidence = torch.tensor([0.98, 0.98, 0.98, 0.98])
        >>> temperature = fit_temperature(torch.logit(confidence), target == 0)
        >>> torch.sigmoid(torch.logit(confidence) / temperature)[0].round(decimals=3).item()
        0.75

    References:
        Guo, Pleiss, Sun, Weinberger. On calibration of modern neural networks. ICML 2017,
        arXiv 1706.04599.
    """
    logits, target = _checked(logits, target)
    if bool((logits.isneginf() | (logits == logits.gather(1, target[:, None]))).all()):
        return 1.0
    low, high = (math.log(1 / bound) for bound in reversed(BOUNDS))  # of log b
    if _slope(logits, target, math.exp(high))[0] <= 0:
        return BOUNDS[0]
    if _slope(logits, target, math.exp(low))[0] >= 0:
        return BOUNDS[1]
    at = 0.0
    while high - low > 1e-13:
        slope, curvature = _slope(logits, target, math.exp(at))
        if slope > 0:
            high = at
        else:
            low = at
        # d/d(log b) of the slope is b times the curvature.
        step = slope / (math.exp(at) * curvature) if curvature > 0 else math.inf
        if abs(step) < 1e-13:
            break
        at = at - step if low < at - step < high else (low + high) / 2
    return math.exp(-at)


def _slope(logits: Tensor, target: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean NLL by the inverse temperature."""
    slope = curvature = 0.0
    rows = max(1, _ENTRIES // logits.shape[1])
    for piece, right in zip(torch.split(logits, rows), torch.split(target, rows), strict=True):
        z = piece.double()
        z = z - z.gather(1, right[:, None])  # from the target's: the loss does not change
        # -inf times a probability of 0 would be NaN; this far down the product is 0 as it should.
        z = z.clamp(min=-1e100)
        p = torch.softmax(inverse * z, 1)
        mean = (p * z).sum(1, keepdim=True)
        slope += mean.sum().item()
        curvature += (p * (z - mean).square()).sum().item()
    return slope / len(logits), curvature / len(logits)


def _checked(logits: Any, target: Any) -> tuple[Tensor, Tensor]:
    logits = as_tensor("logits", logits)
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        logits = logits.double()  # of which there is a negative, and all operators that follow
    if logits.dim() == 1:
        logits = torch.stack([-logits / 2, logits / 2], 1)
    target = as_classes("logits", logits, target)
    if bool((logits.isnan() | (logits == math.inf)).any()):
        raise ValueError(
            "logits hold NaN or +inf; pass finite logits, or -inf for excluded classes"
        )
    if bool(logits.gather(1, target[:, None]).isinf().any()):
        raise ValueError(
            "a target has logit -inf: its likelihood is 0 at every temperature; leave such rows out"
        )
    return logits, target
