"""Train a Hugging Face causal language model with smoothed labels and without its logits.

Why classes are swapped. A patched model is an instance of a subclass of its own class, under the
same name, and its head is a `LossHead`. Methods set on the instances instead would be lost in
pickles, in the modules that accelerate rebuilds and in data-parallel replicas, or stay bound to the
original there. A class travels with its instance through deepcopy, pickle and `torch.save`, and
FSDP2, which swaps classes itself, composes with it.

Why the head computes the loss: see loss_head.py.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import is_dtensor
from .heads import (
    BOUND_FORWARDS,
    inner_heads,
    is_own_forward,
    language_model,
    output_heads,
    refusal,
)
from .loss_head import IGNORE_INDEX, LossCall, LossHead, Objective, current_call, loss_head, run
from .options import check_options
from .probe import HeadTransform, probe_head, withhold_labels

ModelT = TypeVar("ModelT", bound=nn.Module)


def patch_model(
    model: ModelT,
    smoothing: float | Tensor = 0.1,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    eval_smoothing: float = 0.0,
    eval_logits: bool = True,
) -> ModelT:
    """Make `model` train on label-smoothed cross-entropy that never forms the logits.

    A call in training mode with `labels` (or `shift_labels`) then returns the loss that
    `torch.nn.functional.cross_entropy(..., label_smoothing=smoothing)` gives on the model's logits,
    with the same gradients, and no `logits` (with `skip_logits=False`, those too). It is the mean
    over the valid tokens, or their sum over `num_items_in_batch`, in nats and float32 (float64 for
    float64 models); a batch without any gives loss 0 and zero gradients. Every other call (eval,
    generate, no labels, `logits_to_keep`) is what it was, unless the options say otherwise.

    The patch adds no parameter, buffer or state_dict key. Patching again only sets the options.

    Args:
        model: a Hugging Face language model, or a wrapper around one (PEFT, DDP, FSDP, DeepSpeed,
            `torch.compile`), whose head is a plain `torch.nn.Linear`; changed in place.
        smoothing: the share of probability spread evenly over the vocabulary, in [0, 1]. A 0-dim
            Tensor is kept as it is: filled in place, it changes the smoothing from step to step
            without recompilation; what it is filled with is not checked.
        temperature: T > 0 of training: the logits are divided by T, the loss is multiplied by it.
            T < 1 lets the head of a small model become confident, so that smoothing has an effect.
        softcap: bound of the logits in training, > 0, for a model that has none of its own.
        eval_smoothing: smoothing of the loss of an eval call with labels, in [0, 1].
        eval_logits: False: an eval call with labels gives no logits either, and takes no memory for
            them.

    Returns:
        The same object.

    Raises:
        TypeError: an option is of another type, or `model` is no module.
        ValueError: an option lies outside its range, or the model does with its head or its loss
            what the patch could not reproduce; the message says what, and what to do.

    References:
        Huang et al. 2025, https://arxiv.org/abs/2508.00264, for smoothing, temperature and softcap.

    Example:
        >>> model = patch_model(AutoModelForCausalLM.from_pretrained(name), smoothing=0.1)
        >>> model(input_ids=ids, labels=ids).loss.backward()
    """
    check_options(smoothing, temperature, softcap, eval_smoothing, eval_logits)
    inner = language_model(model)
    state = patch_state(inner)
    transform = probe_head(inner) if state is None else state.transform
    if softcap is not None and transform.softcap is not None:
        raise refusal(
            inner,
            f"it caps its logits at {transform.softcap:g} already, and softcap={softcap:g} would "
            "come on top",
            "Leave softcap out",
        )
    if state is None:
        for head in output_heads(inner):
            _become(head, loss_head(original_class(head)))
            if "forward" in vars(head) and is_dtensor(head.weight):
                vars(head)["_levelhead_forward"] = vars(head).pop("forward")
        _become(inner, _patched_class(original_class(inner)))
    vars(inner)["_levelhead"] = PatchState(
        transform, smoothing, temperature, softcap, eval_smoothing, eval_logits
    )
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Undo `patch_model` exactly, also inside a wrapper; without a patch, change nothing.

    Args:
        model: what `patch_model` was given; changed in place.

    Returns:
        The same object.

    Raises:
        ValueError: FSDP2 or the like has changed the class of the model since it was patched.
    """
    for module in model.modules():
        if patch_state(module) is not None:
            _unpatch(module)
    return model


