"""Find the values that may change the loss of a model later: its numbers, and what a loss of the user's reads.

A patched call sees what the model does with its logits and with the loss that it is handed. It does not run a loss
function of the user's, nor a loss that a model of the user's computes itself. So each call looks at everything that
this code can reach by name: what it closes over, its globals, what it names of the model and its config, the object
that it is a method of, and what these hold.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .heads import original_class, refusal
from .hollow import is_of_users, version

_SIMPLE = frozenset((int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device))
_MANY = 256  # of entries in a container, and of places that a loss reads

_CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque)
_KNOWN = (
    *_CONTAINERS,
    functools.partial,
    types.SimpleNamespace,
    argparse.Namespace,
    collections.UserDict,
    collections.UserList,
    collections.ChainMap,
)
_OF_MODULES = vars(nn.Module()).keys()


def watched(model: Any) -> dict[str, dict[str, Any]]:
    """Return the simple values, lists of them and tensors in a model, in its config, and in the configs within that."""
    found: dict[str, dict[str, Any]] = {}
    places: list[tuple[str, Any]] = [("config.", model.config), ("", model)]
    for place, holder in places:  # grows
        kept = found[place] = {}
        for name, value in vars(holder).items():
            kind = type(value)
            if kind in _SIMPLE:
                kept[name] = value
            elif kind is list or kind is tuple:
                if len(value) <= _MANY and all(type(v) in _SIMPLE for v in value):
                    kept[name] = tuple(value)
            elif isinstance(value, Tensor):
                kept[name] = _state_of(value)
            elif hasattr(value, "to_diff_dict") and name not in ("config", "generation_config"):
                places.append((f"{place}{name}.", value))
        kept.pop("training", None)
    return found


class Seen:
    """The attributes of a model and its configs when `watched` last found them as they were probed.

    Comparing them tells in a few microseconds that nothing has changed. A copy of a model starts without.
    """

    def __init__(self) -> None:
        self._holders: list[tuple[Any, dict[str, Any]]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Seen, ()

    def take(self, model: Any) -> None:
        """Keep what `watched` looks at."""
        self._holders = []
        holders = [(model, _copied(model))]
        for holder, _ in holders:  # grows
            for name, value in vars(holder).items():
                if isinstance(value, Tensor):  # only its version tells that it was changed
                    return
                if name != "generation_config" and hasattr(value, "to_diff_dict"):
                    holders.append((value, _copied(value)))
        self._holders = holders

    def is_same(self, model: Any) -> bool:
        """Return True if nothing has changed since; False if something has, or may have."""
        # A shallow copy of a model shares this with it.
        if not self._holders or self._holders[0][0] is not model:
            return False
        try:
            for holder, kept in self._holders:
                # Not vars(): a config of transformers computes that from its aliases.
                if object.__getattribute__(holder, "__dict__") != kept:
                    self._holders = []
        except Exception:  # objects of the user's, such as arrays, may refuse to be compared
            self._holders = []
        return bool(self._holders)


def _copied(holder: Any) -> dict[str, Any]:
    """Copy the attributes of an object; lists and the like are copied too, since they may change in place."""
    return {k: copy.copy(v) if type(v) in _CONTAINERS else v for k, v in vars(holder).items()}


def reads(model: Any, code: Any) -> dict[str, Any]:
    """Return what code of the user's can read: simple values, and the identity of other objects.

    Args:
        model: a language model, patched or not.
        code: its forward or its loss function, if that is no part of transformers.

    Raises:
        ValueError: it can reach more than can be looked at in each call.
    """
    found: dict[str, Any] = {}
    seen = {id(model), id(model.config)}
    todo: list[tuple[str, Any]] = [("", code)]
    for place, holder in todo:  # grows
        if len(found) > _MANY:
            raise refusal(
                model,
                f"its loss may depend on more than {_MANY} things that may change, such as {place}",
                "Let the code of its loss reach less, or train it without the patch",
            )
        for name, value, fixed in _parts(holder, model):
            where = name if name.startswith("self.") else f"{place}{name}"
            if type(value) in _SIMPLE:
                found[where] = value
            elif isinstance(value, Tensor):
                found[where] = _state_of(value)
            elif hasattr(value, "tobytes") and not isinstance(value, type):  # an array
                found[where] = hash(value.tobytes())
            elif _holds(value):
                if isinstance(value, types.FunctionType) and not fixed:
                    found[where] = id(value)
                if id(value) not in seen:
                    seen.add(id(value))
                    todo.append((f"{where}.", value))
            elif not fixed and not isinstance(value, (types.ModuleType, type, nn.Module)):
                found[where] = id(value)
    return found


def when_compiled(found: dict[str, Any]) -> tuple[list[tuple[bool, str, Any]], str | None]:
    """Return the reads that a compiler can watch, and the place of one that it cannot, or None.

    It can watch numbers of the model and of its config. Each is returned as: whether it is the config's, name, value.
    """
    plain, other = [], None
    for where, value in found.items():
        in_config = where.startswith("self.config.")
        name = where.removeprefix("self.config." if in_config else "self.")
        if name == where or "." in name or type(value) not in _SIMPLE:
            other = where
        else:
            plain.append((in_config, name, value))
    return plain, other


def _state_of(tensor: Tensor) -> tuple[Any, ...]:
    return id(tensor), version(tensor), tensor.requires_grad


def _holds(value: Any) -> bool:
    """Return whether something may hold what a loss reads, and can be looked into."""
    if isinstance(value, types.FunctionType):
        return is_of_users(value) or hasattr(value, "__wrapped__")
    if isinstance(value, types.MethodType):
        return _holds(value.__func__) or _holds(value.__self__)
    if isinstance(value, nn.Module):
        return next(value.parameters(), None) is None
    if isinstance(value, type):
        return is_of_users(value)
    if dataclasses.is_dataclass(value) and hasattr(value, "__dict__"):
        return True
    return isinstance(value, _KNOWN) or hasattr(value, "to_diff_dict") or is_of_users(type(value))


def _parts(holder: Any, model: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yield name and value of what `holder` holds, and whether it is fixed: part of code, not of data."""
    parts: dict[Any, Any] = {}
    if isinstance(holder, types.FunctionType):
        yield from _parts_of_function(holder, model)
        return
    if isinstance(holder, types.MethodType):
        parts = {"__self__": holder.__self__, "__func__": holder.__func__}
    elif isinstance(holder, functools.partial):
        parts = {"func": holder.func, "args": holder.args, "keywords": holder.keywords}
    elif isinstance(holder, _CONTAINERS):
        many = len(holder) > _MANY
        items = holder if isinstance(holder, dict) else dict(enumerate(holder))
        parts = {"len": len(holder)} if many else items
    elif isinstance(holder, nn.Module):
        own = {k: v for k, v in vars(holder).items() if k not in _OF_MODULES}
        parts = own | holder._buffers | holder._modules
    elif not isinstance(holder, type):
        slots = [n for cls in type(holder).__mro__ for n in vars(cls).get("__slots__", ())]
        parts = {n: getattr(holder, n, None) for n in slots} | getattr(holder, "__dict__", {})
    for cls in _users_classes(holder if isinstance(holder, type) else type(holder)):
        for name, value in vars(cls).items():
            # If a class is only named, its numbers count, but not the methods of its instances.
            is_read = not isinstance(holder, type) or type(value) in _SIMPLE
            if is_read and (name == "__call__" or not name.startswith("__")):
                yield name, _function_in(value), True
    # After the class: attributes of the instance replace those of its class.
    yield from ((str(name), value, False) for name, value in parts.items())


