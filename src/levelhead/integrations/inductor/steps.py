"""What a node of a graph makes of a tile, one step at a time: another tile, or a reduction of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from .nodes import (
    argument,
    change_between,
    changed_by,
    equal,
    function_name,
    linear_layer,
    operand,
    tensor,
)
from .reductions import REDUCTIONS, is_over_vocabulary, is_pick_of_each, picked, take_extremum
from .tiles import (
    Extremum,
    Fact,
    Kind,
    Logits,
    Reduction,
    Size,
    Tile,
    UnsupportedUseError,
)


def step(node: Node, facts: dict[Node, Fact]) -> Fact:
    """Return what a node makes of tiles.

    Args:
        node: a node with a tile, or a pair of extrema, among its arguments.
        facts: what is known of the nodes before.

    Raises:
        UnsupportedUseError: the node needs the numbers themselves.
    """
    name, first = function_name(node), operand(node)
    fact = facts.get(first) if isinstance(first, Node) else None
    others = [facts.get(n) for n in node.all_input_nodes if n is not first]
    result: Fact | None = None
    changed = changed_by(node)  # by out=, for example
    if changed:
        pass
    elif name in _OF_TWO:
        result = _OF_TWO[name](node, facts)
    elif any(isinstance(other, Tile | Extremum) for other in others):
        pass
    elif isinstance(fact, Extremum) and name == "getitem":
        result = take_extremum(node, fact)
    elif isinstance(fact, Tile) and name in _OF_ONE:
        result = _OF_ONE[name](node, fact)
    if result is None:
        raise UnsupportedUseError(
            f"its logits are changed in place by {name}"
            if any(n in facts for n in changed)
            else f"its logits are needed for {name or node.target}"
        )
    return result


def _same(node: Node, tile: Tile) -> Tile:
    """Another dtype or memory layout: statistics are computed in float32 whatever the logits' dtype."""
    after, before = tensor(node), tensor(tile.logits.head)
    wider = after.dtype == torch.float64 and before.dtype != torch.float64
    if not after.is_floating_point() or wider or after.device != before.device:
        raise UnsupportedUseError(f"its logits are cast to {after.dtype} on {after.device}")
    return tile


def _reshape(node: Node, tile: Tile) -> Tile | None:
    """A view whose last dimension is still the vocabulary's: its entries stay together, in their order."""
    before, after = tensor(operand(node)).shape, tensor(node).shape
    if tensor(node).dtype != tensor(operand(node)).dtype:
        return None
    if tile.logits.dim != len(before) - 1 or not after or not equal(before[-1:], after[-1:]):
        return None
    if sum(not isinstance(size, int) for size in after[:-1]) > 1:
        raise UnsupportedUseError("its logits are given a shape with several dynamic sizes")
    return replace(tile, logits=replace(tile.logits, dim=len(after) - 1, reshaped=True))


def _permute(node: Node, tile: Tile) -> Tile | None:
    """A permutation that moves the vocabulary's dimension only: tokens keep their order."""
    rank = tensor(node).dim()
    order = list(range(rank))
    name = function_name(node)
    if name == "permute":
        given = node.args[1:] if len(node.args) > 2 else argument(node, 1, "dims")
        order = [dim % rank for dim in (given if isinstance(given, tuple | list) else [given])]
    else:
        swapped = name == "transpose"  # mT and t take no dimensions
        a = argument(node, 1, "dim0", node.kwargs.get("axis0")) if swapped else -1
        b = argument(node, 2, "dim1", node.kwargs.get("axis1")) if swapped else -2
        order[a], order[b] = order[b], order[a]
    tokens = [dim for dim in order if dim != tile.logits.dim]
    if tokens != sorted(tokens):
        return None
    return replace(tile, logits=replace(tile.logits, dim=order.index(tile.logits.dim)))