def _unpatch(model: Any) -> None:
    original = original_class(model)
    if type(model) is not _patched_class(original):
        raise ValueError(
            f"unpatch_model cannot find {original.__name__} under {type(model).__name__}, a class "
            "that the model was given after patch_model; unpatch it before fully_shard"
        )
    heads = [module for module in model.modules() if isinstance(module, LossHead)]
    for head in heads:
        if type(head) is not loss_head(original_class(head)):
            raise ValueError(
                f"unpatch_model finds a head of class {type(head).__name__}, which it was given "
                "after patch_model; undo that first (a parametrisation, or fully_shard)"
            )
    for head in heads:
        _become(head, original_class(head))
        if "_levelhead_forward" in vars(head):
            vars(head)["forward"] = vars(head).pop("_levelhead_forward")
    _become(model, original)
    del vars(model)["_levelhead"]


def original_class(model: Any) -> Any:
    """The class of `model` without the patch."""
    return getattr(type(model), "_levelhead_original", type(model))


def _become(module: Any, cls: Any) -> None:
    """Change the class of a module, and with it the forward that Accelerate's hooks call."""
    bound = [name for name in BOUND_FORWARDS if is_own_forward(module, vars(module).get(name))]
    module.__class__ = cls
    for name in bound:
        vars(module)[name] = MethodType(cls.forward, module)


@dataclass(frozen=True)
class PatchState:
    """What a patched model carries in its `__dict__`: what it does with its logits, and options."""

    transform: HeadTransform
    smoothing: float | Tensor
    temperature: float
    softcap: float | None
    eval_smoothing: float
    eval_logits: bool
    objective: Objective | None = None  # of training, in place of the smoothed cross-entropy

    def training_transform(self) -> HeadTransform:
        """The model's own transform, then temperature and softcap."""
        own = self.transform.at_temperature(self.temperature)
        return own if self.softcap is None else replace(own, softcap=self.softcap)


