"""Run a patched model's own forward with labels, and put the loss that its head computed into the output."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .hollow import is_mapping, is_of_users, output_field, output_fields, withhold_labels
from .loss_call import LossCall, run
from .stand_in import NO_LOGITS, ChangedError, NoLogits, StandIn, holds_stand_in, no_logits


def forward_with_loss(
    model: Any, call: LossCall, forward: Callable[..., Any], given: dict[str, Any]
) -> Any:
    """Run the model's own `forward` as `call`; return its output with the loss, without logits unless they are kept."""
    return_dict = given.pop("return_dict", None)
    if model._levelhead_returns_dict:
        given["return_dict"] = True
    own_loss = call.own.own_loss
    if own_loss:
        if given.get("output_router_logits", getattr(model.config, "output_router_logits", False)):
            raise RuntimeError(
                f"{type(model).__name__} adds its router losses where it computes its loss by "
                "itself, which the patch does in its place. Use output_router_logits=False, or "
                "unpatch_model"
            )
        withhold_labels(model, given)
    else:
        given["labels"] = call.labels
    try:
        return _with_loss(model, call, run(call, forward, model, **given), return_dict)
    except BaseException as error:
        if not torch.compiler.is_compiling():
            _forget(model)
        ours = isinstance(error, (ChangedError, torch.OutOfMemoryError))
        if ours or not isinstance(error, _OF_LOGITS) or call.loss is None or call.keep_logits:
            raise
        raise RuntimeError(
            f"the forward of the patched {type(model).__name__} failed after its head "
            f"({type(error).__name__}: {error}). In training its logits are a stand-in for one token: if "
            "it needs them all, call it with skip_logits=False"
        ) from error


# Errors of a forward that cannot go on with the logits of one token.
_OF_LOGITS = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def _with_loss(model: Any, call: LossCall, output: Any, return_dict: bool | None) -> Any:
    """Return what a forward returned, with the loss, and with logits only if they are kept."""
    own_loss = call.own.own_loss
    if own_loss:
        loss = call.hand_back(output_field(output, "logits"))
    else:
        loss = output_field(output, "loss")
        if call.returned is None:
            raise ChangedError(
                f"{type(model).__name__} did not ask loss_function for its loss, so there is none; "
                "use unpatch_model to train this model"
            )
        call.check_returned(loss)
    drop = not call.keep_logits
    if drop and not torch.compiler.is_compiling():
        _refuse_more(model, output)
    if type(output) is tuple:
        return (loss, *output[2 if drop and _is_logits(call, *output[1:2]) else 1 :])
    if is_mapping(output):
        output["loss"] = loss
        if drop:
            output.pop("logits", None)
        return output
    if not isinstance(output, Mapping):
        none = None if torch.compiler.is_compiling() else NoLogits()
        changes = {"loss": loss} | ({"logits": none} if drop else {})
        if hasattr(output, "_replace"):
            return output._replace(**{k: v for k, v in changes.items() if k in output._fields})
        return _changed(output, changes)
    made: Any = output
    if torch.compiler.is_compiling():
        fields = dict(made) | {"loss": loss}
        made = type(made)(**fields | ({"logits": None} if drop else {}))
    else:
        if own_loss:
            made["loss"] = loss
            made.move_to_end("loss", last=False)
        if drop:
            made = _drop_logits(made)
    if return_dict is None:
        return_dict = getattr(model.config, "return_dict", True)
    return made if return_dict else made.to_tuple()


def _forget(model: Any) -> list[str]:
    """Remove stand-ins that a model has kept as attributes; return their names."""
    names = [name for name, value in vars(model).items() if type(value) is StandIn]
    for name in names:
        vars(model)[name] = None
    return names


def _refuse_more(model: Any, output: Any) -> None:
    """Refuse a model that keeps, or returns beside loss and logits, something made of the logits."""
    for name in _forget(model):
        raise no_logits(f"its {name} depends on them")
    fields = output_fields(output)
    if isinstance(output, Mapping):  # a ModelOutput may have attributes beside its items
        fields = getattr(output, "__dict__", {}) | fields
    for name, value in fields.items():
        if holds_stand_in(value) and not (name == "logits" and _are_logits(value)):
            raise no_logits(f"its {name} depends on them")


