"""The class of a patched model: when its forward computes the smoothed loss, and what is refused.

Why classes are swapped. A patched model is an instance of a subclass of its own class, under the
same name, and its head is a `LossHead`. Methods set on the instances instead would be lost in
pickles, in the modules that accelerate rebuilds and in data-parallel replicas, or stay bound to the
original there. A class travels with its instance through deepcopy, pickle and `torch.save`, and
FSDP2, which swaps classes itself, composes with it.

Why the head computes the loss: see loss_head.py. What may change on the way to it: see loss_call.py.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import can_look
from .callers import refuse_missing_logits, refuse_other_losses
from .forward import forward_with_loss
from .heads import class_path, inner_heads
from .hollow import accepted
from .loss_call import IGNORE_INDEX, LossCall, NoLoss, Objective, Shown, run, under_way
from .loss_head import LossHead
from .options import check_positive
from .probe import HeadTransform, Probed, code_of, probe, read_by
from .probe_loss import loss_source
from .reads import Seen, watched


@dataclass(frozen=True)
class PatchState:
    """What a patched model carries in its `__dict__`: what the probe has found, and options."""

    probed: Probed
    smoothing: float | Tensor
    temperature: float | Tensor
    softcap: float | Tensor | None
    eval_smoothing: float
    eval_logits: bool
    objective: Objective | None = None  # of training, in place of the smoothed cross-entropy
    looks: int = 0  # how often what its loss reads has changed
    seen: Seen = field(default_factory=Seen, compare=False)
    # What changes in the model without effect on its loss, by place and name.
    no_matter: frozenset[tuple[str, str]] = frozenset()

    @property
    def transform(self) -> HeadTransform:
        """What the model does with the output of its head."""
        return self.probed.transform

    def training_transform(self) -> HeadTransform:
        """The model's own transform, then temperature and softcap."""
        if isinstance(self.temperature, Tensor) and can_look(self.temperature):
            check_positive("temperature", self.temperature)  # it may have been filled since
        own = self.transform
        if isinstance(self.temperature, Tensor) or self.temperature != 1:
            own = own.at_temperature(self.temperature)
        softcap: Any = self.softcap
        return own if softcap is None else replace(own, softcap=softcap)


def patch_state(model: nn.Module) -> PatchState | None:
    """The patch of `model`, if it has one."""
    return vars(model).get("_levelhead")  # not getattr, which a wrapper would forward


def trains(model: nn.Module) -> bool:
    """Whether the loss of a call of `model` is one to train on: it can be differentiated, or the mode is training."""
    return model.training or torch.is_grad_enabled()


@functools.cache
def patched_class(original: Any) -> Any:
    """The subclass of `original` whose instances are patched; it goes by the name of `original`."""
    signature = inspect.signature(original.forward)
    names = _positional_names(original)
    unpatched_loss_function = original.loss_function.fget

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        skip_logits = kwargs.pop("skip_logits", None)
        columns = _take_columns(self, kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        # Too many arguments, or one given twice: Python's own TypeError, or *args that nobody can name.
        misused = len(given) < len(args) + len(kwargs)
        call: LossCall | NoLoss = NoLoss.WITHOUT_LABELS
        if not misused:
            call = loss_call(self, given, skip_logits=skip_logits, columns=columns)
        if isinstance(call, NoLoss):
            return run(call, original.forward, self, *args, **kwargs)
        return forward_with_loss(self, call, original.forward, given)

    # Not functools.wraps: accelerate's unwrap_model follows __wrapped__ and would drop the patch.
    # Trainer reads the signature to choose columns and to see that the loss takes num_items.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = original.forward.__doc__
    forward.__qualname__ = original.forward.__qualname__

    def own_loss_function(self: Any) -> Any:
        call = under_way()
        if isinstance(call, LossCall):
            return call.loss_function
        if call is NoLoss.LEFT_ALONE or not trains(self):
            return unpatched_loss_function(self)
        return functools.partial(_refuse_loss, type(self).__name__, call)

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if name == "forward":
            value = _replacement(self, value)
        original.__setattr__(self, name, value)

    def show(self: Any) -> str:
        state = patch_state(self)
        if state is None:
            return str(original.__repr__(self))
        return str(run(Shown(shown_options(state)), original.__repr__, self))

    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__setattr__": set_attribute,
        "__reduce_ex__": lambda self, _protocol: (_rebuild, (original,), self.__getstate__()),
        "__repr__": show,
        "_levelhead_original": original,
        "_levelhead_returns_dict": "return_dict" in accepted(original, {"return_dict": True}),
        "forward": forward,
        "loss_function": property(own_loss_function, original.loss_function.fset),
    }
    return type(original.__name__, (original,), namespace)


