"""What the pass puts into a graph: the operators, given what the graph says of its head.

These run while the compiler traces. Their arguments are nodes and plain values, since a graph prints as code; those
that describe the head, the same for all, are:

- ``transposed``: the weight is (D, V).
- ``index``: positions taken of the hidden states, one after the other.
- ``shift``: "last" or "first", the position that the graph leaves out of every sequence, None for neither.
- ``grad``: whether the layer ran with gradients enabled.
- ``autocast``: the dtype that autocast gave the layer's operands, None for none.
- ``softcap``, ``logit_scale``: as in `levelhead.linear_cross_entropy`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...ops.loss import token_loss


def _traceable(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep a function out of inference mode, in which torch 2.11 cannot trace a view; gradients stay on or off."""

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Tensor:
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            return function(*args, **options)

    return run


def linear_cross_entropy(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    *,
    label_smoothing: float,
    ignore_index: int,
    reduction: Literal["mean", "sum", "none"],
    dtype: torch.dtype,
    detached: bool,
    **head: Any,
) -> Tensor:
    """Return what F.cross_entropy returned, in its dtype."""
    # Gradients may have been switched off since, or detached.
    head["grad"] = head["grad"] and not detached and torch.is_grad_enabled()
    with _as_the_layer_ran(input, head):
        hidden, shape = _hidden(input, head)
        loss = ops.linear_cross_entropy(
            hidden,
            linear_weight.t() if head["transposed"] else linear_weight,
            _unshifted(target.reshape(shape), head["shift"], ignore_index),
            linear_bias=linear_bias,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            softcap=head["softcap"],
            logit_scale=head["logit_scale"],
        )
    if reduction == "none":
        # Never a view that was made without gradients: the graph may change in place what it gets.
        loss = _shifted(loss, head["shift"]).reshape(target.shape).clone()
    return loss.to(dtype)


def linear_logit_stats(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    picks: Sequence[Tensor],
    *,
    picks_per_token: Sequence[int],
    from_end: Sequence[bool],
    **head: Any,
) -> tuple[Tensor, ...]:
    """Return the fields of LogitStats for the tokens (...) of the graph; of all picks, picked is (..., K).

    Negative picks count from the end of the vocabulary where ``from_end`` says so, as indices do.
    """
    weight = linear_weight.t() if head["transposed"] else linear_weight
    with _as_the_layer_ran(input, head):
        hidden, shape = _hidden(input, head)
        columns = [
            (ids.where(ids >= 0, ids + weight.shape[0]) if indices else ids).reshape((*shape, k))
            for ids, k, indices in zip(picks, picks_per_token, from_end, strict=True)
        ]
        ids = _unshifted(torch.cat(columns, -1), head["shift"], -1, trailing=1)
        stats = ops.linear_logit_stats(
            hidden,
            weight,
            ids,
            linear_bias=linear_bias,
            softcap=head["softcap"],
            logit_scale=head["logit_scale"],
        )
        return tuple(_shifted(f, head["shift"], trailing=f.dim() - len(shape)) for f in stats)


@_traceable
def statistic(
    stats: tuple[Tensor, ...],
    *,
    kind: str,
    name: str,
    columns: tuple[int, int],
    factor: float,
    vocabulary: int,
    shape: tuple[int, ...] | None,
    keepdim: int | None,
    dtype: torch.dtype,
    detached: bool,
) -> Tensor:
    """Return a reduction of logits, log-probabilities or probabilities over the vocabulary.

    Args:
        stats: the fields of LogitStats.
        kind: of what; see `tiles.Tile`.
        name: which; see `tiles.Reduction`.
        columns: first and end of ``picked``, where the reduction is that.
        factor: multiplies the result.
        vocabulary: its size.
        shape: of the result; None for that of the tokens.
        keepdim: where the result then has the vocabulary's dimension, None for nowhere.
        dtype: of the result.
        detached: whether the result has no gradient.
    """
    s, dim = ops.LogitStats(*stats), keepdim
    of_logits = kind in ("logits", "expected_logits")
    if name == "argmax":
        value = s.argmax
    elif name == "picked":
        # Log-probabilities never by way of the absolute logsumexp: its rounding grows with the logits' offset.
        value = (s.picked if of_logits else s.log_probs)[..., slice(*columns)]
        if columns[1] - columns[0] == 1:
            value = value[..., 0]
        else:
            dim = None
    else:
        # The sum over the vocabulary of p z is `expected`; that of z is the mean times its size.
        total = s.relative_expected if kind.startswith("expected") else s.relative_mean
        relative = {"max": torch.zeros_like(s.max), "logsumexp": s.relative_logsumexp}
        value = relative.get(name, total)
        value = s.max + value if of_logits else value - s.relative_logsumexp
    if name == "sum" and not kind.startswith("expected"):
        factor = factor * vocabulary
    if name == "mean" and kind.startswith("expected"):
        factor = factor / vocabulary
    if name != "argmax":
        value = (value.exp() if kind == "probs" else value) * factor
    value = value.detach() if detached else value
    if shape is not None:
        value = value.reshape(shape)
    elif dim is not None:
        value = value.unsqueeze(dim)
    # Never a statistic itself, nor a view of one: the graph may change in place what it gets.
    return value.clone() if name == "argmax" else value.to(dtype)