def _getitem(node: Node, tile: Tile) -> Tile | Reduction | None:
    """Some of the tokens, or one entry of each."""
    source, index = tensor(operand(node)), argument(node, 1, "index")
    rank = source.dim()
    index = index if isinstance(index, tuple) else (index,)
    if is_pick_of_each(node, index, source) and tile.logits.dim == 1:
        return picked(node, tile, index[1])
    if tile.logits.dim != rank - 1 or tile.logits.reshaped or tile.picks is not None:
        return None
    consumed = sum(_dimensions(item) for item in index)
    last_is_given = consumed == rank or (Ellipsis in index and index[-1] is not Ellipsis)
    if last_is_given and index[-1] != slice(None):
        return None
    logits = replace(tile.logits, dim=tensor(node).dim() - 1, index=(*tile.logits.index, index))
    return replace(tile, logits=logits)


def _dimensions(item: Any) -> int:
    """Return how many dimensions an item of an index consumes."""
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, Node) and tensor(item) is not None and tensor(item).dtype == torch.bool:
        return int(tensor(item).dim())
    return 1


def _tanh(_: Node, tile: Tile) -> Tile | None:
    if (tile.kind, tile.factor, tile.picks, tile.logits.outer) != ("logits", 1, None, None):
        return None
    return replace(tile, logits=replace(tile.logits, outer=1.0))


def _times(tile: Tile, factor: Any) -> Tile | None:
    """Multiply by a number; a positive factor of logits becomes part of them."""
    if not isinstance(factor, int | float) or factor == 0:
        return None
    factor = tile.factor * factor
    logits = tile.logits
    if tile.kind != "logits" or factor < 0 or tile.picks is not None:
        return replace(tile, factor=factor)
    if logits.outer is None:
        logits = replace(logits, inner=logits.inner * factor)
    else:
        logits = replace(logits, outer=logits.outer * factor)
    return replace(tile, logits=logits, factor=1.0)


def _neg(_: Node, tile: Tile) -> Tile | None:
    return _times(tile, -1)


def _div(node: Node, facts: dict[Node, Fact]) -> Tile | None:
    tile, divisor = facts.get(operand(node)), argument(node, 1, "other")
    if not isinstance(tile, Tile) or not isinstance(divisor, int | float) or divisor == 0:
        return None
    return None if node.kwargs.get("rounding_mode") else _times(tile, 1 / divisor)


def _mul(node: Node, facts: dict[Node, Fact]) -> Tile | None:
    a, b = operand(node), argument(node, 1, "other")
    for this, other in ((a, b), (b, a)):
        tile = facts.get(this) if isinstance(this, Node) else None
        if not isinstance(tile, Tile):
            continue
        if tensor(other) is None:
            return _times(tile, other)
        ids = _one_hot_ids(other, tile, node)
        if ids is not None:
            return replace(tile, picks=ids)
        probs = facts.get(other)
        same_gradient = tensor(this).requires_grad == tensor(other).requires_grad
        if isinstance(probs, Tile) and same_gradient and (found := _expected(probs, tile)):
            return found
    return None


def _expected(probs: Tile, tile: Tile) -> Tile | None:
    if (
        probs.kind != "probs"
        or tile.kind not in ("logits", "log_probs")
        or probs.logits != tile.logits
        or probs.picks is not None
        or tile.picks is not None
    ):
        return None
    kind: Kind = "expected_logits" if tile.kind == "logits" else "expected_log_probs"
    return replace(tile, kind=kind, factor=tile.factor * probs.factor)


def _one_hot_ids(node: Any, tile: Tile, user: Node) -> Node | None:
    """Return the ids (...) of a one-hot tensor beside a tile, None for any other tensor."""
    read = [node]
    while isinstance(node, Node) and function_name(node) in ("float", "to", "type_as", "type"):
        node = operand(node)
        read.append(node)
    if not isinstance(node, Node) or function_name(node) != "one_hot" or tile.picks is not None:
        return None
    last = tile.logits.dim == tensor(node).dim() - 1
    ids: Node = argument(node, 0, "input", argument(node, 0, "tensor"))
    if not last or not equal(tensor(node).shape[-1:], _vocabulary(tile)):
        return None
    return ids if change_between([ids, *read], node, user) is None else None