def _parts_of_function(function: Any, model: Any) -> Iterator[tuple[str, Any, bool]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__" and cell != types.CellType():  # not an empty cell
            yield name, cell.cell_contents, True
    if not is_of_users(function):  # a decorator of torch or transformers
        return
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    for index, value in enumerate(defaults):
        if type(value) not in _SIMPLE:
            yield f"default {index}", value, False
    names = _names(function.__code__)
    for name in names & function.__globals__.keys():
        yield name, function.__globals__[name], True
    for cls in _users_classes(original_class(model)):
        for name in names & vars(cls).keys():
            yield f"self.{name}", _function_in(vars(cls)[name]), True
    for name in (names & vars(model).keys()) - _OF_MODULES - {"config"}:
        yield f"self.{name}", vars(model)[name], False
    for parts in (model._buffers, model._modules):
        yield from ((f"self.{name}", parts[name], False) for name in names & parts.keys())
    for child in names & model._modules.keys():  # what has parameters is not looked into further
        kept = {} if model._modules[child] is None else vars(model._modules[child])
        yield from (
            (f"self.{child}.{name}", kept[name], True) for name in names & kept.keys() - _OF_MODULES
        )
    for name in names & vars(model.config).keys():
        yield f"self.config.{name}", vars(model.config)[name], False


@functools.lru_cache(maxsize=64)
def _names(code: types.CodeType) -> frozenset[str]:
    """Return all names that code may look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, str):
            names.add(constant)
        elif isinstance(constant, types.CodeType):
            names |= _names(constant)
    return frozenset(names)


@functools.lru_cache(maxsize=64)
def _users_classes(cls: type) -> tuple[type, ...]:
    """Return the user's classes among a class and its bases, base classes first: a subclass overrides them."""
    return tuple(base for base in reversed(cls.__mro__) if is_of_users(base))


def _function_in(member: Any) -> Any:
    """Return the function that a member of a class runs; for a property, its getter."""
    return getattr(member, "fget", None) or getattr(member, "__func__", member)
