"""One tile of logits, tokens x vocabulary: filled, read for statistics, turned into its gradient, multiplied out.

A tile holds ``t``, the logits divided by the softcap, ``t = tanh(a / softcap)``, because the derivative of the
softcap is ``1 - t^2`` and would lose digits if ``t`` were multiplied by the softcap and divided again. Without a
softcap the tile holds the logits themselves: ``z = cap * t`` with ``cap = softcap or 1``, always.

Everything works in place on float32 (float64 for float64 inputs); the equations are those of reference.py.
"""

import torch
from torch import Tensor

from .statistics import LogitStats, StatsGradient


def fill_(
    t: Tensor,  # (T, S)
    x: Tensor,  # (T, D)
    weight: Tensor,  # (S, D)
    bias: Tensor | None,  # (S,)
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """Make a tile of the logits of ``x``."""
    x = x.to(weight.dtype)
    if bias is None:
        addmm_(t, x, weight.T, beta=0, alpha=logit_scale)
    else:
        addmm_(t.copy_(bias), x, weight.T, beta=logit_scale, alpha=logit_scale)
    return t if softcap is None else t.div_(softcap).tanh_()


def exp(t: Tensor, cap: float, subtrahend: Tensor, out: Tensor) -> Tensor:
    """Make exponentials of z - subtrahend, (T, S); the subtrahend is (T,), ``out`` may be ``t``."""
    return torch.add(-subtrahend[:, None], t, alpha=cap, out=out).exp_()


def stats(t: Tensor, cap: float, ids: Tensor, first: int, scratch: Tensor) -> LogitStats:
    """Return the statistics of the entries ``first``, ``first + 1``, ...

    Args:
        t: the tile, shape ``(T, S)``; changed only where it is -inf.
        cap: its factor.
        ids: picks as ids of the whole vocabulary, shape ``(T, K)``.
        first: id of the tile's first entry.
        scratch: overwritten, shape ``(T, S)``.
    """
    picked = _pick(t, cap, ids, first)
    mean = cap * t.mean(1)
    largest, argmax = t.max(1)
    largest = cap * largest
    # Where all entries are masked out, -inf, their sum is 0 and not NaN; elsewhere it is at least 1.
    exps = exp(t, cap, _finite_(largest.clone()), out=scratch)
    total = exps.sum(1)
    expected = cap * exps.mul_(_finite_(t)).sum(1) / total.clamp(min=1)
    return LogitStats(largest + total.log(), picked, mean, expected, largest, argmax + first)


def softmax(
    t: Tensor, cap: float, ids: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return picked (T, K), mean (T,), logsumexp (T,) and the sum of ``out`` (T,) for a tile of all entries.

    ``out`` becomes exp(z - max), the softmax but for its sum; it may be ``t``.
    """
    picked, mean, largest = _pick(t, cap, ids, 0), cap * t.mean(1), cap * t.amax(1)
    total = exp(t, cap, largest, out=out).sum(1)
    return picked, mean, largest + total.log(), total


def gradient_(
    p: Tensor,  # (T, S), probabilities times ``total``
    t: Tensor,  # (T, S), overwritten with a softcap
    ids: Tensor,  # (T, K)
    first: int,
    g: StatsGradient,  # (T,) and (T, K)
    expected: Tensor | None,  # (T,), needed with g.expected
    vocabulary: int,
    softcap: float | None,
    total: Tensor | None = None,  # (T,), None is 1
) -> Tensor:
    """Turn ``p`` into the gradient of the logits before the softcap."""
    if g.expected is not None and expected is not None:
        offset = g.expected * (1 - expected)
        if g.logsumexp is not None:
            offset = offset + g.logsumexp
        slope = (softcap or 1) * g.expected
        p.mul_(_finite_(t.clone()).mul_(slope[:, None]).add_(offset[:, None]))
    elif g.logsumexp is not None:
        p.mul_((g.logsumexp if total is None else g.logsumexp / total)[:, None])
    else:
        p.zero_()
    if g.mean is not None:
        p.add_((g.mean / vocabulary)[:, None])
    if g.picked is not None:
        local, inside = _local(ids, first, p.shape[1])
        p.scatter_add_(1, local, g.picked * inside)
    return p if softcap is None else p.mul_(t.square_().neg_().add_(1))


def multiply_out_(
    da: Tensor,  # (T, S)
    x: Tensor,  # (T, D)
    weight: Tensor,  # (S, D)
    logit_scale: float,
    dx: Tensor | None,  # (T, D)
    dw: Tensor | None,  # (S, D)
    db: Tensor | None,  # (S,)
) -> None:
    """Add a tile's share to the gradients of input, weight and bias; what is None is not computed."""
    if db is not None:
        db.add_(da.sum(0, dtype=db.dtype), alpha=logit_scale)
    da, x = da.to(weight.dtype), x.to(weight.dtype)
    if dx is not None:
        addmm_(dx, da, weight, alpha=logit_scale)
    if dw is not None:
        addmm_(dw, da.T, x, alpha=logit_scale)


def addmm_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float, beta: float = 1) -> Tensor:
    """``out = beta * out + alpha * a b``, accumulated in the dtype of ``out``, which may be wider than a and b."""
    if out.device.type == "cpu":  # which has no product of narrow operands with a wide result
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)


def _pick(t: Tensor, cap: float, ids: Tensor, first: int) -> Tensor:
    """Return the logits of the picked entries, 0 for those outside the tile, shape (T, K)."""
    local, inside = _local(ids, first, t.shape[1])
    return (cap * t.gather(1, local)).masked_fill_(~inside, 0)


def _local(ids: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Return ids counted from ``first``, and whether each lies in the tile; those outside read 0."""
    local = ids - first
    inside = (local >= 0) & (local < size)
    return local.where(inside, 0), inside


def _finite_(t: Tensor) -> Tensor:
    """Replace -inf, an entry that is masked out: its probability is 0, and 0 * -inf would be NaN.

    By no more than float32 holds when it is multiplied by a gradient.
    """
    return t.clamp_(min=-1e18)