@_traceable
def cross_entropy(
    stats: tuple[Tensor, ...],
    target: Tensor,
    *,
    column: int,
    label_smoothing: float,
    ignore_index: int,
    reduction: Literal["mean", "sum", "none"],
    vocabulary: int,
    dtype: torch.dtype,
    detached: bool,
) -> Tensor:
    """Return F.cross_entropy of the logits with these statistics, picked at ``column`` for the targets."""
    s = ops.LogitStats(*stats)
    ids = target.reshape(s.max.shape)
    counts = ids != ignore_index
    outside = counts & ((ids < 0) | (ids >= vocabulary))
    fields = (s.max, s.relative_logsumexp, s.picked[..., column], s.relative_mean)
    losses = token_loss(*fields, label_smoothing or None, 0.0)
    losses = losses.where(counts, 0).masked_fill(outside, torch.nan)
    if reduction == "none":
        loss = losses.reshape(target.shape)
    else:
        loss = losses.sum() if reduction == "sum" else losses.sum() / counts.sum()
    return (loss.detach() if detached else loss).to(dtype)


def stand_in(
    input: Tensor, *, vocabulary: int, dtype: torch.dtype, index: tuple[Any, ...]
) -> Tensor:
    """Return what takes the place of logits that nobody wants: of their shape, all NaN, without memory."""
    hidden = input
    for taken in index:
        hidden = hidden[taken]
    return hidden.new_full((), torch.nan, dtype=dtype).expand((*hidden.shape[:-1], vocabulary))


@contextmanager
def _as_the_layer_ran(input: Tensor, head: dict[str, Any]) -> Iterator[None]:
    """Bring back the modes of the layer: those around its loss, where this runs, may be others."""
    dtype = head["autocast"]
    autocast = torch.autocast(input.device.type, dtype=dtype, enabled=dtype is not None)
    inference = torch.is_inference_mode_enabled() and not head["grad"]
    with torch.inference_mode(inference), torch.set_grad_enabled(head["grad"]), autocast:
        yield


def _hidden(input: Tensor, head: dict[str, Any]) -> tuple[Tensor, tuple[int, ...]]:
    """Return the hidden states to work on, and the shape of the tokens that the graph has of them."""
    hidden = input
    for index in head["index"]:
        hidden = hidden[index]
    tokens = tuple(hidden.shape[:-1])
    return hidden, tokens if head["shift"] is None else (*tokens[:-1], tokens[-1] - 1)


def _shifted(tensor: Tensor, shift: str | None, trailing: int = 0) -> Tensor:
    """Leave out the first or last position of each sequence, the last dimension but ``trailing`` ones."""
    if shift is None:
        return tensor
    dim = tensor.dim() - 1 - trailing
    return tensor.narrow(dim, int(shift == "first"), tensor.shape[dim] - 1)


def _unshifted(ids: Tensor, shift: str | None, fill: int, trailing: int = 0) -> Tensor:
    """Give back that position, with ids that count nowhere: cheaper than a copy of the hidden states."""
    if shift is None:
        return ids
    return F.pad(ids, (0, 0) * trailing + {"last": (0, 1), "first": (1, 0)}[shift], value=fill)
