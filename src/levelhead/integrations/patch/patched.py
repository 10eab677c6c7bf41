"""The class of a patched model.

Why classes are swapped. A patched model is an instance of a subclass of its own class, under the
same name, and its head is a `LossHead`. Methods set on the instances instead would be lost in
pickles, in the modules that accelerate rebuilds and in data-parallel replicas, or stay bound to the
original there. A class travels with its instance through deepcopy, pickle and `torch.save`, and
FSDP2, which swaps classes itself, composes with it.

Why the head computes the loss: see loss_head.py. What a call is refused for: see new_call.py.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from .forward import forward_with_loss
from .hollow import accepted
from .loss_call import LossCall, NoLoss, Shown, run, under_way
from .new_call import new_call, trains
from .state import PatchState, patch_state
from .trl_forward import adapt


@functools.cache
def patched_class(original: Any) -> Any:
    """Return the subclass of `original` whose instances are patched; it has the name of `original`."""
    signature = inspect.signature(original.forward)
    names = _positional_names(original)
    unpatched_loss_function = original.loss_function.fget

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        skip_logits = kwargs.pop("skip_logits", None)
        columns = _take_columns(self, kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        # Too many arguments, or one given twice: the original raises Python's own TypeError.
        misused = len(given) < len(args) + len(kwargs)
        call: LossCall | NoLoss = NoLoss.WITHOUT_LABELS
        if not misused:
            call = new_call(self, given, skip_logits=skip_logits, columns=columns)
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
    """Make an empty patched instance, which pickle and copy fill with the state of the old one."""
    subclass = patched_class(original)
    instance: nn.Module = subclass.__new__(subclass)
    return instance


def shown_options(state: PatchState) -> str:
    """Return the options of a patch as `print(model)` shows them at its head."""
    options: dict[str, Any] = {"smoothing": state.smoothing}
    if isinstance(state.temperature, Tensor) or state.temperature != 1:
        options["temperature"] = state.temperature
    if state.softcap is not None:
        options["softcap"] = state.softcap
    if state.objective is not None:
        options["objective"] = state.objective
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _positional_names(cls: Any) -> list[str]:
    """Return the names of the positional arguments of a forward; of the inherited one if it is `(*args, **kwargs)`."""
    for base in cls.__mro__:
        if "forward" in vars(base):
            parameters = list(inspect.signature(base.forward).parameters.values())[1:]
            if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
                return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return []


def _refuse_loss(name: str, call: Any, *_args: Any, **_kwargs: Any) -> Any:
    """Stand for the loss function in a call that would train without smoothing, and refuse it."""
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
    """Return the forward that a patched model takes when `forward` is set on it; refuse one that bypasses the patch.

    Liger and TRL set a forward on the instance and tell the model nothing, so the module of the function is all there
    is to know them by.
    """
    function = getattr(forward, "__func__", forward)
    # functools.wraps copies __module__ from what is wrapped, so TRL's function around ours is known by its globals.
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
        return adapt(model, forward)
    return forward


def _take_columns(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Take the columns that the objective needs from the arguments; the model does not know them."""
    state = patch_state(model)
    names = () if state is None or state.objective is None else state.objective.columns
    return {name: kwargs.pop(name) for name in names if name in kwargs}