# Patched models that have warned of a training call without labels.
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def patch_state(model: nn.Module) -> PatchState | None:
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
        columns = _take_columns(self, kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        misused = len(given) < len(args) + len(kwargs)  # left to Python's own TypeError
        call = None if misused else _loss_call(self, given, skip_logits, columns)
        if call is None:
            return run(None, original.forward, self, *args, **kwargs)
        return forward_with_loss(self, call, original.forward, given)

    # Not functools.wraps: accelerate's unwrap_model follows __wrapped__ and would drop the patch.
    # Trainer reads the signature to choose columns and to see that the loss takes num_items.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = original.forward.__doc__
    forward.__qualname__ = original.forward.__qualname__

    def loss_function(self: Any) -> Any:
        call = current_call()
        return unpatched_loss_function(self) if call is None else call.loss_function

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if name == "forward":
            value = _replacement(self, value)
        original.__setattr__(self, name, value)

    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__setattr__": set_attribute,
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


def _replacement(model: nn.Module, forward: Any) -> Any:
    """What a patched model takes where a forward that would train past the patch is set on it."""
    function = getattr(forward, "__func__", forward)
    # A decorated function goes by the module of what it wraps: TRL's, around ours, by this one.
    modules = (
        getattr(function, "__module__", ""),
        getattr(function, "__globals__", {}).get("__name__"),
    )
    packages = {str(module).partition(".")[0] for module in modules}
    if "liger_kernel" in packages:
        raise RuntimeError(
            f"Liger replaces the forward of the patched {type(model).__name__}, so that it would "
            "train without smoothing. Keep its other kernels with "
            'liger_kernel_config={"fused_linear_cross_entropy": False}, or use unpatch_model'
        )
    if "trl" in packages:
        from .trl import adapt

        return adapt(model, forward)
    return forward


def _take_columns(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Take what the objective needs out of the arguments of a forward, which the model does not know."""
    state = patch_state(model)
    names = () if state is None or state.objective is None else state.objective.columns
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def _loss_call(
    model: nn.Module,
    given: dict[str, Any],
    skip_logits: bool | None,
    columns: dict[str, Tensor],
) -> LossCall | None:
    """What a forward with these arguments must do about its loss; None: what the model does."""
    state = patch_state(model)
    labels: Any = given.get("labels")
    target: Any = given.get("shift_labels")
    keep = given.get("logits_to_keep", 0)
    whole = isinstance(keep, int) and keep == 0  # a Tensor of positions has no truth value
    if state is None or not whole:
        return None
    if labels is None and target is None:
        if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _warn_of_missing_labels(model)
        return None
    if skip_logits is None:
        skip_logits = model.training or not state.eval_logits
    if not model.training and not skip_logits and state.eval_smoothing == 0:
        return None
    if "_is_replica" in vars(model):
        raise RuntimeError(
            "a patched model does not run under torch.nn.DataParallel, whose threads would share "
            "one training call; use torch.nn.parallel.DistributedDataParallel"
        )
    _check_heads(model)
    objective = state.objective if model.training else None
    if objective is not None and len(columns) < len(objective.columns):
        raise ValueError(
            f"the objective of the patched {type(model).__name__} needs {objective.columns} in every "
            f"training batch, and this one has {tuple(columns)}; pass them to the model beside its "
            "labels (Trainer does with remove_unused_columns=False)"
        )
    if target is None:
        shift = state.transform.shift
        target = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if shift else labels
    return LossCall(
        state.training_transform() if model.training else state.transform,
        state.smoothing if model.training else state.eval_smoothing,
        state.temperature if model.training else 1.0,
        target,
        given.get("num_items_in_batch"),
        keep_logits=not skip_logits,
        objective=objective,
        columns=columns,
    )


def _check_heads(model: nn.Module) -> None:
    """Refuse a head that was replaced or wrapped since it was patched: it may give other logits."""
    for head in inner_heads(model):
        if not isinstance(head, LossHead):
            raise RuntimeError(
                f"the head of the patched {type(model).__name__} is a {type(head).__name__} now: it "
                "was replaced or wrapped after patch_model (by an adapter, quantisation or "
                "resize_token_embeddings), and the loss would be another. Undo that, or call "
                "unpatch_model and patch_model again; to train the head beside an adapter, list it "
                "in modules_to_save"
            )


def _warn_of_missing_labels(model: nn.Module) -> None:
    if model not in _warned:
        _warned.add(model)
        warnings.warn(
            f"the patched {type(model).__name__} was called in training mode without labels, and "
            "gave logits without smoothing. If Trainer took the labels away, for its "
            "label_smoothing_factor or compute_loss_func, it computes the loss from all logits: "
            "leave those out, patch_model smooths by itself",
            stacklevel=3,
        )


def forward_with_loss(
    model: Any, call: LossCall, forward: Callable[..., Any], given: dict[str, Any]
) -> Any:
    """Run the model's own `forward` as `call`; its output, with the loss, perhaps without logits."""
    return_dict = given.pop("return_dict", None)
    own_loss = call.transform.own_loss
    if own_loss:
        if given.get("output_router_logits", getattr(model.config, "output_router_logits", False)):
            raise RuntimeError(
                f"{type(model).__name__} adds its router losses where it computes its loss by "
                "itself, which the patch does in its place. Use output_router_logits=False, or "
                "unpatch_model"
            )
        withhold_labels(model, given)
    elif given.get("labels") is None:
        given["labels"] = call.target  # without labels no model asks for its loss
    output = run(call, forward, model, **given, return_dict=True)
    loss = call.hand_back(output.logits) if own_loss else output.loss
    if not call.handed_back:
        raise RuntimeError(
            f"{type(model).__name__} did not ask loss_function for its loss, so there is none; "
            "use unpatch_model to train this model"
        )
    # Rebuilt, because setting a field of a ModelOutput to None leaves it among the items.
    dropped = () if call.keep_logits else ("logits",)
    fields = {k: v for k, v in output.items() if k not in dropped} | {"loss": loss}
    output = type(output)(**fields)
    if return_dict is None:
        return_dict = model.config.return_dict
    return output if return_dict else output.to_tuple()