def _add(node: Node, facts: dict[Node, Fact]) -> Tile | None:
    """Add a bias to a product that has none."""
    a, b = operand(node), argument(node, 1, "other")
    for product, bias in ((a, b), (b, a)):
        tile = facts.get(product) if isinstance(product, Node) else None
        if not isinstance(tile, Tile) or tensor(bias) is None or bias in facts:
            continue
        layer, head = linear_layer(tile.logits.head), tensor(tile.logits.head)
        unchanged = tile == Tile(Logits(tile.logits.head, head.dim() - 1))
        trained = tensor(product).requires_grad == head.requires_grad >= tensor(bias).requires_grad
        fits = equal(tensor(bias).shape, _vocabulary(tile)) and node.kwargs.get("alpha", 1) == 1
        if unchanged and trained and fits and layer is not None and layer.bias is None:
            return replace(tile, logits=replace(tile.logits, bias=bias))
    return None


def _sub(node: Node, facts: dict[Node, Fact]) -> Tile | None:
    """Subtract their logsumexp from logits."""
    logits, logsumexp = operand(node), argument(node, 1, "other")
    if tensor(logits) is None or tensor(logsumexp) is None:
        return None
    tile, other = facts.get(logits), facts.get(logsumexp)
    if (
        not isinstance(tile, Tile)
        or (tile.kind, tile.factor) != ("logits", 1)
        or not isinstance(other, Reduction)
        or (other.statistic, other.tile) != ("logsumexp", tile)
        or tensor(logsumexp).dim() != tensor(logits).dim()
        or tensor(logsumexp).requires_grad != tensor(logits).requires_grad
        or node.kwargs.get("alpha", 1) != 1
        or change_between([logsumexp], logsumexp, node) is not None
    ):
        return None
    return replace(tile, kind="log_probs")


def _becomes(kind: Kind, *, of: Kind, over_dim: bool) -> Callable[[Node, Tile], Tile | None]:
    def step(node: Node, tile: Tile) -> Tile | None:
        if (tile.kind, tile.factor, tile.picks) != (of, 1, None):
            return None
        if over_dim and not is_over_vocabulary(node, tile):
            return None
        return replace(_same(node, tile), kind=kind)

    return step


def _size(node: Node, tile: Tile) -> Size | None:
    logits, head = tile.logits, tensor(tile.logits.head)
    layout = (logits.dim, logits.index, logits.reshaped) == (head.dim() - 1, (), False)
    one = len(node.args) > 1 and function_name(node) == "size"
    return Size(tile) if layout and (one or _only_items(node)) else None


def _only_items(node: Node) -> bool:
    return all(
        function_name(user) == "getitem" and isinstance(user.args[1], int) for user in node.users
    )


def _vocabulary(tile: Tile) -> tuple[Any, ...]:
    return tuple(tensor(tile.logits.head).shape[-1:])


_OF_ONE: dict[str, Callable[[Node, Tile], Fact | None]] = {
    **dict.fromkeys(
        (
            "float",
            "double",
            "half",
            "bfloat16",
            "to",
            "type",
            "type_as",
            "contiguous",
            "clone",
            "detach",
        ),
        _same,
    ),
    **dict.fromkeys(("reshape", "flatten", "unsqueeze", "squeeze"), _reshape),
    **dict.fromkeys(("transpose", "permute", "mT", "t"), _permute),
    "getitem": _getitem,
    "tanh": _tanh,
    "neg": _neg,
    "log_softmax": _becomes("log_probs", of="logits", over_dim=True),
    "softmax": _becomes("probs", of="logits", over_dim=True),
    "log": _becomes("log_probs", of="probs", over_dim=False),
    "exp": _becomes("probs", of="log_probs", over_dim=False),
    **REDUCTIONS,
    "size": _size,
    "shape": _size,
}
_OF_TWO: dict[str, Callable[[Node, dict[Node, Fact]], Tile | None]] = {
    "mul": _mul,
    "div": _div,
    "add": _add,
    "sub": _sub,
}
