"""Which nodes of a graph reduce a tile over the vocabulary to statistics of the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from .nodes import argument, change_between, equal, function_name, operand, tensor
from .tiles import Extremum, Kind, Reduction, Statistic, Tile, UnsupportedUseError

_TILES: tuple[Kind, ...] = ("logits", "log_probs", "probs")
_SUMS: tuple[Kind, ...] = ("logits", "log_probs", "expected_logits", "expected_log_probs")


def is_pick_of_each(node: Node, index: tuple[Any, ...], source: Any) -> bool:
    """Return whether an index is (arange(N), ids), which takes one entry of each of N tokens."""
    if len(index) != 2 or source.dim() != 2 or not all(tensor(i) is not None for i in index):
        return False
    arange, ids = index
    return (
        function_name(arange) == "arange"
        and len(arange.args) == 1
        and change_between([arange], arange, node) is None
        and tensor(ids).dim() == 1
        and not tensor(ids).is_floating_point()
        and tensor(ids).dtype != torch.bool
        and equal(tensor(arange).shape, source.shape[:1])
        and equal(tensor(ids).shape, source.shape[:1])
    )


def _reduces_to(name: Statistic, *kinds: Kind) -> Callable[[Node, Tile], Reduction | None]:
    def step(node: Node, tile: Tile) -> Reduction | None:
        if tile.kind not in kinds or not is_over_vocabulary(node, tile):
            return None
        if name in ("sum", "mean") and not tensor(node).is_floating_point():
            return None
        if name in ("max", "argmax") and (tile.picks is not None or tile.factor <= 0):
            return None
        if tile.picks is not None:  # all but one entry are zero
            of_one = Reduction(node, operand(node), tile, "picked", tile.picks, 1)
            return of_one if name == "sum" else None
        if (tile.kind == "probs" and name == "sum") or (name == "logsumexp" and tile.factor != 1):
            return None
        if name == "max" and tensor(node).requires_grad:
            raise UnsupportedUseError("its largest logit is differentiated")
        return Reduction(node, operand(node), tile, name)

    return step


def _extremum(node: Node, tile: Tile) -> Extremum | None:
    if tile.picks is not None or tile.factor <= 0 or not is_over_vocabulary(node, tile):
        return None
    return Extremum(operand(node), tile) if tile.kind in ("logits", "log_probs", "probs") else None


def take_extremum(node: Node, pair: Extremum) -> Reduction | None:
    """Return what an item of max(dim) is: the largest number, or where it is."""
    if node.args[1] == 1:
        return Reduction(node, pair.of, pair.tile, "argmax")
    if tensor(node).requires_grad:
        raise UnsupportedUseError("its largest logit is differentiated")
    return Reduction(node, pair.of, pair.tile, "max")


def is_over_vocabulary(node: Node, tile: Tile) -> bool:
    """Return whether a function with an argument dim works over the dimension of the vocabulary."""
    dim = argument(node, 1, "dim", node.kwargs.get("axis"))
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    rank = tensor(operand(node)).dim()
    return isinstance(dim, int) and dim % rank == tile.logits.dim


def _gather(node: Node, tile: Tile) -> Reduction | None:
    if function_name(node) == "gather":
        dim, ids = argument(node, 1, "dim"), argument(node, 2, "index")
    else:
        ids, dim = argument(node, 1, "indices"), argument(node, 2, "dim")
    rank = tensor(operand(node)).dim()
    of_vocabulary = isinstance(dim, int) and dim % rank == tile.logits.dim == rank - 1
    if not of_vocabulary or tensor(ids).dim() != rank or node.kwargs.get("sparse_grad"):
        return None
    return picked(node, tile, ids)


def picked(node: Node, tile: Tile, ids: Node) -> Reduction | None:
    """Return the entries that ids (...) or (..., K) pick, of a tile whose last dimension is the vocabulary's."""
    tokens, shape = tensor(operand(node)).shape[:-1], tensor(ids).shape
    one_row_each = equal(shape[: len(tokens)], tokens)
    width = shape[-1] if len(shape) > len(tokens) else 1
    if not one_row_each or not isinstance(width, int):
        return None
    if tile.kind not in _TILES or tile.picks is not None:
        return None
    return Reduction(node, operand(node), tile, "picked", ids, width)


def _loss(kind: Kind) -> Callable[[Node, Tile], Reduction]:
    def step(node: Node, tile: Tile) -> Reduction:
        name = function_name(node)
        for position, option in ((2, "weight"), (3, "size_average"), (5, "reduce")):
            if argument(node, position, option) is not None:
                raise UnsupportedUseError(f"{name} is given {option}=")
        target = argument(node, 1, "target")
        options = {
            "label_smoothing": argument(node, 7, "label_smoothing", 0.0),
            "ignore_index": argument(node, 4, "ignore_index", -100),
            "reduction": argument(node, 6, "reduction", "mean"),
        }
        if any(isinstance(option, Node) for option in options.values()):
            raise UnsupportedUseError(f"{name} is given options that change from call to call")
        if tensor(target) is None or tensor(target).is_floating_point():
            raise UnsupportedUseError(f"{name} is given probabilities, not ids, as target")
        if (tile.kind, tile.factor, tile.picks) != (kind, 1, None):
            raise UnsupportedUseError(f"{name} is given something else than {kind}")
        if tile.logits.dim != min(tensor(operand(node)).dim() - 1, 1):
            raise UnsupportedUseError(f"{name} takes another dimension for the vocabulary's")
        return Reduction(node, operand(node), tile, "cross_entropy", target, 1, options)

    return step


# By the name of the function or method.
REDUCTIONS: dict[str, Callable[[Node, Tile], Reduction | Extremum | None]] = {
    "logsumexp": _reduces_to("logsumexp", "logits"),
    "mean": _reduces_to("mean", *_SUMS),
    "sum": _reduces_to("sum", *_SUMS, "probs"),
    "amax": _reduces_to("max", *_TILES),
    "argmax": _reduces_to("argmax", *_TILES),
    "max": _extremum,
    "gather": _gather,
    "take_along_dim": _gather,
    "cross_entropy": _loss("logits"),
    "nll_loss": _loss("log_probs"),
}
