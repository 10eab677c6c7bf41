"""The equations, dense: the oracle that every other implementation is tested against.

For tokens ``x (N, D)``, head ``W (V, D)`` and ``b (V,)``::

    a = logit_scale * (x W^T + b)      t = tanh(a / softcap)      z = softcap * t      (z = a without softcap)
    r = z - max_v z_v                  p = softmax(z) = exp(r) / sum_v exp(r_v)

    dz_v = p_v * (g_lse + g_exp * (1 + r_v - expected)) + g_mean / V + sum_k g_picked,k [v = id_k]
    da   = dz * (1 - t^2)
    dx   = logit_scale * da W        dW = logit_scale * da^T x        db = logit_scale * sum_i da_i

The scale comes after the bias because that is where every model that has one applies it: to what the
head returns. Everything is computed in float32, or in float64 for float64 inputs, and rounded once at the end.
"""

import torch
from torch import Tensor

from .loss import picks, token_loss, token_loss_backward
from .rows import Rows
from .statistics import (
    GradientDtypes,
    Gradients,
    LogitStats,
    StatsGradient,
    anchor,
    statistics_dtype,
)


def linear_logit_stats(
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    picks: Tensor,  # (N, K)
    linear_bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
) -> LogitStats:
    """Return the statistics of the logits, fields of shape (N,) and (N, K)."""
    z, _ = _logits(input, linear_weight, linear_bias, softcap, logit_scale)
    inside = (picks >= 0) & (picks < z.shape[1])
    picked = z.gather(1, picks.where(inside, 0)).masked_fill(~inside, 0)
    largest, argmax = z.max(1)
    r = z - anchor(largest)[:, None]
    total = r.exp().sum(1)  # at least 1, the largest entry's, or 0 where all are masked out
    expected = (r.exp() * _finite(r)).sum(1) / total.clamp(min=1)
    return LogitStats(total.log(), picked, r.mean(1), expected, largest, argmax)


def linear_logit_stats_backward(
    gradient: StatsGradient,  # (N,) and (N, K)
    keep: Tensor,  # (N,) bool, the rows with any gradient
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    picks: Tensor,  # (N, K)
    linear_bias: Tensor | None,  # (V,)
    logsumexp: Tensor,  # (N,), relative to the largest logit
    expected: Tensor,  # (N,), relative to the largest logit
    largest: Tensor,  # (N,)
    softcap: float | None,
    logit_scale: float,
    gradient_dtypes: GradientDtypes,
) -> Gradients:
    """Return the gradients of input, weight and bias; None where not needed."""
    rows = Rows(keep)
    g = gradient.map(rows.take)
    x, ids = _wide(rows.take(input)), rows.take(picks)  # (n, D), (n, K)
    z, slope = _logits(x, linear_weight, linear_bias, softcap, logit_scale)  # (n, V)
    r = z - anchor(rows.take(largest, fill=torch.inf))[:, None]
    p = r.exp() / rows.take(logsumexp).exp()[:, None]
    dz = torch.zeros_like(z)
    if g.logsumexp is not None:
        dz += p * g.logsumexp[:, None]
    if g.expected is not None:
        dz += p * g.expected[:, None] * (1 + _finite(r) - rows.take(expected)[:, None])
    if g.mean is not None:
        dz += g.mean[:, None] / z.shape[1]
    if g.picked is not None:
        inside = (ids >= 0) & (ids < z.shape[1])
        dz.scatter_add_(1, ids.where(inside, 0), g.picked * inside)
    da = logit_scale * slope * dz
    dx, dw, db = gradient_dtypes
    return (
        None if dx is None else rows.put(da @ _wide(linear_weight)).to(dx),
        None if dw is None else (da.T @ x).to(dw),
        None if db is None else da.sum(0).to(db),
    )


def linear_cross_entropy(
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    linear_bias: Tensor | None,  # (V,)
    token_weight: Tensor,  # (N,), 0 for ignored tokens
    label_smoothing: Tensor | None,  # (N,)
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    gradient_dtypes: GradientDtypes,
) -> tuple[Tensor, Gradients]:
    """Return sum_i token_weight_i * loss_i and its gradients."""
    head = (linear_weight, picks(target, z_loss), linear_bias)
    stats = linear_logit_stats(input, *head, softcap, logit_scale)
    logsumexp, picked, mean, expected, largest, _ = stats
    loss = token_loss(largest, logsumexp, picked[:, 0], mean, label_smoothing, z_loss)
    keep = token_weight != 0
    gradients = linear_logit_stats_backward(
        token_loss_backward(token_weight, largest, logsumexp, label_smoothing, z_loss), keep, input,
        *head, logsumexp, expected, largest, softcap, logit_scale, gradient_dtypes,
    )  # fmt: skip
    return (token_weight * loss).masked_fill(~keep, 0).sum(), gradients


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(statistics_dtype(tensor.dtype))


def _finite(z: Tensor) -> Tensor:
    """Replace -inf, the logit of an entry that is masked out: 0 * -inf would be NaN."""
    return z.clamp(min=torch.finfo(z.dtype).min)


def _logits(
    input: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> tuple[Tensor, Tensor | float]:
    """Return the logits z (N, V) and their derivative dz/da."""
    a = _wide(input) @ _wide(weight).T
    if bias is not None:
        a = a + _wide(bias)
    a = a * logit_scale
    if softcap is None:
        return a, 1.0
    t = torch.tanh(a / softcap)
    return softcap * t, 1 - t.square()
