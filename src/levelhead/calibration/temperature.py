"""Temperature scaling: one number, fitted on held-out answers, that makes probabilities honest.

Dividing logits by T > 1 softens over-confident probabilities and changes no prediction. Fit T on a
split that neither trained the model nor reports its calibration.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .predictions import as_classes, as_tensor
from .root import increasing_root

_LIMIT = 100.0  # T and 1 / T at most
_ENTRIES = 1 << 22  # logits at a time


def fit_temperature(logits: Any, target: Any) -> float:
    """Return the temperature T that minimises the negative log-likelihood of softmax(logits / T).

    It is convex in b = 1 / T: its derivative, the mean over rows of E_p[logit] - logit of the
    target, rises with b. Regula falsi (Illinois) in log b finds its only zero.

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
        T, in (0.01, 100), to a relative 1e-12 or so; 1 if all logits are equal, when T changes
        nothing.

    Raises:
        TypeError: `logits` or `target` does not hold numbers.
        ValueError: Shapes do not fit, nothing was given, a logit is NaN or +inf, a target is no class or has
            logit -inf. No T is best: every target has its row's largest logit (T would fall to 0),
            or the logits point away from the targets (T would rise without end).

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
    return best_temperature(
        lambda inverse: _slope(logits, target, inverse), len(logits), "rows", tolerance=1e-12
    )


def best_temperature(
    slope: Callable[[float], float], count: int, unit: str, *, tolerance: float
) -> float:
    """Return the temperature at which the negative log-likelihood is least.

    Args:
        slope: Derivative of the mean negative log-likelihood by 1 / T, at 1 / T; it rises.
        count: How many rows or tokens the likelihood is of, for errors.
        unit: What to call them.
        tolerance: Of log T.

    Raises:
        ValueError: The likelihood still rises at T = 0.01 or at T = 100.
    """

    def of_log(log_inverse: float) -> float:
        return slope(math.exp(log_inverse))

    # The root is sought near T = 1 first: most models are off by less than a factor of 4.
    limit, step = math.log(_LIMIT), math.log(4)
    low = high = 0.0
    at_low = at_high = of_log(0.0)
    while at_low > 0 and low > -limit:
        high, at_high = low, at_low
        low = max(low - step, -limit)
        at_low = of_log(low)
    while at_high <= 0 and high < limit:
        low, at_low = high, at_high
        high = min(high + step, limit)
        at_high = of_log(high)
    if at_high <= 0:
        raise ValueError(
            f"the likelihood still rises at a temperature of {1 / _LIMIT:g}: the model gets these "
            f"{count} {unit} right; fit on more {unit}, and on such as it has not seen"
        )
    if at_low > 0:
        alternative = {"tokens": "token", "rows": "class"}[unit]
        raise ValueError(
            f"the likelihood still rises at a temperature of {_LIMIT:g}: on these "
            f"{count} {unit} the model does no better than one that gives every {alternative} "
            "the same probability, which no temperature mends"
        )
    return math.exp(-increasing_root(of_log, low, at_low, high, at_high, tolerance=tolerance))


def _slope(logits: Tensor, target: Tensor, inverse: float) -> float:
    """Return the derivative of the mean NLL by the inverse temperature."""
    slope = 0.0
    rows = max(1, _ENTRIES // logits.shape[1])
    for piece, right in zip(torch.split(logits, rows), torch.split(target, rows), strict=True):
        z = piece.double()
        z = z - z.gather(1, right[:, None])  # from the target's: the loss does not change
        # -inf times a probability of 0 would be NaN; this far down the product is 0 as it should.
        z = z.clamp(min=-1e100)
        slope += (torch.softmax(inverse * z, 1) * z).sum().item()
    return slope / len(logits)


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
