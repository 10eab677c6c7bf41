"""One temperature for a whole model: fitted on held-out tokens, and put into its checkpoint.

References:
    Guo, Pleiss, Sun, Weinberger. On calibration of modern neural networks. ICML 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .hidden import HeadInputs, OutputHead

_LIMIT = 100.0  # T and 1 / T at most
_PRECISION = 1e-6  # of log T


def fit_temperature(head: OutputHead, inputs: HeadInputs) -> float:
    """The temperature T that makes held-out tokens most likely, over the full vocabulary.

    Minimises mean_i [logsumexp_v(z_iv / T) - z_iy / T], which is convex in beta = 1 / T; z are the
    model's logits, softcap included. Its derivative `mean(sum_v p_v z_v - z_y)` is a difference of two
    statistics of the logits, so that no logits are kept: a dozen products with the head in all, each
    with the small buffer of `levelhead.linear_logit_stats`, and none of the backbone. The root is found
    to 1e-6 by regula falsi (Illinois) in log beta.

    Args:
        head: See `levelhead.integrations.hidden.output_head`.
        inputs: See `levelhead.integrations.hidden.collect`; tokens that the model was not trained on.

    Returns:
        T in [0.01, 100]. Above 1 the model was over-confident; dividing its logits by T mends that.

    Raises:
        ValueError: No such T is best: the model gets every token right (T would fall to 0), or does no
            better than one that ignores what it reads (T would rise without end).

    References:
        Guo et al. 2017, https://arxiv.org/abs/1706.04599.
    """

    def slope(log_beta: float) -> float:
        beta = math.exp(log_beta)
        with torch.no_grad():
            stats = head.logit_stats(inputs.hidden, inputs.target, 1 / beta)
        picked = stats.picked - stats.max
        value = float((stats.relative_expected - picked).double().mean())
        # Where every token is certain and right the difference is nothing but rounding.
        rounding = torch.finfo(picked.dtype).eps * float(picked.abs().double().mean())
        return value / beta if abs(value) > rounding else 0.0

    low = high = 0.0
    at_low = at_high = slope(0.0)
    limit = math.log(_LIMIT)
    while at_low > 0 and low > -limit:
        high, at_high = low, at_low
        low = max(low - math.log(4), -limit)
        at_low = slope(low)
    while at_high <= 0 and high < limit:
        low, at_low = high, at_high
        high = min(high + math.log(4), limit)
        at_high = slope(high)
    if at_high <= 0:
        raise ValueError(
            f"the likelihood still rises at a temperature of {1 / _LIMIT:g}: the model gets these "
            f"{len(inputs.target)} tokens right; fit on more tokens, and on such as it has not seen"
        )
    if at_low > 0:
        raise ValueError(
            f"the likelihood still rises at a temperature of {_LIMIT:g}: on these "
            f"{len(inputs.target)} tokens the model does no better than one that gives every token "
            "the same probability, which no temperature mends"
        )
    return math.exp(-_root(slope, low, at_low, high, at_high))


def _root(
    function: Callable[[float], float], low: float, at_low: float, high: float, at_high: float
) -> float:
    """Where an increasing function is zero, between `low` (at most 0 there) and `high` (at least 0)."""
    kept = 0  # which end the last step left in place: -1 the low one, 1 the high one
    while high - low > _PRECISION and at_low != at_high:
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        # At an end that the root is close to, its step is too short to ever close the interval.
        middle = min(max(middle, low + _PRECISION / 2), high - _PRECISION / 2)
        value = function(middle)
        if value < 0:
            low, at_low = middle, value
            at_high = at_high / 2 if kept == 1 else at_high
            kept = 1
        else:
            high, at_high = middle, value
            at_low = at_low / 2 if kept == -1 else at_low
            kept = -1
        if value == 0:
            return middle
    return (low + high) / 2
