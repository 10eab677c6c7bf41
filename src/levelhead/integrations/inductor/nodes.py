"""Reading a graph of torch functions: names in one spelling, arguments, tensors, linear layers, changes in place."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true


def function_name(node: Node) -> str | None:
    """Return the name of the torch function or tensor method that a node calls, in one spelling."""
    if node.op == "call_method":
        name: Any = node.target
    elif node.op != "call_function" or isinstance(node.target, _OPERATORS):
        return None
    elif node.target is getattr:
        name = node.args[1]
    else:
        module = getattr(node.target, "__module__", None) or "torch"
        if module.partition(".")[0] not in ("torch", "_operator"):
            return None
        name = getattr(node.target, "__name__", None)
    return _SPELLINGS.get(str(name), str(name))


_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
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
    vector = layer.bias is None or tensor(layer.bias).dim() == 1
    return layer if vector and tensor(layer.weight).dim() == 2 and tensor(node).dim() else None


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
    """Return the tensors that a node writes to."""
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    changed: list[Any] = [node.kwargs["out"]] if "out" in node.kwargs else []
    schema = getattr(node.target, "_schema", None)
    in_place = (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace", False)
    if in_place or node.target in _IN_PLACE:
        changed += list(node.args[:1])
    if schema is not None and schema.is_mutable:
        changed += node.all_input_nodes
    return [n for n in changed if tensor(n) is not None]


_IN_PLACE = (
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
)  # fmt: skip


def storage(node: Node) -> int:
    """Return what two nodes share whose tensors lie in the same memory."""
    return int(tensor(node).untyped_storage()._cdata)
