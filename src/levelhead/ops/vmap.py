"""The operators under torch.vmap: a batch of tokens is more tokens, a batch of heads or of sums is a loop.

Each rule is given the function to call on what it has unbatched: the operator itself, or, where torch.func may
differentiate it, the autograd.Function around it (library.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import named, per_token

Dims = tuple[Any, ...]  # of each argument the batch's dimension, None for none
Function = Callable[..., tuple[Tensor, ...]]


def linear_logit_stats(
    function: Function, size: int, dims: Dims, args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], Dims]:
    """Return the statistics of a batch of calls, and where their batch dimension is."""
    tokens = per_token("linear_logit_stats")
    if not _only(tokens, dims):
        return loop(function, size, dims, args)
    args, shape = _fold(size, dims, args, tokens)
    outputs = function(*args)
    return tuple(_unfold(field, shape) for field in outputs), (0,) * len(outputs)


def linear_logit_stats_backward(
    function: Function, size: int, dims: Dims, args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], Dims]:
    """Return the gradients of a batch of calls; one for the head, which sums over tokens, is due to each call."""
    tokens = per_token("linear_logit_stats_backward")
    output_mask = named("linear_logit_stats_backward", args).output_mask
    if not _only(tokens, dims) or output_mask != [True, False, False]:
        return loop(function, size, dims, args)
    args, shape = _fold(size, dims, args, tokens)
    dx, *empty = function(*args)
    return (_unfold(dx, shape), *empty), (0, None, None)


def loop(
    function: Function, size: int, dims: Dims, args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], Dims]:
    """Return the results of one call after the other, stacked."""
    calls = [
        function(
            *(
                arg.select(dim, i) if isinstance(arg, Tensor) and dim is not None else arg
                for arg, dim in zip(args, dims, strict=True)
            )
        )
        for i in range(size)
    ]
    outputs = tuple(torch.stack(field) for field in zip(*calls, strict=True))
    return outputs, (0,) * len(outputs)


def _only(tokens: Sequence[int], dims: Dims) -> bool:
    """Return whether nothing is batched but what is per token."""
    return all(dim is None for i, dim in enumerate(dims) if i not in tokens)


def _fold(
    size: int, dims: Dims, args: tuple[Any, ...], tokens: Sequence[int]
) -> tuple[tuple[Any, ...], tuple[int, int]]:
    """Return the arguments with (B, N, ...) as (B N, ...) in those that are per token, and (B, N)."""
    folded, shape = list(args), (size, 0)
    for i in tokens:
        if args[i] is not None:
            batch = args[i].expand(size, *args[i].shape) if dims[i] is None else args[i]
            batch = batch.movedim(dims[i] or 0, 0)
            folded[i], shape = batch.flatten(0, 1), (size, batch.shape[1])
    return tuple(folded), shape


def _unfold(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a result (B N, ...) as (B, N, ...)."""
    return tensor.reshape(*shape, *tensor.shape[1:])
