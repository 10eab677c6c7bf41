"""Logits of a few given ids a token, as dot products with gathered rows of the head: no pass over the vocabulary.

``linear_logit_stats`` has them too, beside statistics that need the whole vocabulary: 8 NVD forward and backward. Where
they alone are needed this takes 3 NKD, K ids a token. The gathered rows, (N, K, D), would outweigh the logits where
K * D > V, so they stand in float32 for a few tokens at a time, in the forward and again in the backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import vmap
from .chunked import buffer_budget
from .library import VERSION, _refuse_double_backward, refuse_forward_mode, transformed
from .rows import Rows
from .statistics import statistics_dtype
from .sums import slices


def linear_gather(
    input: Tensor,
    linear_weight: Tensor,
    ids: Tensor,
    linear_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """Return the logits (N, K) of ``ids`` (N, K) for hidden states (N, D); 0 for an id outside the vocabulary."""
    inside = _inside(ids, linear_weight)
    z = _products(input, linear_weight, ids, VERSION)
    if linear_bias is not None:
        z = z + linear_bias.to(z.dtype)[ids.where(inside, 0)]
    z = logit_scale * z
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z.where(inside, 0)


@torch.library.custom_op("levelhead::linear_gather", mutates_args=())
def linear_gather_products(
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    ids: Tensor,  # (N, K)
    version: str,  # noqa: ARG001 (see library.py)
) -> Tensor:
    """Return the products (N, K) of hidden states with the rows of the head that ``ids`` names."""
    kept = Rows(_inside(ids, linear_weight).any(1))
    input, picks = kept.take(input), kept.take(ids)
    z = torch.empty(picks.shape, dtype=statistics_dtype(input.dtype), device=input.device)
    for rows, x, gathered in _gathered(input, linear_weight, picks):
        torch.bmm(gathered, x[:, :, None], out=z[rows, :, None])
    return kept.put(z)


@linear_gather_products.register_fake
def _(input: Tensor, linear_weight: Tensor, ids: Tensor, version: str) -> Tensor:  # noqa: ARG001
    return input.new_empty(ids.shape, dtype=statistics_dtype(input.dtype))


@torch.library.custom_op("levelhead::linear_gather_backward", mutates_args=())
def linear_gather_backward(
    grad: Tensor,  # (N, K)
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    ids: Tensor,  # (N, K)
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of input and weight, empty where ``output_mask`` is false."""
    inside = _inside(ids, linear_weight)
    kept = Rows(inside.any(1))
    x_all, picks, grad = kept.take(input), kept.take(ids), kept.take(grad.where(inside, 0))
    dx, dw = (
        torch.zeros(like.shape if needed else (0,), dtype=grad.dtype, device=grad.device)
        for like, needed in zip((x_all, linear_weight), output_mask, strict=True)
    )
    for rows, x, gathered in _gathered(x_all, linear_weight, picks):
        if output_mask[0]:
            torch.bmm(grad[rows, None], gathered, out=dx[rows, None])
        if output_mask[1]:
            outer = torch.mul(grad[rows, :, None], x[:, None], out=gathered)
            dw.index_add_(
                0, picks[rows].clamp(0, len(linear_weight) - 1).flatten(), outer.flatten(0, 1)
            )
    dx = kept.put(dx) if output_mask[0] else dx
    return dx.to(input.dtype), dw.to(linear_weight.dtype)


@linear_gather_backward.register_fake
def _(
    grad: Tensor,  # noqa: ARG001
    input: Tensor,
    linear_weight: Tensor,
    ids: Tensor,  # noqa: ARG001
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    dx, dw = (
        like.new_empty(like.shape if needed else (0,))
        for like, needed in zip((input, linear_weight), output_mask, strict=True)
    )
    return dx, dw


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.needed = list(ctx.needs_input_grad[:2])  # kept: as in library.py
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw = _products_backward(grad.contiguous(), *ctx.saved_tensors, ctx.needed)
    return dx if ctx.needed[0] else None, dw if ctx.needed[1] else None, None, None


linear_gather_products.register_autograd(_backward, setup_context=_setup_context)
linear_gather_backward.register_autograd(_refuse_double_backward)


def _products(*args: Any) -> Tensor:
    """Return the result of ``linear_gather_products``, whatever differentiates it."""
    function = _Products.apply if transformed() else linear_gather_products
    z: Tensor = function(*args)  # type: ignore[no-untyped-call]
    return z


def _products_backward(*args: Any) -> tuple[Tensor, Tensor]:
    """Return the result of ``linear_gather_backward``, or refuse where that is differentiated."""
    function = _ProductsBackward.apply if transformed() else linear_gather_backward
    gradients: tuple[Tensor, Tensor] = function(*args)  # type: ignore[no-untyped-call]
    return gradients


class _Products(torch.autograd.Function):
    """The operator where a transform of torch.func or forward mode is under way: see ``_Stats`` in library.py."""

    forward = staticmethod(linear_gather_products)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)
    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: vmap.Dims, *args: Any) -> Any:
        (z,), (dim,) = vmap.loop(lambda *call: (_products(*call),), info.batch_size, in_dims, args)
        return z, dim


class _ProductsBackward(torch.autograd.Function):
    """Its backward likewise, which has no derivative."""

    forward = staticmethod(linear_gather_backward)
    backward = staticmethod(_refuse_double_backward)
    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: vmap.Dims, *args: Any) -> Any:
        return vmap.loop(_products_backward, info.batch_size, in_dims, args)


def _inside(ids: Tensor, linear_weight: Tensor) -> Tensor:
    return ids == ids.clamp(0, len(linear_weight) - 1)


def _gathered(
    input: Tensor, linear_weight: Tensor, ids: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield a few tokens at a time: which, their hidden states (T, D) and their rows of the head (T, K, D)."""
    dtype, k, d = statistics_dtype(input.dtype), ids.shape[1], input.shape[1]
    tokens = buffer_budget(linear_weight) // max(2 * dtype.itemsize * k * d, 1)
    for rows in slices(len(input), max(tokens, 1)):
        local = ids[rows].clamp(0, len(linear_weight) - 1)
        yield rows, input[rows].to(dtype), linear_weight[local].to(dtype)
