"""One tile of logits, tokens x vocabulary entries: filled, read for its statistics, turned into its gradient, multiplied out.

Everything works in place on buffers of float32 (float64 for float64 inputs); the equations are those of reference.py.
"""

import torch
from torch import Tensor

from .statistics import LogitStats, StatsGradient


def logits_(
    z: Tensor,  # (T, S)
    x: Tensor,  # (T, D)
    weight: Tensor,  # (S, D)
    bias: Tensor | None,  # (S,)
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """Fill ``z`` with softcap(logit_scale * (x weight^T + bias))."""
    if bias is None:
        addmm_(z, x, weight.T, beta=0, alpha=logit_scale)
    else:
        addmm_(z.copy_(bias), x, weight.T, beta=logit_scale, alpha=logit_scale)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def stats(z: Tensor, ids: Tensor, first: int, scratch: Tensor) -> LogitStats:
    """Return the statistics of the entries ``first``, ``first + 1``, ...; ``scratch`` is overwritten.

    Args:
        z: logits, shape ``(T, S)``; changed only where they are -inf.
        ids: picks as ids of the whole vocabulary, shape ``(T, K)``.
        first: id of the tile's first entry.
        scratch: shape ``(T, S)``.
    """
    picked = pick(z, ids, first)
    mean = z.mean(1)
    largest, argmax = z.max(1)
    exps = torch.sub(z, largest[:, None], out=scratch).exp_()
    total = exps.sum(1)
    # 0 * -inf would be NaN: an entry that is masked out contributes nothing.
    expected = exps.mul_(z.clamp_(min=torch.finfo(z.dtype).min)).sum(1) / total
    return LogitStats(largest + total.log(), picked, mean, expected, largest, argmax + first)


def pick(z: Tensor, ids: Tensor, first: int) -> Tensor:
    """Return the logits of the picked entries, 0 for those outside the tile, shape (T, K)."""
    local, inside = _local(ids, first, z.shape[1])
    return z.gather(1, local).masked_fill_(~inside, 0)


def dlogits_(
    p: Tensor,  # (T, S), probabilities up to a factor per token that g.logsumexp makes good
    z: Tensor,  # (T, S), overwritten with softcap
    ids: Tensor,  # (T, K)
    first: int,
    g: StatsGradient,  # (T,) and (T, K)
    expected: Tensor | None,  # (T,), needed with g.expected
    vocabulary: int,
    softcap: float | None,
) -> Tensor:
    """Turn ``p`` into the gradient of the logits before the softcap."""
    if g.expected is not None and expected is not None:
        slope = g.expected[:, None]
        offset = slope * (1 - expected[:, None])
        if g.logsumexp is not None:
            offset = offset + g.logsumexp[:, None]
        p.mul_(z.clamp(min=torch.finfo(z.dtype).min).mul_(slope).add_(offset))
    elif g.logsumexp is not None:
        p.mul_(g.logsumexp[:, None])
    else:
        p.zero_()
    if g.mean is not None:
        p.add_((g.mean / vocabulary)[:, None])
    if g.picked is not None:
        local, inside = _local(ids, first, p.shape[1])
        p.scatter_add_(1, local, g.picked * inside)
    return p if softcap is None else p.mul_(z.div_(softcap).square_().neg_().add_(1))


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
        db.add_(da.sum(0), alpha=logit_scale)
    da = da.to(x.dtype)
    if dx is not None:
        addmm_(dx, da, weight, alpha=logit_scale)
    if dw is not None:
        addmm_(dw, da.T, x, alpha=logit_scale)


def addmm_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float, beta: float = 1) -> None:
    """``out = beta * out + alpha * a b``, accumulated in the dtype of ``out``, which may be wider than a and b."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)


def _local(ids: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Return ids counted from ``first``, and whether each lies in the tile; those outside read 0."""
    local = ids - first
    inside = (local >= 0) & (local < size)
    return local.where(inside, 0), inside
