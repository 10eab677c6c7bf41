"""Train a Hugging Face causal language model with smoothed labels and without its logits.

Why classes are swapped. A patched model is an instance of a subclass of its own class, under the
same name, and its head is a `LossHead`. Methods set on the instances instead would be lost in
pickles, in the modules that accelerate rebuilds and in data-parallel replicas, or stay bound to the
original there. A class travels with its instance through deepcopy, pickle and `torch.save`, and
FSDP2, which swaps classes itself, composes with it.

Why the head computes the loss. Inside the call of the head, and only there, FSDP and ZeRO have
gathered its weight. So the model's forward stashes the labels, the head answers with the loss in
place of logits, and `loss_function`, which the model's own forward calls next, hands that loss
back. Whatever else the forward does (a router loss, say) stays its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear_cross_entropy
from .heads import HeadTransform, output_head, probe_head

_IGNORE_INDEX = -100  # of transformers' losses

ModelT = TypeVar("ModelT", bound=nn.Module)


def patch_model(model: ModelT, smoothing: float = 0.1) -> ModelT:
    """Make `model` train on label-smoothed cross-entropy that never forms the logits.

    A call in training mode with `labels` (or `shift_labels`) then returns the loss that
    `torch.nn.functional.cross_entropy(..., label_smoothing=smoothing)` gives on the model's logits,
    with the same gradients, and no `logits`. It is the mean over the valid tokens, or their sum
    over `num_items_in_batch`; a batch without any gives loss 0 and zero gradients. Every other call
    (eval, generate, no labels, `logits_to_keep`, `skip_logits=False`) is what it was.

    The patch adds no parameter, buffer or state_dict key. Patching again only sets `smoothing`.

    Args:
        model: a causal language model whose head is a plain `torch.nn.Linear`; changed in place.
        smoothing: the share of probability spread evenly over the vocabulary, in [0, 1].

    Returns:
        The same object.

    Raises:
        ValueError: `smoothing` lies outside [0, 1], or the model does with its head or its loss
            what the patch could not reproduce; the message says what, and what to do.

    Example:
        >>> model = patch_model(AutoModelForCausalLM.from_pretrained(name), smoothing=0.1)
        >>> model(input_ids=ids, labels=ids).loss.backward()
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must lie in [0, 1], got {smoothing}; a common choice is 0.1")
    state = _state(model)
    if state is None:
        state = _PatchState(smoothing, probe_head(model))
        _become(output_head(model), LossHead)
        _become(model, _patched_class(_original_class(model)))
    vars(model)["_levelhead"] = replace(state, smoothing=smoothing)
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Undo `patch_model` exactly, also inside a wrapper; without a patch, change nothing.

    Raises:
        ValueError: FSDP2 or the like has changed the class of the model since it was patched.
    """
    for module in model.modules():
        if _state(module) is not None:
            _unpatch(module)
    return model


def _unpatch(model: Any) -> None:
    original = _original_class(model)
    if type(model) is not _patched_class(original):
        raise ValueError(
            f"unpatch_model cannot find {original.__name__} under {type(model).__name__}, a class "
            "that the model was given after patch_model; unpatch it before fully_shard"
        )
    head = model.get_output_embeddings()
    if type(head) is LossHead:  # else something took its place after patch_model
        _become(head, nn.Linear)
    _become(model, original)
    del vars(model)["_levelhead"]


def _original_class(model: Any) -> Any:
    """The class of `model` without the patch."""
    return getattr(type(model), "_levelhead_original", type(model))


def _become(module: Any, cls: Any) -> None:
    module.__class__ = cls


@dataclass(frozen=True)
class _PatchState:
    """What a patched model carries in its `__dict__`."""

    smoothing: float
    transform: HeadTransform


@dataclass
class _TrainingCall:
    """A training forward under way: what its head needs, and the loss the head leaves here."""

    state: _PatchState
    target: Tensor  # (..., T) int64, the token after each position
    num_items: int | Tensor | None
    loss: Tensor | None = None
    handed_back: bool = False

    def loss_function(self, logits: Tensor, labels: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """The loss the head left here, in place of one computed from `logits`."""
        if self.loss is None or logits.numel() != 1:
            raise RuntimeError(
                "the loss was asked for, but the patched head did not compute it: the head was "
                "replaced or wrapped after patch_model (by an adapter, quantisation or "
                "resize_token_embeddings). Undo that, or call unpatch_model and patch_model again"
            )
        if labels.shape != self.target.shape:
            raise RuntimeError(
                f"the model changed the labels from shape {tuple(self.target.shape)} to "
                f"{tuple(labels.shape)} on the way to its loss; patch_model cannot follow that"
            )
        self.handed_back = True
        # Adds nothing, but leads the backward pass through whatever became of the head's output:
        # FSDP and ZeRO gather the head's weight in hooks on that tensor.
        return self.loss + 0.0 * logits.float().sum()


# The training forward under way, if any. A module variable because a deepcopy of the model may copy
# the head apart from it; not thread-safe, which is why nn.DataParallel is refused.
_call: _TrainingCall | None = None


def _run(call: _TrainingCall | None, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `forward` as `call`; None hides an outer call from the heads of models inside it."""
    global _call
    outer, _call = _call, call
    try:
        return forward(*args, **kwargs)
    finally:
        _call = outer


