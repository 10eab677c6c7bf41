"""The public functions: what they mean, what they accept, what they refuse. Nothing here computes a logit."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import checks, library
from .loss import picks, token_loss
from .rows import Rows
from .statistics import LogitStats, statistics_dtype

Impl = Literal["reference", "chunked", "triton"]
Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float | Tensor = 0.0,
    reduction: Reduction = "mean",
    softcap: float | Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    z_loss: float | Tensor = 0.0,
    token_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    r"""Cross-entropy of ``input`` projected onto a vocabulary, with label smoothing, without the logits in memory.

    Equals ``F.cross_entropy(logits, target, label_smoothing=label_smoothing)`` for the logits
    ``z = softcap * tanh(logit_scale * (input @ linear_weight.T + linear_bias) / softcap)``. Per token, in nats::

        loss = logsumexp(z) - (1 - label_smoothing) * z[target] - label_smoothing * mean(z) + z_loss * logsumexp(z)**2

    Precision: losses and products accumulate in float32 (float64 for float64 inputs) whatever the input; each
    gradient accumulates in float32 and is rounded once to its tensor's dtype, and once more by an upstream
    gradient that is not a power of two. Under autocast ``input`` is cast as a linear layer would cast it; weight
    and bias may stay float32, and their gradients do.

    With ``reduction="mean"`` or ``"sum"`` the gradient is taken in the forward pass, where one is needed; the first
    backward consumes it in place, a second one, or one that runs at the same time, recomputes it. A tensor that needs
    no gradient costs none. Until then the gradient is a saved tensor: an activation checkpoint drops that of its first
    forward, and `torch.autograd.graph.save_on_cpu` moves it.

    ``softcap``, ``logit_scale`` and ``z_loss`` may be tensors with one element, and change from call to call without
    recompilation by `torch.compile`. They get no gradient, so one that requires a gradient is refused. The operator
    reads them: on an accelerator that is a host synchronisation, for a tensor on the CPU none. The Triton kernels are
    compiled for each value: where one changes at every step, prefer ``impl="chunked"``.

    Args:
        input: hidden states, shape ``(..., D)``, any strides; float16, bfloat16, float32 or float64.
        linear_weight: the output embedding, shape ``(V, D)``; as a DTensor sharded over its rows, the head is
            tensor-parallel: ranks exchange a few statistics per token, and ``input`` and ``target`` must be the same
            on all of them. A replicated DTensor goes with DTensors of tokens that are sharded over their first
            dimension: each rank works on its own, and the gradient of the head is a partial sum, as torch's is.
        target: ids in ``[0, V)`` or ``ignore_index``, shape ``(...)``, integer. Where no host synchronisation is
            needed to look at them (eager CPU) others raise; elsewhere they make the loss NaN.
        linear_bias: shape ``(V,)``.
        ignore_index: targets of this value count nowhere; their hidden states, weights and smoothing may even be NaN.
        label_smoothing: ``eps`` in [0, 1]: the target distribution is ``(1 - eps) * onehot + eps / V``. A tensor,
            shape ``()`` or that of ``target``, may change from step to step without recompilation; its values are
            not checked.
        reduction: ``"mean"`` (over targets that count; by weight with ``token_weight``; NaN, as in torch, if there are
            none or their weights sum to 0, and its gradient then 0), ``"sum"`` or ``"none"``.
        softcap: bound of the logits, ``> 0``, as in Gemma 2; None for none; a number or of shape ``()``.
        logit_scale: factor on projection and bias, as in Cohere and Granite, the inverse of a temperature; a number or
            of shape ``()``.
        z_loss: weight of ``logsumexp**2``, as in PaLM (https://arxiv.org/abs/2204.02311), not smoothed; a number or of
            shape ``()``.
        token_weight: weight of each token's loss, shape of ``target``. ``"mean"`` divides by the sum of the weights
            that count, as torch does with class weights; NaN where the sum overflows. A token of weight 0 is inert, as
            an ignored one is, unless ``token_weight`` is differentiated.
        impl: ``"triton"`` (NVIDIA from compute capability 8.0, AMD), ``"chunked"`` (any device, small bounded buffer),
            ``"reference"`` (dense: the oracle, not for training), or None to choose: ``"triton"`` where it runs,
            ``"chunked"`` elsewhere.

    Returns:
        A scalar, or with ``reduction="none"`` a tensor of ``target``'s shape (0 where ignored); float32, or float64
        for float64 inputs.

    Raises:
        TypeError: what is no dense tensor, or no number; a dtype that is not supported, or dtypes that do not go
            together outside autocast; in `torch.jit.trace`.
        ValueError: shapes or devices that do not go together; an option out of its range, or that requires a gradient.
        IndexError: a target outside ``[0, V)`` that is not ``ignore_index`` (eager CPU).
        RuntimeError: on double backward or forward-mode differentiation, which are not implemented; under any
            transform of torch.func with a sharded head.

    References:
        Szegedy et al. 2016, https://arxiv.org/abs/1512.00567; Huang et al. 2025, https://arxiv.org/abs/2508.00264.

    Example:
        >>> import torch, levelhead
        >>> hidden, weight = torch.randn(2, 5, 8), torch.randn(32, 8, requires_grad=True)
        >>> loss = levelhead.linear_cross_entropy(hidden, weight, torch.randint(32, (2, 5)), label_smoothing=0.1)
        >>> loss.backward()
        >>> weight.grad.shape
        torch.Size([32, 8])
    """
    input = _autocast(input)
    checks.check_linear(input, linear_weight, linear_bias)
    checks.check_transforms(linear_weight)
    checks.check_ids("target", target, input, several=False)
    checks.check_options(softcap, logit_scale, impl, input)
    checks.check_loss_options(label_smoothing, reduction, z_loss, input, target)
    in_range = checks.check_target_range(target, linear_weight.shape[0], ignore_index)
    if token_weight is not None:
        checks.check_token_weight(token_weight, target)
    sharded = False
    if checks.any_dtensor(input, linear_weight, target, linear_bias, token_weight, label_smoothing):
        tokens = {"token_weight": token_weight, "label_smoothing": label_smoothing}
        sharded = _is_sharded(input, linear_weight, linear_bias, {"target": target, **tokens})

    x, ids = input.reshape(target.numel(), input.shape[-1]), target.reshape(-1).long()
    counts = ids != ignore_index
    weight = _token_weight(token_weight, counts, statistics_dtype(input.dtype))
    if reduction == "mean":
        total = weight.sum()
        nothing = total == 0
        if token_weight is not None:
            total = total + (total - total)  # NaN for inf, by which a weight would become 0
        weight = weight / total.masked_fill(nothing, torch.inf)
    if not in_range:  # nobody has looked: where the target is no id at all, the loss is NaN
        valid = ids.where(
            counts, 0
        )  # not two masks and `&`, which DTensors get wrong in inference mode
        weight = weight.where(valid == valid.clamp(0, linear_weight.shape[0] - 1), torch.nan)
    if token_weight is not None and not checks.is_differentiated(token_weight):
        counts = weight != 0
    smoothing = _smoothing(label_smoothing, weight, counts)
    plain = sharded or not checks.is_dtensor(checks.unwrapped(x))
    z_loss, *model = (_option(value, plain) for value in (z_loss, softcap, logit_scale))

    needed = _gradients_needed(input, linear_weight, linear_bias)
    exotic = _gradients_needed(token_weight, label_smoothing)
    fused_gradient = any(needed) and not any(exotic) and not sharded and not library.transformed()
    if reduction != "none" and fused_gradient:
        options, variables = _variables(z_loss, *model)
        loss: Tensor
        loss, *_ = library.linear_cross_entropy(
            x,
            linear_weight,
            ids,
            linear_bias,
            weight,
            smoothing,
            *options,
            needed,
            impl,
            variables,
            library.VERSION,
        )
    else:
        # Eager on a CPU, ignored tokens are left out here already: backward leaves them out, and fewer rows are rounded
        # otherwise.
        leave_out = in_range and not checks.is_dtensor(x) and not library.transformed()
        rows = Rows(counts) if leave_out else None
        if rows is not None:
            x, ids, weight, counts = (rows.take(tensor) for tensor in (x, ids, weight, counts))
            smoothing = None if smoothing is None else rows.take(smoothing)
        targets = picks(ids, z_loss)
        stats = _stats(sharded, x, linear_weight, targets, linear_bias, model, impl)
        # Ignored rows may hold NaN: masked here, before anything is computed from them, they have no gradient.
        logsumexp, picked, mean, _, largest, _ = stats
        largest, logsumexp, picked, again, mean = (
            field.where(counts, 0)
            for field in (largest, logsumexp, picked[:, 0], picked[:, -1], mean)
        )
        if isinstance(z_loss, Tensor):  # a copy: it may be filled anew before the backward
            z_loss = z_loss.to(weight, copy=True)
        losses = weight * token_loss(largest, logsumexp, picked, mean, smoothing, z_loss, again)
        if reduction == "none":
            return (losses if rows is None else rows.put(losses)).reshape(target.shape)
        loss = losses.sum()
    # The mean of nothing is NaN, as in torch, and its gradient zero.
    return loss.masked_fill(nothing, torch.nan) if reduction == "mean" else loss


# A graph of torch.fx.symbolic_trace, which knows no values, holds the call of the module below as it is.
torch.fx.wrap("linear_cross_entropy")


class LinearCrossEntropyLoss(nn.Module):
    """A linear layer and the cross-entropy of its logits, in one; the module form of :func:`linear_cross_entropy`.

    Named and laid out as ``torch.nn.LinearCrossEntropyLoss``: the layer is ``self.linear``. To use the head
    that a model has already, tie it (``loss.linear.weight = model.lm_head.weight``) or call the function.

    Args:
        in_features: size ``D`` of the hidden states.
        num_classes: size ``V`` of the vocabulary.
        bias: whether the layer has a bias.
        device: of the layer's parameters.
        dtype: of the layer's parameters.
        ignore_index: see :func:`linear_cross_entropy`, as for all that follow.
        label_smoothing: in [0, 1].
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        softcap: bound of the logits, or None; a number or of shape ``()``, not to be trained, as the two that follow.
        logit_scale: factor on the logits before the softcap; a number or of shape ``()``.
        z_loss: weight of ``logsumexp**2``; a number or of shape ``()``.
        impl: ``"triton"``, ``"chunked"``, ``"reference"`` or None to choose.

    Shape:
        input ``(..., D)``, target ``(...)``; nats, a scalar, or ``(...)`` with ``reduction="none"``; float32 or
        float64.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: in forward, as :func:`linear_cross_entropy` does.

    References:
        Szegedy et al. 2016, https://arxiv.org/abs/1512.00567; Huang et al. 2025, https://arxiv.org/abs/2508.00264.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        softcap: float | Tensor | None = None,
        logit_scale: float | Tensor = 1.0,
        z_loss: float | Tensor = 0.0,
        impl: Impl | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction: Reduction = reduction
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.z_loss = z_loss
        self.impl: Impl | None = impl

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Tensor:
        """Return the loss of hidden states.

        Args:
            input: hidden states, shape ``(..., D)``.
            target: ids in ``[0, V)`` or ``ignore_index``, shape ``(...)``, integer.
            token_weight: weight of each token's loss, shape of ``target``.

        Returns:
            Nats; a scalar, or with ``reduction="none"`` shape ``(...)``; float32, or float64 for float64 inputs.

        Raises:
            TypeError: as :func:`linear_cross_entropy`.
            ValueError: as :func:`linear_cross_entropy`.
            IndexError: as :func:`linear_cross_entropy`.
            RuntimeError: as :func:`linear_cross_entropy`.
        """
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            z_loss=self.z_loss,
            token_weight=token_weight,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """Return the options, for print(module)."""
        names = ("label_smoothing", "reduction", "softcap", "logit_scale", "z_loss", "ignore_index")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def linear_logit_stats(
    input: Tensor,
    linear_weight: Tensor,
    picks: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    impl: Impl | None = None,
) -> LogitStats:
    """Statistics of the logits ``z = softcap * tanh(logit_scale * (input @ linear_weight.T + linear_bias) / softcap)``.

    What a loss, a distillation target or a calibration metric needs, without the logits in memory. Differentiable
    in ``logsumexp``, ``picked``, ``mean`` and ``expected``; the backward recomputes the logits tile by tile.

    ``softcap`` and ``logit_scale`` may be tensors, as in :func:`linear_cross_entropy`.

    Precision: statistics and products accumulate in float32 (float64 for float64 inputs) whatever the input; each
    gradient accumulates in float32 and is rounded once to its tensor's dtype. An offset of the logits costs no
    digits of ``log_probs``, ``entropy`` and ``confidence``.

    Args:
        input: hidden states, shape ``(..., D)``, any strides; float16, bfloat16, float32 or float64.
        linear_weight: the output embedding, shape ``(V, D)``, or a DTensor, as in
            :func:`linear_cross_entropy`.
        picks: vocabulary ids, one or K a token, shape ``(...)`` or ``(..., K)``, integer; repeats allowed. An id
            outside ``[0, V)``, such as an ignored target, picks nothing: 0, without gradient.
        linear_bias: shape ``(V,)``.
        softcap: bound of the logits, ``> 0``; None for none; a number or of shape ``()``.
        logit_scale: factor on projection and bias, the inverse of a temperature; a number or of shape ``()``.
        impl: ``"triton"`` (NVIDIA from compute capability 8.0, AMD), ``"chunked"`` (any device, small bounded buffer),
            ``"reference"`` (dense: the oracle, not for training), or None to choose: ``"triton"`` where it runs,
            ``"chunked"`` elsewhere.

    Returns:
        LogitStats, fields of shape ``(...)``, picked that of ``picks``; nats; float32 or float64, argmax int64.

    Raises:
        TypeError: what is no dense tensor, or no number; a dtype that is not supported, or dtypes that do not go
            together outside autocast; in `torch.jit.trace`.
        ValueError: shapes or devices that do not go together; an option out of its range, or that requires a gradient.
        RuntimeError: on double backward or forward-mode differentiation, which are not implemented; under any
            transform of torch.func with a sharded head.

    References:
        Huang et al. 2025, https://arxiv.org/abs/2508.00264, for the losses that need these and nothing more.

    Example:
        >>> import torch, levelhead
        >>> hidden, weight = torch.randn(2, 5, 8), torch.randn(32, 8)
        >>> stats = levelhead.linear_logit_stats(hidden, weight, torch.randint(32, (2, 5, 3)))
        >>> stats.confidence.shape, stats.log_probs.shape
        (torch.Size([2, 5]), torch.Size([2, 5, 3]))
    """
    input = _autocast(input)
    checks.check_linear(input, linear_weight, linear_bias)
    checks.check_transforms(linear_weight)
    checks.check_ids("picks", picks, input, several=True)
    checks.check_options(softcap, logit_scale, impl, input)
    sharded = False
    if checks.any_dtensor(input, linear_weight, picks, linear_bias):
        sharded = _is_sharded(input, linear_weight, linear_bias, {"picks": picks})
    tokens = input.shape[:-1]
    per_token = 1 if picks.shape == tokens else picks.shape[-1]
    n = math.prod(tokens)  # tokens.numel() would be a constant to torch.export
    x = input.reshape(n, input.shape[-1])
    ids = picks.long().reshape(n, per_token)
    plain = sharded or not checks.is_dtensor(checks.unwrapped(x))
    model = [_option(value, plain) for value in (softcap, logit_scale)]
    stats = _stats(sharded, x, linear_weight, ids, linear_bias, model, impl)
    logsumexp, picked, *others = stats
    return LogitStats(
        logsumexp.reshape(tokens),
        picked.reshape(picks.shape),
        *(field.reshape(tokens) for field in others),
    )


def _is_sharded(
    input: Tensor, linear_weight: Any, linear_bias: Tensor | None, tokens: dict[str, Any]
) -> bool:
    """Return whether the head is sharded over the vocabulary; refuse DTensors that do not go together otherwise."""
    if checks.is_sharded(linear_weight):
        from .vocab_parallel import check_tokens

        check_tokens(linear_weight, tokens)
        return True
    from .sharding import check_layout

    head = {"linear_weight": linear_weight, "linear_bias": linear_bias}
    check_layout({"input": input, **tokens}, head)
    return False


def _stats(
    sharded: bool,
    x: Tensor,
    linear_weight: Tensor,
    ids: Tensor,
    linear_bias: Tensor | None,
    model: list[float | Tensor | None],
    impl: str | None,
) -> tuple[Tensor, ...]:
    """Return the statistics (N,) and (N, K) of flat arguments; those of a sharded head are merged over its ranks."""
    options, variables = _variables(*model)
    args: Any = (x, linear_weight, ids, linear_bias, *options, impl, variables)
    if sharded:
        from .vocab_parallel import linear_logit_stats as of_shards

        return of_shards(*args)
    return library.differentiable_stats(*args)


def _option(value: Any, plain: bool) -> Any:
    """Return softcap, logit_scale or z_loss as a number, as a tensor (), or as None.

    Beside DTensors, ``plain`` is false, a tensor is read: they take no plain one.
    """
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return float(value)
    value = value.detach().reshape(())
    if checks.is_dtensor(value):
        value = value.full_tensor()
    return value if plain else value.item()


def _variables(*options: Any) -> tuple[list[float | None], Tensor | None]:
    """Return the numbers to compile in, and the options in one tensor where one may change from call to call.

    That is a tensor, or a number that the compiler takes for a variable since it saw a second one.
    """
    if not any(map(checks.is_variable, options)):
        return list(options), None
    devices = [option.device for option in options if isinstance(option, Tensor)]
    device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    dtype = torch.float32 if device.type == "mps" else torch.float64  # which MPS lacks
    one = torch.ones((), device=device, dtype=dtype)
    variables = torch.stack(
        [
            option.to(one)
            if isinstance(option, Tensor)
            else one * (1.0 if option is None else option)
            for option in options
        ]
    )
    return [None if option is None else 1.0 for option in options], variables


def _autocast(input: Tensor) -> Tensor:
    """Cast as autocast would for a linear layer; the operators have autocast switched off."""
    checks.check_tensor("input", input)
    device = input.device.type
    if not checks.autocast_is_on(device) or input.dtype == torch.float64:
        return input
    return input.to(torch.get_autocast_dtype(device))


def _gradients_needed(*tensors: Tensor | float | None) -> list[bool]:
    enabled = torch.is_grad_enabled()
    return [enabled and isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors]


def _token_weight(token_weight: Tensor | None, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return each token's weight (N,), 0 where ignored."""
    if token_weight is None:
        return counts.to(dtype)
    return token_weight.reshape(-1).to(dtype).masked_fill(~counts, 0)


def _smoothing(label_smoothing: float | Tensor, weight: Tensor, counts: Tensor) -> Tensor | None:
    """Return each token's smoothing (N,), 0 where ignored; None for none."""
    if not isinstance(label_smoothing, Tensor):
        # Multiply, do not use `full_like`: Dynamo then treats a number that changes as symbolic, and does not
        # recompile.
        return torch.ones_like(weight) * float(label_smoothing) if label_smoothing else None
    # Not `expand_as`, which DTensors get wrong in inference mode.
    return label_smoothing.to(weight).reshape(-1).where(counts, 0)
