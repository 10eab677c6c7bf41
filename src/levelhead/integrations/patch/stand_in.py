"""What takes the place of the logits in a call of a patched model that makes none.

Within the forward it is a `StandIn`, the logits of one token. Whatever is computed from it is a `StandIn` too, so a
term of the loss, a metric or a penalty that depends on the logits is recognised. In the output it is `NoLogits`.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


class ChangedError(RuntimeError):
    """Something between the labels or the head and the loss is not what the probe found."""


def no_logits(what: str) -> ChangedError:
    """Return the error for a model that computes more from its logits than its loss; `what` says what."""
    return ChangedError(
        f"the model makes more of its logits than its loss: {what}, and in this call there are none. "
        "Leave that out, call the model with skip_logits=False, or use unpatch_model"
    )


# Functions that give the numbers of a tensor to Python.
_READS = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__array__", "__dlpack__"}
_READS |= {"__bool__", "__int__", "__index__", "__float__", "__complex__", "__contains__"}
_READS |= {"__format__"}

# Functions that move tokens, which a stand-in of one token would not show.
_MOVES = {
    "roll",
    "flip",
    "flipud",
    "sort",
    "argsort",
    "diff",
    "cumsum",
    "cumprod",
    "cummax",
    "cummin",
}
_MOVES |= {"logcumsumexp"}


class StandIn(Tensor):
    """The logits of one token in place of those of all; see the top of this file."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func` and make its result a stand-in, unless `func` takes only a shape, a dtype or a device."""
        name = getattr(func, "__name__", "")
        ours = bool(args) and isinstance(args[0], StandIn)
        if name == "__repr__":
            return repr(NoLogits())
        if name in _READS:
            raise no_logits(f"it, or a hook in it, reads them ({name})")
        if name in _MOVES:
            raise no_logits(f"it acts on some tokens apart from the others ({name})")
        if name == "__iter__":
            return iter(args[0].unbind(0))
        if name == "__setitem__" and ours:
            args[0][args[1]]  # refuses an empty part
        writes = name.endswith("_") and not name.endswith("__")
        if (writes or name in ("__setitem__", "__set__") or "out" in (kwargs or ())) and not ours:
            raise no_logits(f"it writes what it makes of them into something else ({name})")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs or {})
        if name.startswith("new_") or name.endswith("_like"):
            return result
        if not ours and (name == "to" or name.endswith("_as")):
            return result
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if type(tensor) is Tensor:
                if tensor.numel() == 0:
                    raise no_logits(f"it acts on some tokens apart from the others ({name})")
                tensor.__class__ = StandIn
        return result


def mark(tensor: Tensor) -> Tensor:
    """Turn `tensor` itself into a stand-in, except in compiled code.

    A compiler follows such a class within a graph, but not from one graph to the next.
    """
    if type(tensor) is Tensor and not is_compiled():
        tensor.__class__ = StandIn
    return tensor


def is_compiled() -> bool:
    """Return whether this code is compiled, or runs at a graph break of compiled code."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def holds_stand_in(value: Any) -> bool:
    """Return whether `value`, or something in it if it is a container, is a stand-in."""
    if value is None or isinstance(value, Tensor):
        return type(value) is StandIn
    if isinstance(value, dict):
        value = tuple(value.values())
    return isinstance(value, (tuple, list)) and any(map(holds_stand_in, value))


NO_LOGITS = (
    "a patched model called with labels computes its loss without logits, so its output has none. Call "
    "it with skip_logits=False to have them as well, which takes the memory for them; for calls in eval "
    "mode patch_model has eval_logits=True"
)


class NoLogits:
    """The `logits` of an output that has none; every use of it raises and says why."""

    def __repr__(self) -> str:
        return "<no logits: call with skip_logits=False to have them>"

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise RuntimeError(NO_LOGITS)

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
        if name.startswith("__"):  # copy, pickle and the like look for optional methods
            raise AttributeError(name)
        self._refuse()
