"""The forward of a patched model with labels: the model's own, whose head computes the loss, and what it returns."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .hollow import is_mapping, output_field, output_fields, withhold_labels
from .loss_call import LossCall, run
from .stand_in import NO_LOGITS, ChangedError, NoLogits, StandIn, holds_stand_in, no_logits


def forward_with_loss(
    model: Any, call: LossCall, forward: Callable[..., Any], given: dict[str, Any]
) -> Any:
    """Run the model's own `forward` as `call`; its output, with the loss, perhaps without logits."""
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
    except ChangedError:
        raise
    except (
        AssertionError,
        AttributeError,
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if call.loss is None or call.keep_logits or out_of_memory:
            raise
        raise RuntimeError(
            f"the forward of the patched {type(model).__name__} failed after its head "
            f"({type(error).__name__}: {error}). In training its logits are a stand-in for one token: if "
            "it needs them all, call it with skip_logits=False"
        ) from error
    finally:
        if not torch.compiler.is_compiling():
            _forget(model)


def _with_loss(model: Any, call: LossCall, output: Any, return_dict: bool | None) -> Any:
    """What a forward returned, with its loss, and with logits only if they are kept."""
    if call.own.own_loss:
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
            return output._replace(**changes)
        return dataclasses.replace(output, **changes)
    # Rebuilt, because setting a field of a ModelOutput to None leaves it among the items.
    fields = dict(output) | {"loss": loss}
    cls = type(output)
    if torch.compiler.is_compiling():
        output = cls(**fields | ({"logits": None} if drop else {}))
    else:
        fields = vars(output) | fields
        output = _without_logits(cls, fields) if drop else _made(cls, fields)
    if return_dict is None:
        return_dict = getattr(model.config, "return_dict", True)
    return output if return_dict else output.to_tuple()


def _forget(model: Any) -> list[str]:
    """Take what is made of the logits off a model that has kept it; the names that it was kept by."""
    names = [name for name, value in vars(model).items() if isinstance(value, StandIn)]
    for name in names:
        vars(model)[name] = None
    return names


def _refuse_more(model: Any, output: Any) -> None:
    """Refuse a model that keeps or returns more than its loss and logits that is made of the logits."""
    for name in _forget(model):
        raise no_logits(f"its {name} depends on them")
    fields = output_fields(output)
    if isinstance(output, Mapping):  # a ModelOutput may have attributes beside its items
        fields = getattr(output, "__dict__", {}) | fields
    for name, value in fields.items():
        is_logits = name == "logits" and isinstance(value, StandIn) and value.dim() > 1
        if holds_stand_in(value) and not is_logits:
            raise no_logits(f"its {name} depends on them")


def _is_logits(call: LossCall, value: Any = None) -> bool:
    """Whether `value` stands for the logits, which a tuple may leave out."""
    if isinstance(value, StandIn):
        return True
    return isinstance(value, torch.Tensor) and value.shape == call.logits.shape


@functools.cache
def _names(cls: Any) -> frozenset[str]:
    """The fields of an output class."""
    return frozenset(field.name for field in dataclasses.fields(cls))


def _made(cls: Any, items: Mapping[str, Any]) -> Any:
    """An output of class `cls`, which may have no field for an item that a forward put into it."""
    names = _names(cls)
    output = cls(**{name: items.get(name) for name in names})
    for name in items.keys() - names:
        output[name] = items[name]
    return output


def _without_logits(cls: Any, items: Mapping[str, Any]) -> Any:
    """An output of class `cls` that says where its logits are asked for that there are none."""
    return _made(_class_without_logits(cls), {k: v for k, v in items.items() if k != "logits"})


@functools.cache
def _class_without_logits(cls: Any) -> Any:
    """A subclass, by the same name: whoever rebuilds an output, as Accelerate does, knows its class only."""

    def post_init(self: Any) -> None:
        if isinstance(vars(self).get("logits"), NoLogits):  # as dataclasses.replace gives it
            OrderedDict.__delitem__(self, "logits")
            vars(self)["logits"] = None
        cls.__post_init__(self)
        if vars(self).get("logits") is None:
            vars(self)["logits"] = NoLogits()  # an attribute, and no item

    def get_item(self: Any, key: Any) -> Any:
        if key == "logits" and key not in self:
            raise KeyError(NO_LOGITS)
        return cls.__getitem__(self, key)

    namespace = {
        "__module__": f"{__name__}.{cls.__module__}",
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__post_init__": post_init,
        "__getitem__": get_item,
        "__reduce__": lambda self: (_without_logits, (cls, vars(self))),
    }
    return type(cls.__name__, (cls,), namespace)