def _rebuild(original: Any) -> nn.Module:
    """An empty patched instance, for pickle and copy to fill with the state of the old one."""
    subclass = patched_class(original)
    instance: nn.Module = subclass.__new__(subclass)
    return instance


def shown_options(state: PatchState) -> str:
    """The options of a patch, as `print(model)` shows them at its head."""
    options: dict[str, Any] = {"smoothing": state.smoothing}
    if isinstance(state.temperature, Tensor) or state.temperature != 1:
        options["temperature"] = state.temperature
    if state.softcap is not None:
        options["softcap"] = state.softcap
    if state.objective is not None:
        options["objective"] = state.objective
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _positional_names(cls: Any) -> list[str]:
    """What the positional arguments of a forward are called; if it is `(*args, **kwargs)`, of the one it inherits."""
    for base in cls.__mro__:
        if "forward" in vars(base):
            parameters = list(inspect.signature(base.forward).parameters.values())[1:]
            if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
                return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return []


def _refuse_loss(name: str, call: Any, *_args: Any, **_kwargs: Any) -> Any:
    """What a patched model gets for its loss function in a call that would train without smoothing."""
    if call is NoLoss.WITHOUT_LABELS:
        raise RuntimeError(
            f"the patched {name} computes a loss in a call that was given no labels by that name, so "
            "it would not be smoothed. Pass them as labels=..."
        )
    raise RuntimeError(
        f"the loss_function of the patched {name} was called past the forward that patch_model gave "
        "it: the forward was replaced or bypassed, and the loss would not be smoothed. Wrap the "
        "forward that the patched model has, or replace it before patch_model"
    )


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


def loss_call(
    model: Any,
    given: dict[str, Any],
    *,
    skip_logits: bool | None = True,
    columns: Mapping[str, Tensor] | None = None,
    kind: type[LossCall] = LossCall,
) -> LossCall | NoLoss:
    """What a forward with these arguments must do about its loss."""
    state = patch_state(model)
    if state is None:
        return NoLoss.LEFT_ALONE
    labels: Any = given.get("labels")
    shift_labels: Any = given.get("shift_labels")
    training = trains(model)
    if labels is None and shift_labels is None:
        if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            refuse_other_losses(model)
            _warn_of_missing_labels(model)
        return NoLoss.WITHOUT_LABELS
    ignore_index = given.get("ignore_index", IGNORE_INDEX)
    _check_types(labels=labels, shift_labels=shift_labels)
    if type(ignore_index) is not int:
        raise TypeError(
            f"ignore_index must be an int, got {ignore_index!r}; {IGNORE_INDEX} is the default"
        )
    if skip_logits is None:
        skip_logits = training or not state.eval_logits
        if skip_logits and not training and not torch.compiler.is_compiling():
            refuse_missing_logits(model)
    alone = not training and not skip_logits and state.eval_smoothing == 0
    if alone and labels is not None:
        return NoLoss.LEFT_ALONE
    if training and not model.training:
        _warn_of_eval_mode(model)
    state = check_call(model, state, given)
    objective = state.objective if training else None
    columns = dict(columns or {})
    if objective is not None and len(columns) < len(objective.columns):
        raise ValueError(
            f"the objective of the patched {type(model).__name__} needs {objective.columns} in every "
            f"training batch, and this one has {tuple(columns)}; pass them to the model beside its "
            "labels (Trainer does with remove_unused_columns=False)"
        )
    target = _target(labels, shift_labels, state.transform.shift, ignore_index)
    if labels is None:
        labels = target  # without labels no model asks for its loss
    return kind(
        transform=state.training_transform() if training else state.transform,
        own=state.transform,
        smoothing=state.smoothing if training else state.eval_smoothing,
        factor=state.temperature if training else 1.0,
        target=target,
        num_items=given.get("num_items_in_batch"),
        labels=labels,
        shift_labels=shift_labels,
        ignore_index=ignore_index,
        honoured=state.probed.loss_options,
        kept=state.probed.returns_loss,
        keep_logits=not skip_logits,
        objective=objective,
        columns=columns,
    )