def _are_logits(value: Any) -> bool:
    """Return whether something made of a stand-in may be logits: it has more than one dimension."""
    with torch._C.DisableTorchFunctionSubclass():
        return type(value) is StandIn and value.dim() > 1


def _is_logits(call: LossCall, value: Any = None) -> bool:
    """Return whether `value` stands for the logits; a tuple may have none."""
    if isinstance(value, StandIn):
        return True
    return isinstance(value, torch.Tensor) and value.shape == call.logits.shape


def _changed(output: Any, changes: dict[str, Any]) -> Any:
    """Copy a dataclass with other values in some of its fields."""
    made = copy.copy(output)
    for field in dataclasses.fields(made):
        if field.name in changes:
            object.__setattr__(made, field.name, changes[field.name])  # it may be frozen
    cls: Any = type(made)
    if isinstance(changes.get("logits"), NoLogits) and _looks(cls):
        _refuse_a_look(made, cls)
    return made


def _drop_logits(output: Any) -> Any:
    """Turn an output into one that raises when its logits are used, and says why there are none."""
    cls: Any = type(output)
    output.__class__ = _class_without_logits(cls)
    output._drop_logits()
    if _looks(cls):
        _refuse_a_look(output, cls)
    return output


@functools.cache
def _looks(cls: Any) -> bool:
    """Return whether an output class of the user's may read its logits in `__post_init__`."""
    look = getattr(cls, "__post_init__", None)
    return look is not None and is_of_users(look) and len(inspect.signature(look).parameters) == 1


def _refuse_a_look(output: Any, cls: Any) -> None:
    """Run `__post_init__` again on an output without logits, so that it raises if it reads them.

    The first run saw a stand-in. The second one gets a copy, because it may add to the loss.
    """
    again = copy.copy(output)
    if isinstance(output.loss, torch.Tensor):
        object.__setattr__(again, "loss", output.loss.detach().clone())
    cls.__post_init__(again)


def _rebuilt(cls: Any, items: dict[str, Any], attributes: dict[str, Any]) -> Any:
    """Make an output without logits from what copy or pickle kept of it."""
    made = _class_without_logits(cls)
    output = made.__new__(made)
    for name, value in items.items():
        OrderedDict.__setitem__(output, name, value)
    vars(output).update(attributes)
    return output


@functools.cache
def _class_without_logits(cls: Any) -> Any:
    """Make the subclass of an output class whose `logits` raise.

    A subclass, and not a change of the instance: Accelerate rebuilds outputs from their class.
    """
    required = any(
        field.name == "logits" and field.default is field.default_factory
        for field in dataclasses.fields(cls)
    )

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if required and not args:
            kwargs.setdefault("logits", None)
        cls.__init__(self, *args, **kwargs)

    def post_init(self: Any) -> None:
        if isinstance(vars(self).get("logits"), NoLogits):  # as dataclasses.replace gives it
            drop_logits(self)
            vars(self)["logits"] = None
        cls.__post_init__(self)
        if vars(self).get("logits") is None:
            drop_logits(self)

    def drop_logits(self: Any) -> None:
        # An attribute, not an item: a field of a ModelOutput that is set to None would stay among its items.
        if "logits" in self:
            OrderedDict.__delitem__(self, "logits")
        vars(self)["logits"] = NoLogits()

    def get(self: Any, key: Any, default: Any = None) -> Any:
        return vars(self)["logits"] if key == "logits" else OrderedDict.get(self, key, default)

    def get_item(self: Any, key: Any) -> Any:
        if "logits" not in self and key == "logits":
            raise KeyError(NO_LOGITS)
        if "logits" not in self and isinstance(key, (int, slice)):
            fields = list(self.to_tuple())
            fields.insert("loss" in self, NoLogits())  # keeps later fields at their positions
            return tuple(fields)[key]
        return cls.__getitem__(self, key)

    namespace = {
        "__module__": f"{__name__}.{cls.__module__}",
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__init__": init,
        "__post_init__": post_init,
        "__getitem__": get_item,
        "get": get,
        "_drop_logits": drop_logits,
        "__reduce__": lambda self: (_rebuilt, (cls, dict(self), dict(vars(self)))),
    }
    return type(cls.__name__, (cls,), namespace)
