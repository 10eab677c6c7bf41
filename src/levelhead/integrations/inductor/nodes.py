"""Reading a graph of torch functions: names in one spelling, arguments, tensors, linear layers, changes in place."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg


def function_name(node: Node) -> str | None:
    """Return the name of the torch function or tensor method that a node calls, in one spelling."""
    if node.op == "call_method":
        name: Any = node.target
    elif node.op != "call_function":
        return None
    elif isinstance(node.target, _OPERATORS):
        return _ATTRIBUTES.get(node.target)
    elif node.target is getattr:
        name = node.args[1]
    else:
        module = getattr(node.target, "__module__", None) or "torch"
        if module.partition(".")[0] not in ("torch", "_operator"):
            return None
        name = getattr(node.target, "__name__", None)
    return _SPELLINGS.get(str(name), str(name))


_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
# Dynamo of torch 2.15 records these attributes of tensors as the operators behind them.
_ATTRIBUTES: dict[Any, str] = {torch.ops.aten.mT: "mT", torch.ops.aten.numpy_T: "T"}
_SPELLINGS = {
    "truediv": "div",
    "divide": "div",
    "true_divide": "div",
    "multiply": "mul",
    "negative": "neg",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "view": "reshape",
}


def tensor(node: Any) -> Any:
    """Return what the compiler knows of a node: a fake tensor; None for what is no tensor."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call, however it was given."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def operand(node: Node) -> Any:
    """Return the first argument."""
    return argument(node, 0, "input")


def equal(a: Any, b: Any) -> bool:
    """Return whether two shapes are known to be the same, without a new guard."""
    return len(a) == len(b) and all(
        statically_known_true(operator.eq(x, y)) for x, y in zip(a, b, strict=True)
    )


@dataclass(frozen=True)
class Layer:
    """The nodes of a linear layer's arguments; a transposed weight is (D, V)."""

    input: Node
    weight: Node
    bias: Node | None
    transposed: bool


def linear_layer(node: Node) -> Layer | None:
    """Return the arguments of a node that multiplies hidden states (..., D) by a matrix."""
    name = function_name(node)
    if name == "linear":
        layer = Layer(operand(node), argument(node, 1, "weight"), argument(node, 2, "bias"), False)
    elif name in ("matmul", "mm"):
        other = argument(node, 1, "other" if name == "matmul" else "mat2")
        layer = Layer(operand(node), other, None, True)
    elif name == "addmm" and len(node.args) == 3 and not node.kwargs:
        layer = Layer(argument(node, 1, "mat1"), argument(node, 2, "mat2"), operand(node), True)
    elif name == "einsum" and len(node.args) == 3:
        transposed = _is_transposed(str(node.args[0]))
        if transposed is None:
            return None
        layer = Layer(argument(node, 1, ""), argument(node, 2, ""), None, transposed)
    else:
        return None
    if any(tensor(n) is None for n in (node, layer.input, layer.weight)):
        return None
    logits, weight = tensor(node).shape, tensor(layer.weight).shape
    vector = layer.bias is None or equal(tensor(layer.bias).shape, logits[-1:])
    matrix = len(weight) == 2 and equal(
        weight[int(not layer.transposed) :][:1], tensor(layer.input).shape[-1:]
    )
    return layer if vector and matrix and logits else None


def _is_transposed(equation: str) -> bool | None:
    """Return whether an einsum of hidden states ...d and a weight dv is a linear layer; None: it is none at all."""
    operands, _, logits = equation.replace(" ", "").partition("->")
    hidden, _, weight = operands.partition(",")
    tokens, d, v = hidden[:-1], hidden[-1:], logits[-1:]
    letters = tokens.replace("...", "") + d + v
    if logits != tokens + v or not letters.isalpha() or len(set(letters)) < len(letters):
        return None
    return {v + d: False, d + v: True}.get(weight)


def changed_by(node: Node) -> list[Node]:
    """Return the tensors that a node writes to; of a graph that it calls, those within."""
    target, first = node.target, argument(node, 0, "input", node.kwargs.get("self"))
    name = str(target if node.op == "call_method" else getattr(target, "__name__", ""))
    changed = nodes_in(node.kwargs.get("out"))
    by_name = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_METHODS
    if by_name or target in _IN_PLACE or _is_in_place(node):
        changed += nodes_in(first)
    elif name.endswith("_mutation") or _has_mutable_schema(target):
        changed += node.all_input_nodes
    for called in node.all_input_nodes:
        if called.op == "get_attr" and node.graph.owning_module is not None:
            within = getattr(node.graph.owning_module, str(called.target), None)
            inner = within.graph.nodes if isinstance(within, GraphModule) else ()
            changed += [n for of_graph in inner for n in changed_by(of_graph)]
    return [n for n in changed if tensor(n) is not None]


def _is_in_place(node: Node) -> bool:
    """Return whether a function that takes an argument inplace was given a true one."""
    position = _position_of_inplace(node.target) if node.op == "call_function" else None
    return position is not None and bool(argument(node, position, "inplace"))


@functools.cache
def _position_of_inplace(target: Any) -> int | None:
    if not inspect.isfunction(target):
        return None
    names = list(inspect.signature(target).parameters)
    return names.index("inplace") if "inplace" in names else None


def _has_mutable_schema(target: Any) -> bool:
    overloads = [target]
    if isinstance(target, torch._ops.OpOverloadPacket):
        names = target.overloads()  # type: ignore[no-untyped-call]
        overloads = [getattr(target, n) for n in names if not n.endswith("out")]
    return any(o._schema.is_mutable for o in overloads if isinstance(o, torch._ops.OpOverload))


_IN_PLACE = (
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
)  # fmt: skip
_IN_PLACE_METHODS = {f"__{f.__name__}__" for f in _IN_PLACE}


def change_between(read: Iterable[Any], start: Node, end: Node) -> Node | None:
    """Return a node between two others that writes to one of these tensors."""
    storages = {storage(node) for node in read if tensor(node) is not None}
    node = start if start is end else start.next
    while node is not end and node.op != "root":
        if any(storage(changed) in storages for changed in changed_by(node)):
            return node
        node = node.next
    return None


def storage(node: Node) -> int:
    """Return what two nodes share whose tensors lie in the same memory."""
    value = tensor(node)
    while is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
    strided = value.layout is torch.strided
    return int(value.untyped_storage()._cdata) if strided else id(value)


def is_transformed(node: Node) -> bool:
    """Return whether a node's tensor belongs to a transform of torch.func."""
    return bool(is_functorch_wrapped_tensor(tensor(node)))


def nodes_in(argument: Any) -> list[Node]:
    """Return the nodes in an argument of a node."""
    found: list[Node] = []
    map_arg(argument, found.append)
    return found