def _check_types(**labels: Any) -> None:
    """Refuse labels that are no tensors."""
    for name, value in labels.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a tensor of ids, got {type(value).__name__}; torch.as_tensor makes one"
            )


def _target(labels: Any, shift_labels: Any, shift: bool, ignore_index: int) -> Tensor:
    """The token to predict at each position, -100 for none."""
    target: Tensor = labels if shift_labels is None else shift_labels
    if shift and shift_labels is None:
        target = F.pad(target, (0, 1), value=IGNORE_INDEX)[..., 1:]
    if ignore_index != IGNORE_INDEX:
        target = target.masked_fill(target.long() == ignore_index, IGNORE_INDEX)
    return target


def check_call(model: Any, state: PatchState, given: dict[str, Any]) -> PatchState:
    """The patch of a model, looked at anew if its config has changed; refuses what it cannot serve."""
    name = type(model).__name__
    if "_is_replica" in vars(model):
        raise RuntimeError(
            "a patched model does not run under torch.nn.DataParallel, which averages the losses of "
            "its replicas without regard to how many labels each has; use "
            "torch.nn.parallel.DistributedDataParallel"
        )
    for head in inner_heads(model, state.probed.head_path):
        if not isinstance(head, LossHead):
            raise RuntimeError(
                f"the head of the patched {name} is of class {class_path(head)} now: it was replaced or "
                "wrapped after patch_model (by an adapter, quantisation or "
                "resize_token_embeddings), and the loss would be another. Undo that, or call "
                "patch_model again; to train the head beside an adapter, list it "
                "in modules_to_save"
            )
    own, kind = loss_source(model)
    if own is not state.probed.loss_source[0] or kind != state.probed.loss_source[1]:
        raise RuntimeError(
            f"the loss_function of the patched {name} was replaced after patch_model, whose loss is "
            "another one. Call patch_model again to have it looked at, or use unpatch_model to train "
            "with it"
        )
    # The compiler could not trace a probe; it guards on what the model's own forward reads.
    if torch.compiler.is_compiling():
        _check_compiled(model, state)
    else:
        state = _looked_at_again(model, state)
    known = state.probed.forward_arguments
    if known is not None:
        # Not by subtraction: torch 2.11 cannot trace that, and this is traced.
        unknown = sorted(name for name in given if name not in known)
        if unknown:
            raise RuntimeError(
                f"the patched {name} computes its loss itself, and {unknown[0]} may change it in a way "
                "that patch_model does not know. Leave it out, or use unpatch_model"
            )
    if state.transform.own_loss and given.get("ignore_index", IGNORE_INDEX) != IGNORE_INDEX:
        raise RuntimeError(
            f"the patched {name} computes its loss itself, without ignore_index. Set labels that do not "
            f"count to {IGNORE_INDEX}"
        )
    if not state.probed.takes_shift_labels and given.get("shift_labels") is not None:
        raise RuntimeError(
            f"the patched {name} computes its loss from labels, and shift_labels would not change it. "
            "Pass labels alone, or use unpatch_model"
        )
    return state


