"""One tile of logits, tokens x vocabulary: filled, read for statistics, turned into its gradient, multiplied out.

A tile holds ``t``, the logits divided by the softcap, ``t = tanh(a / softcap)``, because the derivative of the
softcap is ``1 - t^2`` and would lose digits if ``t`` were multiplied by the softcap and divided again. Without a
softcap the tile holds the logits themselves, ``z = t``.

Everything works in place on float32 (float64 for float64 inputs); the equations are those of reference.py.
"""

import torch
from torch import Tensor

from .statistics import LogitStats, StatsGradient, anchor


def fill_(
    t: Tensor,  # (T, S)
    x: Tensor,  # (T, D)
    weight: Tensor,  # (S, D)
    bias: Tensor | None,  # (S,)
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """Make a tile of the logits of ``x``."""
    x, scale = x.to(weight.dtype), logit_scale / (softcap or 1)
    if bias is None:
        addmm_(t, x, weight.T, beta=0, alpha=scale)
    else:
        addmm_(t.copy_(bias), x, weight.T, alpha=1)
        if scale != 1:
            # Now, not before: what rounding does to a bias is the same for all tokens, and adds up over them.
            t.mul_(scale)
    return t if softcap is None else t.tanh_()


def logits(t: Tensor, softcap: float | None, out: Tensor) -> Tensor:
    """Return the logits z of a tile, (T, S): ``t`` itself, or with a softcap ``out``, which may be ``t``."""
    return t if softcap is None else torch.mul(t, softcap, out=out)


def relative(z: Tensor, largest: Tensor, out: Tensor) -> Tensor:
    """Make z - largest, (T, S); the largest logits are (T,), ``out`` may be ``z``."""
    return torch.sub(z, anchor(largest)[:, None], out=out)


def local(ids: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Return picks (T, K) as entries of a tile whose first one is ``first``, and which of them lie in it.

    Those outside read 0.
    """
    entries = ids - first
    inside = (entries >= 0) & (entries < size)
    return entries.where(inside, 0), inside


def stats(
    t: Tensor, softcap: float | None, picks: tuple[Tensor, Tensor], first: int, scratch: Tensor
) -> LogitStats:
    """Return the statistics of the entries ``first``, ``first + 1``, ...

    Args:
        t: the tile, shape ``(T, S)``; overwritten.
        softcap: bound of the logits, or None.
        picks: as :func:`local` returns them, shape ``(T, K)``.
        first: id of the tile's first entry.
        scratch: overwritten, shape ``(T, S)``.
    """
    z = logits(t, softcap, out=t)
    picked = _pick(z, picks)
    largest, argmax = z.max(1)
    r = relative(z, largest, out=z)
    mean = r.mean(1)
    exps = torch.exp(r, out=scratch)
    total = exps.sum(1)  # at least 1, the largest entry's, or 0 where all are masked out
    expected = exps.mul_(_finite_(r)).sum(1) / total.clamp(min=1)
    return LogitStats(total.log(), picked, mean, expected, largest, argmax + first)


def softmax(
    t: Tensor, softcap: float | None, picks: tuple[Tensor, Tensor], out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return picked (T, K), the mean relative to max, max and the sum of ``out`` (T,) for a tile of all entries.

    ``out`` becomes exp(z - max), the softmax but for its sum; without a softcap it may be ``t``.
    """
    z = logits(t, softcap, out=out)
    picked, largest = _pick(z, picks), z.amax(1)
    r = relative(z, largest, out=out)
    mean = r.mean(1)
    return picked, mean, largest, r.exp_().sum(1)


def gradient_(
    p: Tensor,  # (T, S), probabilities times ``total``
    t: Tensor,  # (T, S), overwritten with a softcap
    picks: tuple[Tensor, Tensor],  # (T, K), as `local` returns them
    g: StatsGradient,  # (T,) and (T, K)
    total: Tensor,  # (T,)
    vocabulary: int,
    softcap: float | None,
    r: Tensor | None = None,  # (T, S), z - max, needed with g.expected; overwritten
    expected: Tensor | None = None,  # (T,), relative to max, needed with g.expected
) -> Tensor:
    """Turn ``p`` into the gradient of the logits before the softcap."""
    if g.expected is not None and r is not None and expected is not None:
        offset = g.expected * (1 - expected)
        if g.logsumexp is not None:
            offset = offset + g.logsumexp
        slope = g.expected / total
        p.mul_(_finite_(r).mul_(slope[:, None]).add_((offset / total)[:, None]))
    elif g.logsumexp is not None:
        p.mul_((g.logsumexp / total)[:, None])
    else:
        p.zero_()
    if g.mean is not None:
        p.add_((g.mean / vocabulary)[:, None])
    if g.picked is not None:
        entries, inside = picks
        p.scatter_add_(1, entries, g.picked * inside)
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


def _pick(z: Tensor, picks: tuple[Tensor, Tensor]) -> Tensor:
    """Return the logits of the picked entries, 0 for those outside the tile, shape (T, K)."""
    entries, inside = picks
    return z.gather(1, entries).masked_fill_(~inside, 0)


def _finite_(t: Tensor) -> Tensor:
    """Replace -inf, an entry that is masked out: its probability is 0, and 0 * -inf would be NaN.

    By no more than float32 holds when it is multiplied by a gradient.
    """
    return t.clamp_(min=-1e18)
