"""The three operators in torch.library: schemas, fakes, autograd and FLOP counts, bound here and nowhere else.

``levelhead::linear_logit_stats`` and ``levelhead::linear_logit_stats_backward`` are the general pair: statistics
forward, tiles recomputed backward, any upstream gradient per token. ``levelhead::linear_cross_entropy`` returns a
weighted sum of token losses together with its gradients; its backward multiplies them by the upstream gradient,
in place, once. A second backward computes them anew through the general pair.

All three are opaque to the compiler on purpose: their loops depend on sizes that it would unroll. Tensors are
flat here, (N, D) and (N,); shapes, defaults and errors are the business of api.py. Autocast is switched off inside:
what is narrow has been narrowed by api.py, and float32 accumulators must stay float32.
"""

import hashlib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from . import checks, flops, vmap
from .arguments import described, gradients_of, named
from .loss import picks, token_loss_backward
from .statistics import GradientDtypes, Gradients, LogitStats, StatsGradient, statistics_dtype

# A digest of the operators' sources. Every call hands it to them, and they ignore it: a constant of a graph is part of
# the key of the compiler's caches, and autograd formulas are not. Without it a graph compiled by one version of this
# package would go on computing the gradients of that version after an upgrade.
VERSION = hashlib.sha256(
    b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py")))
).hexdigest()[:16]
# Rows of a narrow gradient that are widened at a time, to be multiplied by the upstream gradient.
_SCALED_ROWS = 2048


def implementation(impl: str | None, input: Tensor) -> ModuleType:
    """Return the module asked for, or chosen; imported when first needed, because triton takes its time."""
    if impl is None:
        cannot = checks.why_not_triton(input.device, input.dtype)
        impl = "triton" if input.is_cuda and cannot is None else "chunked"
    return import_module(f".{impl}", __package__)