def _check_compiled(model: Any, state: PatchState) -> None:
    """Refuse a loss of the user's own whose code reads what has changed, or what no compiler could watch."""
    plain, other = state.probed.compiled_reads
    for in_config, name, value in plain:
        if getattr(model.config if in_config else model, name, None) != value:
            other = name
    if other is not None:
        raise RuntimeError(
            f"the loss of the patched {type(model).__name__} is not transformers' own, and in compiled code "
            f"nothing tells whether {other}, which it can read, has changed. Call patch_model again if it "
            "has; else let the loss read numbers of the model or its config alone, or do not compile it"
        )


def _looked_at_again(model: Any, state: PatchState) -> PatchState:
    """The patch of a model, after another look at it if something has changed that its loss may depend on."""
    before = state.probed
    if (
        (state.seen.is_same(model) or _is_as_probed(model, state))
        and code_of(model) == before.code
        and (before.reads is None or before.reads == read_by(model, state.transform, before.code))
    ):
        return state
    probed = probe(model)
    # What changes from step to step without effect, such as a count of steps, is no reason to look again. What
    # the code of a loss reads may have an effect later.
    no_matter = state.no_matter
    if replace(probed, watched={}) == replace(before, watched={}):
        old, new = _flat(before.watched, state), _flat(probed.watched, state)
        no_matter |= {n for n, v in new.items() if old.get(n, v) != v}
    looks = state.looks + (probed.reads != before.reads)
    if looks == _MANY_LOOKS:
        name = next(n for n, v in (probed.reads or {}).items() if (before.reads or {}).get(n) != v)
        warnings.warn(
            f"the patched {type(model).__name__} has been looked at anew {looks} times, which takes time: {name} "
            "changes, which the code of its loss may read. Keep it where that does not",
            stacklevel=4,
        )
    state = replace(state, probed=probed, no_matter=no_matter, looks=looks)
    vars(model)["_levelhead"] = state
    return state


def _is_as_probed(model: Any, state: PatchState) -> bool:
    """Whether no number that matters has changed since the model was looked at."""
    found, before = watched(model), state.probed.watched
    same = found == before or _flat(found, state) == _flat(before, state)
    if same:
        state.seen.take(model)
    return same


def _flat(found: dict[str, dict[str, Any]], state: PatchState) -> dict[tuple[str, str], Any]:
    """What was watched, by place and name, but what does not matter."""
    flat = {(place, name): v for place, kept in found.items() for name, v in kept.items()}
    return {name: v for name, v in flat.items() if name not in state.no_matter}


# Looks at a model whose loss reads what changes, after which a warning says so.
_MANY_LOOKS = 5

# Patched models that have warned of a training call without labels, and of one in eval mode.
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_warned_of_mode: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _warn_of_missing_labels(model: nn.Module) -> None:
    _warn_once(
        _warned,
        model,
        f"the patched {type(model).__name__} was called in training mode without labels, and "
        "gave logits without smoothing. If Trainer took the labels away, for its "
        "label_smoothing_factor or compute_loss_func, it computes the loss from all logits: "
        "leave those out, patch_model smooths by itself",
    )


def _warn_of_eval_mode(model: nn.Module) -> None:
    if torch.compiler.is_compiling():
        _warn_of_compiled_eval_mode(type(model).__name__)
    else:
        _warn_once(_warned_of_mode, model, _eval_mode(type(model).__name__))


def _warn_of_compiled_eval_mode(name: str) -> None:
    """Warn while a call is compiled, which calls this then, and not later."""
    warnings.warn(_eval_mode(name), stacklevel=2)


# What torch.compiler.assume_constant_result does, which loads the whole compiler.
_warn_of_compiled_eval_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _eval_mode(name: str) -> str:
    return (
        f"the patched {name} was called with labels in eval mode, with gradients enabled: that "
        "counts as training, so its loss is smoothed, and there are no logits. To train, call model.train() first; "
        "to evaluate, use torch.no_grad()"
    )


def _warn_once(warned: weakref.WeakSet[nn.Module], model: nn.Module, message: str) -> None:
    if model not in warned:
        warned.add(model)
        warnings.warn(message, stacklevel=5)
