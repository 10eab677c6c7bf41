"""What the objectives refuse, by the rule of `ops.checks`: wrong types and shapes always, wrong values where they can.

To look at values is to wait for an accelerator, and to break a compiled graph. So wrong values raise in eager mode on
the CPU; elsewhere they make NaN of the loss, which no one takes for a result.

Masks meet in torch.logical_and, not in `&` or `|`, which DTensors get wrong in inference mode.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, logical_and

from ..ops import checks

# What probabilities may sum to: bfloat16 rounds their logarithms by some 0.03. Logits, or probabilities that are taken
# for their logarithms, exceed it by far.
_MOST = 1.1


class Wrong(NamedTuple):
    """Where rows (...) are wrong, and what to say of the first.

    Attributes:
        where: (...) or (..., J), bool.
        found: what is wrong there, same shape.
        say: the message for a position and what was found there.
        error: what to raise.
    """

    where: Tensor
    found: Tensor
    say: Callable[[list[int], float], str]
    error: type[Exception] = ValueError

    def look(self) -> None:
        """Raise the error for the first position, if there is one."""
        where = checks.unwrapped(self.where)  # of a batch under torch.vmap, the whole
        if not where.any():
            return
        at = where.nonzero()[0].tolist()
        found = checks.unwrapped(self.found.where(self.where, 0))
        raise self.error(self.say(at, found[tuple(at)].item()))


def refuse(values: Tensor, *wrongs: Wrong) -> Tensor:
    """Raise for the first thing that is wrong; where nobody can look, return ``values`` with NaN in the wrong rows.

    Args:
        values: (..., K), floating point, without gradient: what the loss of a row depends on.
        wrongs: what is wrong with the rows.

    Returns:
        (..., K).
    """
    if checks.can_look(wrongs[0].where):  # then at the others, which are of the same tensors
        for wrong in wrongs:
            wrong.look()
        return values
    rows = values.dim() - 1
    bad = (w.where if w.where.dim() == rows else w.where.any(-1) for w in wrongs)
    return values.masked_fill(reduce(torch.logical_or, bad)[..., None], torch.nan)


def check_floats(**named: Tensor) -> None:
    """Refuse what are no dense tensors of a dtype that is computed with."""
    for name, values in named.items():
        checks.check_tensor(name, values)
        if values.dtype not in checks._FLOATS:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {values.dtype}"
            )


def check_integers(**named: Tensor) -> None:
    """Refuse what are no dense tensors of integers."""
    for name, values in named.items():
        checks.check_tensor(name, values)
        if values.dtype not in checks._INTEGERS:
            raise TypeError(f"{name} must hold integers, got {values.dtype}")


def check_shape(name: str, values: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Refuse another shape or device than that of the questions."""
    if values.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} to go with the probabilities, got "
            f"{tuple(values.shape)}; pass what the E-step gave for these questions"
        )
    if values.device != device:
        raise ValueError(
            f"{name} is on {values.device} but the probabilities on {device}; move one"
        )


def check_choices(values: Tensor) -> None:
    """Refuse a last dimension without room for two choices."""
    if values.ndim < 1 or values.shape[-1] < 2:
        raise ValueError(
            f"a question needs two choices at least, got shape {tuple(values.shape)}; the last dimension "
            "holds the choices"
        )


def which_choices(probabilities: Tensor, valid: Tensor | None) -> Tensor:
    """Refuse what are no probabilities of choices; return which choices there are, (..., C) bool."""
    check_floats(probabilities=probabilities)
    check_choices(probabilities)
    if valid is None:
        return torch.ones_like(probabilities, dtype=torch.bool)
    checks.check_tensor("valid", valid)
    if valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, got {valid.dtype}; it says which choices there are")
    check_shape("valid", valid, probabilities.shape, probabilities.device)
    return valid


def outside(name: str, ids: Tensor, end: int, cure: str, *, there: Tensor | None = None) -> Wrong:
    """Ids that are there (None: all) and outside [0, end)."""
    ids = ids.long()
    ids = ids if there is None else ids.where(there, 0)
    return Wrong(
        ids != ids.clamp(0, end - 1),
        ids,
        lambda at, found: f"{name}{at} is {found}, outside [0, {end}); {cure}",
        IndexError,
    )


def twice(name: str, ids: Tensor, cure: str) -> Wrong:
    """Rows of ids (..., K) in which one stands twice; a negative one stands for none."""
    ordered = ids.sort(-1).values
    one, next_one = ordered[..., :-1], ordered[..., 1:]
    return Wrong(
        logical_and(one == next_one, one >= 0),
        one,
        lambda at, found: f"{name}{at[:-1]} hold {found} twice; {cure}",
    )


def few_choices(there: Tensor) -> Wrong:
    """Questions with fewer than two choices."""
    number = there.sum(-1)
    return Wrong(
        number < 2,
        number,
        lambda at, found: (
            f"question {at} has {found} of the two choices that it needs at least; leave it out"
        ),
    )


def no_probability(probabilities: Tensor, there: Tensor) -> Wrong:
    """Probabilities that are NaN or outside [0, 1], by more than rounding, of choices that are there."""
    most = 1 + max(1e-6, torch.finfo(probabilities.dtype).eps)
    return Wrong(
        logical_and(there, ~logical_and(probabilities >= 0, probabilities <= most)),
        probabilities,
        lambda at, found: (
            f"probabilities{at} is {found:g}, which is no probability in [0, 1]; take the softmax of logits"
        ),
    )


def no_log_probs(log_probs: Tensor) -> Wrong:
    """Tokens (...) whose log-probabilities (..., k) are NaN or of a sum above 1."""
    total = log_probs.exp().sum(-1)
    return Wrong(~(total < _MOST), total, _no_log_probs)


def no_candidates(there: Tensor) -> Wrong:
    """Tokens (...) that have no candidate (..., k) that is there."""
    nothing = ~there.any(-1)
    return Wrong(
        nothing,
        nothing,
        lambda at, _: (
            f"token {at} has no candidate, all its log-probabilities are -inf; leave out a token without a teacher "
            "(distillation_loss does where the first id is ignore_index)"
        ),
    )


def _no_log_probs(at: list[int], total: float) -> str:
    what = "hold NaN" if math.isnan(total) else f"are of probabilities that sum to {total:.3g}"
    return (
        f"the log-probabilities of token {at} {what}; pass those over the vocabulary in nats (logits less their "
        "logsumexp), -inf for no candidate"
    )