@torch.library.custom_op("levelhead::linear_logit_stats", mutates_args=())
@described
def linear_logit_stats(
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    picks: Tensor,  # (N, K)
    linear_bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
    impl: str | None,
    variables: Tensor | None = None,  # (2,), in place of softcap and logit_scale
    version: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of LogitStats."""
    model = _values(variables, softcap, logit_scale)
    with checks.without_autocast(input.device.type):
        stats: LogitStats = implementation(impl, input).linear_logit_stats(
            input, linear_weight, picks, linear_bias, *model
        )
    return stats


@linear_logit_stats.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = named("linear_logit_stats", args)
    input: Tensor = call.input

    def token() -> Tensor:
        return input.new_empty(input.shape[0], dtype=statistics_dtype(input.dtype))

    picked = input.new_empty(call.picks.shape, dtype=statistics_dtype(input.dtype))
    argmax = input.new_empty(input.shape[0], dtype=torch.int64)
    return token(), picked, token(), token(), token(), argmax


@torch.library.custom_op("levelhead::linear_logit_stats_backward", mutates_args=())
@described
def linear_logit_stats_backward(
    grad_logsumexp: Tensor | None,  # (N,)
    grad_picked: Tensor | None,  # (N, K)
    grad_mean: Tensor | None,  # (N,)
    grad_expected: Tensor | None,  # (N,)
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    picks: Tensor,  # (N, K)
    linear_bias: Tensor | None,  # (V,)
    logsumexp: Tensor,  # (N,), relative to the largest logit
    expected: Tensor,  # (N,), relative to the largest logit
    largest: Tensor,  # (N,)
    softcap: float | None,
    logit_scale: float,
    output_mask: list[bool],
    impl: str | None,
    variables: Tensor | None = None,  # (2,), in place of softcap and logit_scale
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias, empty where ``output_mask`` is false."""
    gradient = StatsGradient(grad_logsumexp, grad_picked, grad_mean, grad_expected)
    keep = torch.zeros(len(input), dtype=torch.bool, device=input.device)
    for field in gradient:
        if field is not None:
            keep |= (field != 0) if field.dim() == 1 else (field != 0).any(1)
    dtypes = _gradient_dtypes(input, linear_weight, linear_bias, output_mask)
    model = _values(variables, softcap, logit_scale)
    with checks.without_autocast(input.device.type):
        gradients = implementation(impl, input).linear_logit_stats_backward(
            gradient, keep, input, linear_weight, picks, linear_bias,
            logsumexp, expected, largest, *model, dtypes,
        )  # fmt: skip
    return _some(gradients, input)


@linear_logit_stats_backward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = named("linear_logit_stats_backward", args)
    head = call.input, call.linear_weight, call.linear_bias
    return _empty_gradients(*head[:2], _gradient_dtypes(*head, call.output_mask))


@torch.library.custom_op("levelhead::linear_cross_entropy", mutates_args=())
@described
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
    output_mask: list[bool],
    impl: str | None,
    variables: Tensor | None = None,  # (3,), in place of z_loss, softcap and logit_scale
    version: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sum_i token_weight_i * loss_i and the gradients of input, weight and bias.

    The gradients of float16 tensors are float32, so that a loss scale still finds what float16 would have lost.
    """
    dtypes = _stored_dtypes(_gradient_dtypes(input, linear_weight, linear_bias, output_mask))
    options = _values(variables, z_loss, softcap, logit_scale)
    with checks.without_autocast(input.device.type):
        loss, gradients = implementation(impl, input).linear_cross_entropy(
            input, linear_weight, target, linear_bias, token_weight, label_smoothing,
            *options, dtypes,
        )  # fmt: skip
    return loss, *_some(gradients, input)


@linear_cross_entropy.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = named("linear_cross_entropy", args)
    head = call.input, call.linear_weight, call.linear_bias
    dtypes = _stored_dtypes(_gradient_dtypes(*head, call.output_mask))
    return call.token_weight.new_empty(()), *_empty_gradients(*head[:2], dtypes)


# Autograd.


def _save_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, stats = named("linear_logit_stats", inputs), LogitStats(*output)
    ctx.softcap, ctx.logit_scale, ctx.impl = call.softcap, call.logit_scale, call.impl
    # Kept, because torch.library changes it for the time of a backward, and two may run at once.
    needed = named("linear_logit_stats", ctx.needs_input_grad[: len(inputs)])
    ctx.mask = [needed.input, needed.linear_weight, needed.linear_bias]
    ctx.mark_non_differentiable(stats.max, stats.argmax)
    ctx.set_materialize_grads(False)
    head = call.input, call.linear_weight, call.picks, call.linear_bias
    saved = stats.relative_logsumexp, stats.relative_expected, stats.max, call.variables
    ctx.save_for_backward(*head, *saved)


def _stats_backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    logsumexp, picked, mean, expected, _, _ = grad_outputs
    *saved, variables = ctx.saved_tensors
    found = differentiable_stats_backward(
        logsumexp, picked, mean, expected, *saved,
        ctx.softcap, ctx.logit_scale, ctx.mask, ctx.impl, variables,
    )  # fmt: skip
    dx, dw, db = _none_where_not_needed(found, ctx.mask)
    return gradients_of("linear_logit_stats", input=dx, linear_weight=dw, linear_bias=db)


linear_logit_stats.register_autograd(_stats_backward, setup_context=_save_stats)


def _refuse_double_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "levelhead does not implement double backward: the gradient of linear_cross_entropy or "
        "linear_logit_stats was differentiated. Compute the loss with "
        "torch.nn.functional.cross_entropy(input @ linear_weight.T, target) where second derivatives "
        "are needed, or drop create_graph=True where they are not."
    )


linear_logit_stats_backward.register_autograd(_refuse_double_backward)


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = named("linear_cross_entropy", inputs)
    ctx.z_loss, ctx.softcap, ctx.logit_scale = call.z_loss, call.softcap, call.logit_scale
    ctx.mask, ctx.impl = call.output_mask, call.impl
    _, *stored = output
    ctx.claims = {}
    ctx.mark_non_differentiable(*stored)
    # Without this, backward would be handed zeros of shape (V, D) for outputs that have no gradient.
    ctx.set_materialize_grads(False)
    # The gradients are saved like the rest: a checkpoint then drops those of its first forward.
    head = call.input, call.linear_weight, call.target, call.linear_bias
    ctx.save_for_backward(*head, call.token_weight, call.label_smoothing, call.variables, *stored)


def _loss_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return gradients_of("linear_cross_entropy")
    # Read once: a checkpoint hands them out once in a backward.
    *saved, dx, dw, db = ctx.saved_tensors
    input, linear_weight, _, linear_bias, *_ = saved
    stored: tuple[Tensor, ...] = (dx, dw, db)
    if (
        torch.is_grad_enabled()
        or transformed()
        or _is_batch(grad_loss)
        or not _claim(ctx.claims, stored)
    ):
        found = _recomputed_gradients(ctx, grad_loss, *saved)
    else:
        found = tuple(_scaled(gradient, grad_loss) for gradient in stored)
    dx, dw, db = _none_where_not_needed(found, ctx.mask)
    return gradients_of(
        "linear_cross_entropy",
        input=None if dx is None else dx.to(input.dtype),
        linear_weight=None if dw is None else dw.to(linear_weight.dtype),
        linear_bias=None if db is None else db.to(linear_bias.dtype),
    )


linear_cross_entropy.register_autograd(_loss_backward, setup_context=_save_loss)


def _recomputed_gradients(
    ctx: Any,
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    token_weight: Tensor,
    label_smoothing: Tensor | None,
    variables: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the gradients anew: the stored ones are spent, or asked for with create_graph=True or in a batch.

    So are the statistics: those of logits that other products made, rounded otherwise, do not sum to 1 with these.
    """
    z_loss = ctx.z_loss if variables is None else variables[0]
    model = None if variables is None else variables[1:]
    head = input, linear_weight, picks(target, z_loss), linear_bias
    options = ctx.softcap, ctx.logit_scale
    with torch.no_grad():
        stats = LogitStats(*linear_logit_stats(*head, *options, ctx.impl, model))
    # Of a row without weight these may be NaN, and 0 * NaN would be a gradient.
    inert = token_weight == 0
    logsumexp, largest = (
        field.masked_fill(inert, 0) for field in (stats.relative_logsumexp, stats.max)
    )
    gradient = token_loss_backward(
        grad_loss * token_weight, largest, logsumexp, label_smoothing, z_loss
    )
    return differentiable_stats_backward(
        *gradient, *head, logsumexp, logsumexp, largest, *options, ctx.mask, ctx.impl, model,
    )  # fmt: skip


def _claim(claims: dict[int, object], gradients: tuple[Tensor, ...]) -> bool:
    """Return whether these stored gradients are this backward's to overwrite: the first one to ask gets them.

    The claim stands on the address: hooks on saved tensors may hand out the same memory as new tensors, which is spent,
    or a copy or what a checkpoint has recomputed, which is not; should that have the same address, the gradients are
    computed once more than needed. Two backward passes may ask at once, and `setdefault` is atomic.
    """
    if not all(map(_is_overwritten, gradients)):
        return True
    claim = object()
    return all(
        claims.setdefault(gradient.data_ptr(), claim) is claim
        for gradient in gradients
        if gradient.numel()
    )


def _is_batch(gradient: Tensor) -> bool:
    """Return whether an upstream gradient is a batch of them, of torch.autograd.grad(is_grads_batched=True)."""
    compiling = torch.compiler.is_compiling()  # which would stumble over the question
    return not compiling and functorch.is_legacy_batchedtensor(gradient)


def _is_overwritten(gradient: Tensor) -> bool:
    """Return whether a stored gradient is scaled in place; a compiler fuses the product, and reuses what it may."""
    return not torch.compiler.is_compiling() and type(gradient) is Tensor


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return a stored gradient times the upstream gradient (), rounded once; in place where that is possible."""
    # A 0-dim factor would be rounded to a narrow gradient's dtype first; shape (1,) lifts the product to float32.
    factor = factor.reshape(1)
    if not _is_overwritten(gradient):
        return (gradient * factor).to(gradient.dtype)
    # A tensor of its own on the same memory: autograd may then keep it as the `grad` of a parameter, and does not take
    # the stored one for changed, which a second backward unpacks but does not use.
    gradient = gradient.data
    if gradient.dtype == factor.dtype:
        return gradient.mul_(factor)
    for start in range(0, len(gradient), _SCALED_ROWS):
        block = gradient[start : start + _SCALED_ROWS]
        block.copy_(block * factor)
    return gradient


# torch.func and forward-mode differentiation.


def transformed() -> bool:
    """Return whether torch.func (grad, vjp, vmap, ...) or forward-mode differentiation is under way.

    Not torch.func.functionalize, which has nothing to do: the operators change none of their arguments.
    """
    if not torch._C._are_functorch_transforms_active():
        return forward_ad._current_level >= 0
    if torch.compiler.is_compiling():  # which would stumble over the questions below
        return True
    functionalize = functorch.TransformType.Functionalize
    functional = {level.key() == functionalize for level in functorch.get_interpreter_stack()}
    if len(functional) > 1:
        raise RuntimeError(
            "levelhead does not run under torch.func.functionalize together with another transform of torch.func, for "
            "which torch has no rule. Leave functionalize out: levelhead's operators change none of their arguments"
        )
    if checks.is_recorded_early():
        raise RuntimeError(
            "make_fx(pre_dispatch=True) cannot record a transform of torch.func (grad, vmap, ...) around levelhead, "
            "which is an autograd.Function there. Leave pre_dispatch out"
        )
    return functional == {False}


def differentiable_stats(*args: Any) -> tuple[Tensor, ...]:
    """Return the result of the operator ``linear_logit_stats``, whatever differentiates it."""
    function = _Stats.apply if transformed() else linear_logit_stats
    stats: tuple[Tensor, ...] = function(*args, VERSION)  # type: ignore[no-untyped-call]
    return stats


def differentiable_stats_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return the result of ``linear_logit_stats_backward``, or refuse where that is differentiated."""
    function = _StatsBackward.apply if transformed() else linear_logit_stats_backward
    gradients: tuple[Tensor, ...] = function(*args)  # type: ignore[no-untyped-call]
    return gradients


def refuse_forward_mode(ctx: Any, *_: Any) -> Any:
    """Refuse a tangent."""
    raise RuntimeError(
        "levelhead does not implement forward-mode differentiation: a tangent (of torch.func.jvp, linearize, jacfwd or "
        "hessian, or of torch.autograd.forward_ad) reached linear_cross_entropy or linear_logit_stats. Use reverse "
        "mode (torch.func.grad, vjp, jacrev), or compute the loss with "
        "torch.nn.functional.cross_entropy(input @ linear_weight.T, target) where tangents are needed."
    )


class _Stats(torch.autograd.Function):
    """The operator where a transform is under way, for which register_autograd and its dispatch do nothing.

    torch.func refuses what register_autograd makes, and forward mode passes it over: its tangents would be zero.
    """

    forward = staticmethod(linear_logit_stats)
    setup_context = staticmethod(_save_stats)
    backward = staticmethod(_stats_backward)
    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: vmap.Dims, *args: Any) -> Any:
        *head, _ = args  # differentiable_stats gives the version itself
        return vmap.linear_logit_stats(
            differentiable_stats, info.batch_size, in_dims[:-1], tuple(head)
        )


