"""The forward of a patched model with labels: the model's own, whose head computes the loss, and what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from .hollow import is_mapping, output_field, withhold_labels
from .loss_call import ChangedError, LossCall, run


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
        output = run(call, forward, model, **given)
    except ChangedError:
        raise
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if call.loss is None or call.keep_logits or out_of_memory:
            raise
        raise RuntimeError(
            f"the forward of the patched {type(model).__name__} failed after its head "
            f"({type(error).__name__}: {error}). In training its logits are a stand-in for one token: if "
            "it needs them all, call it with skip_logits=False"
        ) from error
    if own_loss:
        loss = call.hand_back(output_field(output, "logits"))
    else:
        loss = output_field(output, "loss")
        if call.returned is None:
            raise RuntimeError(
                f"{type(model).__name__} did not ask loss_function for its loss, so there is none; "
                "use unpatch_model to train this model"
            )
        call.check_returned(loss)
    return _rebuilt(model, call, output, loss, return_dict)


def _rebuilt(model: Any, call: LossCall, output: Any, loss: Any, return_dict: bool | None) -> Any:
    """What a forward returned, with this loss, and with logits only if they are kept."""
    drop = not call.keep_logits
    if type(output) is tuple:
        return (loss, *output[2 if drop else 1 :])
    if is_mapping(output):
        output["loss"] = loss
        if drop:
            output.pop("logits", None)
        return output
    if not isinstance(output, Mapping):
        changes = {"loss": loss} | ({"logits": None} if drop else {})
        if hasattr(output, "_replace"):
            return output._replace(**changes)
        return dataclasses.replace(output, **changes)
    # Rebuilt, because setting a field of a ModelOutput to None leaves it among the items.
    fields = dict(output) | {"loss": loss}
    if drop:
        fields["logits"] = None
    more = {} if torch.compiler.is_compiling() else _beside_fields(output)
    output = type(output)(**{k: v for k, v in fields.items() if k not in more})
    for name, value in more.items():
        output[name] = value
    if return_dict is None:
        return_dict = getattr(model.config, "return_dict", True)
    if not return_dict:
        return output.to_tuple()
    if drop and not torch.compiler.is_compiling():
        vars(output)["logits"] = NoLogits()  # an attribute, and no item
    return output


def _beside_fields(output: Any) -> dict[str, Any]:
    """What a forward put into an output class that has no field for it."""
    names = {field.name for field in dataclasses.fields(output)}
    return {k: v for k, v in (vars(output) | dict(output)).items() if k not in names}


class NoLogits:
    """Stands at `logits` in the output of a call that made none; whatever is done with it says so."""

    def __repr__(self) -> str:
        return "<no logits: call with skip_logits=False to have them>"

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise RuntimeError(
            "a patched model called with labels computes its loss without logits, so its output has "
            "none. Call it with skip_logits=False to have them as well, which takes the memory for "
            "them; for calls in eval mode patch_model has eval_logits=True"
        )

    __getitem__ = __len__ = __iter__ = __array__ = __float__ = __bool__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = (
        _refuse
    )
    __floordiv__ = __mod__ = __pow__ = __neg__ = __abs__ = __int__ = __format__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, *_args: Any, **_kwargs: Any) -> NoReturn:
        cls()._refuse()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy, pickle and their like ask for what it has not
            raise AttributeError(name)
        self._refuse()