class LossHead(nn.Linear):
    """The head of a patched model: in a training call its output is the loss, shape (1, 1, 1)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's argument name)
        """Logits (..., V) for hidden states (..., D) outside a training call, its loss within."""
        call = _call
        if call is None:
            return super().forward(input)
        if call.loss is not None:
            raise RuntimeError(
                "the head was called twice in one training forward, but patch_model knows the "
                "labels of one call only. Use unpatch_model to train this model"
            )
        call.loss = _head_loss(self, input, call)
        # As many dimensions as logits have; no view, because models scale logits in place.
        return call.loss.reshape(1, 1, 1).clone()


def _head_loss(head: nn.Linear, hidden: Tensor, call: _TrainingCall) -> Tensor:
    """The smoothed cross-entropy of the logits that `head` would give for `hidden` (..., T, D)."""
    target = call.target.to(hidden.device)
    if hidden.shape[:-1] != target.shape:
        raise ValueError(
            f"labels of shape {tuple(target.shape)} do not fit hidden states of shape "
            f"{tuple(hidden.shape)}: there must be one label per position"
        )
    transform = call.state.transform
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    if transform.vocab_size is not None:
        weight = weight[: transform.vocab_size]
        bias = None if bias is None else bias[: transform.vocab_size]
    return linear_cross_entropy(
        hidden,
        weight,
        target,
        linear_bias=bias,
        ignore_index=_IGNORE_INDEX,
        label_smoothing=call.state.smoothing,
        reduction="sum",
        softcap=transform.softcap,
        logit_scale=transform.logit_scale,
        # The op takes its gradient in the forward pass and rounds it once to the parameter's dtype;
        # a division of its result would rescale, and round, that gradient a second time.
        token_weight=_token_weight(hidden, target, call.num_items),
    )


def _token_weight(hidden: Tensor, target: Tensor, num_items: int | Tensor | None) -> Tensor:
    """1 / num_items in the shape of `target`; None stands for the number of valid tokens."""
    count = (target != _IGNORE_INDEX).sum() if num_items is None else num_items
    if isinstance(count, Tensor):
        count = count.to(target.device)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    items = torch.ones(target.shape, dtype=dtype, device=target.device) * count
    # At least 1: no valid token means loss 0, where 0 / 0 would poison every rank with NaN.
    return items.clamp(min=1).reciprocal()


def _state(model: nn.Module) -> _PatchState | None:
    """The patch of `model`, if it has one."""
    return vars(model).get("_levelhead")  # not getattr, which a wrapper would forward


@functools.cache
def _patched_class(original: Any) -> Any:
    """The subclass of `original` whose instances are patched; it goes by the name of `original`."""
    signature = inspect.signature(original.forward)
    names = list(signature.parameters)[1:]
    unpatched_loss_function = original.loss_function.fget

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        skip_logits = kwargs.pop("skip_logits", None)
        given = dict(zip(names, args, strict=False)) | kwargs
        misused = len(given) < len(args) + len(kwargs)  # left to Python's own TypeError
        call = None if skip_logits is False or misused else _training_call(self, given)
        if call is None:
            return _run(None, original.forward, self, *args, **kwargs)
        return _train(self, call, original.forward, given)

    # Not functools.wraps: accelerate's unwrap_model follows __wrapped__ and would drop the patch.
    # Trainer reads the signature to choose columns and to see that the loss takes num_items.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = original.forward.__doc__
    forward.__qualname__ = original.forward.__qualname__

    def loss_function(self: Any) -> Any:
        return unpatched_loss_function(self) if _call is None else _call.loss_function

    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": lambda self, _protocol: (_rebuild, (original,), self.__getstate__()),
        "_levelhead_original": original,
        "forward": forward,
        "loss_function": property(loss_function, original.loss_function.fset),
    }
    return type(original.__name__, (original,), namespace)


def _rebuild(original: Any) -> nn.Module:
    """An empty patched instance, for pickle and copy to fill with the state of the old one."""
    subclass = _patched_class(original)
    instance: nn.Module = subclass.__new__(subclass)
    return instance


def _training_call(model: nn.Module, given: dict[str, Any]) -> _TrainingCall | None:
    """What a forward of `model` with these arguments trains on; None: it must give logits."""
    labels: Any = given.get("labels")
    target: Any = given.get("shift_labels")
    keep = given.get("logits_to_keep", 0)
    whole = isinstance(keep, int) and keep == 0  # a Tensor of positions has no truth value
    state = _state(model)
    if state is None or not model.training or not whole or (labels is None and target is None):
        return None
    if "_is_replica" in vars(model):
        raise RuntimeError(
            "a patched model does not run under torch.nn.DataParallel, whose threads would share "
            "one training call; use torch.nn.parallel.DistributedDataParallel"
        )
    if target is None:
        target = F.pad(labels, (0, 1), value=_IGNORE_INDEX)[..., 1:]
    return _TrainingCall(state, target, given.get("num_items_in_batch"))


def _train(
    model: Any, call: _TrainingCall, forward: Callable[..., Any], given: dict[str, Any]
) -> Any:
    """Run the model's own `forward` as the training call `call`; its output, without logits."""
    return_dict = given.pop("return_dict", None)
    if given.get("labels") is None:
        given["labels"] = call.target  # without labels no model asks for its loss
    output = _run(call, forward, model, **given, return_dict=True)
    if not call.handed_back:
        raise RuntimeError(
            f"{type(model).__name__} did not ask loss_function for its loss, so there is none; "
            "use unpatch_model to train this model"
        )
    # Rebuilt, because setting a field of a ModelOutput to None leaves it among the items.
    output = type(output)(**{k: v for k, v in output.items() if k != "logits"})
    if return_dict is None:
        return_dict = model.config.return_dict
    return output if return_dict else output.to_tuple()