class _StatsBackward(torch.autograd.Function):
    """Its backward likewise, which has no derivative."""

    forward = staticmethod(linear_logit_stats_backward)
    backward = staticmethod(_refuse_double_backward)
    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: vmap.Dims, *args: Any) -> Any:
        return vmap.linear_logit_stats_backward(
            differentiable_stats_backward, info.batch_size, in_dims, args
        )


@linear_logit_stats.register_vmap
def _(info: Any, in_dims: vmap.Dims, *args: Any) -> Any:
    return vmap.linear_logit_stats(linear_logit_stats, info.batch_size, in_dims, args)


@linear_logit_stats_backward.register_vmap
def _(info: Any, in_dims: vmap.Dims, *args: Any) -> Any:
    return vmap.linear_logit_stats_backward(
        linear_logit_stats_backward, info.batch_size, in_dims, args
    )


@linear_cross_entropy.register_vmap
def _(info: Any, in_dims: vmap.Dims, *args: Any) -> Any:
    return vmap.loop(linear_cross_entropy, info.batch_size, in_dims, args)


# Options, shapes and dtypes.


def _values(variables: Tensor | None, *options: float | None) -> list[float | None]:
    """Return the options, or what stands for them in ``variables``, which the host must wait for on an accelerator."""
    if variables is None:
        return list(options)
    values = zip(options, variables.tolist(), strict=True)
    return [None if option is None else value for option, value in values]


def _gradient_dtypes(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, output_mask: list[bool]
) -> GradientDtypes:
    dx, dw, db = (
        tensor.dtype if needed and tensor is not None else None
        for tensor, needed in zip((input, linear_weight, linear_bias), output_mask, strict=True)
    )
    return dx, dw, db


def _stored_dtypes(dtypes: GradientDtypes) -> GradientDtypes:
    dx, dw, db = (torch.float32 if dtype == torch.float16 else dtype for dtype in dtypes)
    return dx, dw, db


def _some(gradients: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace what was not needed by empty tensors: a schema has no optional results."""
    dx, dw, db = (like.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return dx, dw, db


def _empty_gradients(
    input: Tensor, linear_weight: Tensor, dtypes: GradientDtypes
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    dx, dw, db = (
        input.new_empty(0) if dtype is None else input.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return dx, dw, db


def _none_where_not_needed(
    gradients: tuple[Tensor, ...], mask: list[bool]
) -> tuple[Tensor | None, ...]:
    return tuple(g if needed else None for g, needed in zip(gradients, mask, strict=True))


flops.register()
