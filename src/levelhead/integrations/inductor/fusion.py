"""The pass: which losses of a graph can do without logits, and the nodes that then take their place.

It runs on the graph of torch functions that Dynamo has recorded, before autograd. Whatever a model and a training
script do between a linear layer and its loss stands there in the open. `follow.py` says what becomes of
the logits; here it is decided whether anything needs them; `rewrite.py` holds what is put in.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Node

from ...ops import library
from ...ops.checks import is_dtensor
from . import rewrite
from .follow import LOSSES, Uses, uses_of_logits
from .nodes import (
    Layer,
    argument,
    change_between,
    changed_by,
    equal,
    function_name,
    is_transformed,
    linear_layer,
    nodes_in,
    tensor,
)
from .tiles import Reduction, Tile, UnsupportedUseError

_logger = logging.getLogger(__package__)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FuseLinearCrossEntropy(CustomGraphPass):
    """Replaces losses of the logits of a linear layer by the operators; see `inductor_options`."""

    def __init__(self, smoothing: float | None, drop_logits: bool) -> None:
        self._smoothing = smoothing
        self._drop_logits = drop_logits

    def uuid(self) -> tuple[str, float | None, bool]:
        """Everything the result depends on beside the graph: part of the key of Inductor's caches."""
        return _source(), self._smoothing, self._drop_logits

    def __call__(self, graph: Graph) -> None:
        """Rewrite a graph in place, and the graphs within it: those of checkpointed regions, for example."""
        self._rewrite(graph, self._drop_logits)

    def _rewrite(self, graph: Graph, drop_logits: bool) -> None:
        within = graph.owning_module.children() if graph.owning_module is not None else ()
        for child in within:
            if isinstance(child, GraphModule):
                self._rewrite(child.graph, False)  # the graph around it may need its logits
                child.recompile()
        missed = {node for node in graph.nodes if function_name(node) in LOSSES}
        for head, uses in uses_of_logits(graph).items():
            picked = [r for r in uses.reductions if r.statistic == "picked"]
            losses = [r.node for r in uses.reductions if r.statistic == "cross_entropy"] + uses.lost
            missed.difference_update(losses)
            if not losses and not picked:
                continue  # a linear layer like any other
            losses += [r.node for r in picked if r.tile.kind == "log_probs"]
            try:
                self._fuse(graph, head, uses, drop_logits)
            except UnsupportedUseError as reason:
                if losses:  # and not a router's probabilities, say
                    self._decline(losses[0], f"the loss of {_name(head)}", str(reason))
        for node in missed:
            self._decline(node, function_name(node), "the graph has no linear layer of its logits")

    def _decline(self, loss: Node, what: str | None, reason: str) -> None:
        counters["levelhead"]["declined"] += 1
        unsmoothed = "" if self._smoothing is None else ", without smoothing"
        _warn_once(f"levelhead leaves {what}{_where(loss)} as it is{unsmoothed}: {reason}")

    def _fuse(self, graph: Graph, head: Node, uses: Uses, drop_logits: bool) -> None:
        if uses.reasons:
            raise UnsupportedUseError(uses.reasons[0])
        trained = any(r.differentiated for r in uses.reductions)
        if uses.outputs and not trained:
            return  # evaluation that wants the logits: they serve its loss as well
        drop = drop_logits and trained
        for _, tile in uses.outputs if drop else []:
            if not _is_as_returned(tile):
                raise UnsupportedUseError("the graph returns its logits in another form")
        call = _call_of(graph, head, uses.reductions)
        losses = [r for r in uses.reductions if r.statistic == "cross_entropy"]
        if len(uses.reductions) == 1 and losses:
            self._put_loss(call, losses[0])
        else:
            self._put_statistics(call, uses.reductions, set(uses.nodes))
        if drop:
            _drop(call, uses.outputs)
        elif uses.outputs:
            hint = "; inductor_options(drop_logits=True) leaves them out"
            _warn_once(
                f"levelhead computes the logits of {call.name}, which the graph returns, beside its loss"
                + ("" if self._drop_logits else hint)
            )
        if drop or not uses.outputs:
            _ask_hidden_states(call, uses.sizes)
        if self._smoothing is not None and trained and not losses:
            _warn_once(
                "levelhead smooths F.cross_entropy and F.nll_loss; the loss of "
                f"{call.name}{_where(uses.reductions[0].node)} is written otherwise, and computed as written"
            )
        for node in reversed(uses.nodes):
            if not node.users:
                graph.erase_node(node)

    def _put_loss(self, call: _Call, loss: Reduction) -> None:
        """Put the fused loss in place of the only thing that needs the logits."""
        _check_unchanged(call.read, call.head, loss.node, saved=loss.differentiated)
        _check_unchanged([loss.picks], loss.node, loss.node, saved=loss.differentiated)
        options = {**call.options, **self._loss_options(loss)}
        _replace(loss.node, rewrite.linear_cross_entropy, (*call.arguments, loss.picks), options)
        _report("linear_cross_entropy", call, loss.node, options)

    def _put_statistics(
        self, call: _Call, reductions: list[Reduction], made_of_logits: set[Node]
    ) -> None:
        """Put the statistics before all that needs the logits, and make each of those of them."""
        graph, trained = call.graph, any(r.differentiated for r in reductions)
        picking = [r for r in reductions if r.picks is not None]
        first = min((r.node for r in reductions), key=_order(graph).__getitem__)
        place = _outside_inference_mode(first, call.head)
        _check_unchanged(call.read, call.head, place, saved=trained)
        _hoist(graph, [r.picks for r in picking], place, made_of_logits)
        for reduction in picking:
            _check_unchanged([reduction.picks], place, reduction.node, saved=trained)
        with graph.inserting_before(place):
            stats = graph.call_function(
                rewrite.linear_logit_stats,
                (*call.arguments, [r.picks for r in picking]),
                {
                    "picks_per_token": [r.width for r in picking],
                    "from_end": [function_name(r.node) == "getitem" for r in picking],
                    **call.options,
                },
            )
            vocabulary = call.vocabulary()
        column = 0
        for reduction in reductions:
            self._make_of_statistics(stats, reduction, column, vocabulary)
            column += reduction.width
        _report("linear_logit_stats", call, reductions[0].node, call.options)

    def _make_of_statistics(
        self, stats: Node, reduction: Reduction, column: int, vocabulary: int | Node
    ) -> None:
        tile, result = reduction.tile, tensor(reduction.node)
        common = {
            "vocabulary": vocabulary,
            "detached": not tensor(reduction.of).requires_grad,
        }
        if reduction.statistic == "cross_entropy":
            options = {**self._loss_options(reduction), **common, "column": column}
            return _replace(
                reduction.node, rewrite.cross_entropy, (stats, reduction.picks), options
            )
        keeps_dim = result.dim() == tensor(reduction.of).dim()
        sizes = [size if isinstance(size, int) else -1 for size in result.shape]
        options = {
            "kind": tile.kind,
            "name": reduction.statistic,
            "columns": (column, column + reduction.width),
            "factor": tile.factor,
            # With several dynamic sizes tokens have the dimensions that they had in the hidden states.
            "shape": tuple(sizes) if sizes.count(-1) < 2 else None,
            "keepdim": tile.logits.dim if keeps_dim else None,
            "dtype": result.dtype,
        }
        return _replace(reduction.node, rewrite.statistic, (stats,), {**options, **common})

    def _loss_options(self, loss: Reduction) -> dict[str, Any]:
        smoothed = self._smoothing is not None and loss.differentiated
        eps = self._smoothing if smoothed else loss.options["label_smoothing"]
        return {
            **loss.options,
            "label_smoothing": eps,
            "dtype": tensor(loss.node).dtype,
            "detached": not tensor(loss.of).requires_grad,
        }


@dataclass(frozen=True)
class _Call:
    """What every call of an operator on one head has in common."""

    graph: Graph
    head: Node
    layer: Layer
    arguments: tuple[Node, Node, Node | None]
    options: dict[str, Any]  # see rewrite.py
    read: list[Node]  # what a call reads, later than the head did

    @property
    def name(self) -> str:
        return _name(self.head)

    def vocabulary(self) -> int | Node:
        """Return its size, which may be another in another call."""
        size = tensor(self.head).shape[-1]
        if isinstance(size, int):
            return size
        dim = int(self.layer.transposed)
        return self.graph.call_method("size", (self.layer.weight, dim))


def _call_of(graph: Graph, head: Node, reductions: list[Reduction]) -> _Call:
    """Return how to call an operator on a head; all uses of the logits must need the same statistics."""
    layer = linear_layer(head)
    logits = reductions[0].tile.logits
    if layer is None or any(r.tile.logits.source != logits.source for r in reductions):
        raise UnsupportedUseError(
            "its logits are used scaled in several ways, or of several sets of tokens"
        )
    arguments = layer.input, layer.weight, layer.bias or logits.bias
    operands, returned = [tensor(n) for n in arguments if n is not None], tensor(head)
    if any(map(is_transformed, [head, *(r.node for r in reductions)])):
        raise UnsupportedUseError("it is inside a transform of torch.func")
    scale = logits.inner * (logits.outer or 1.0)
    if not 0 < scale < math.inf:
        raise UnsupportedUseError(f"its logits are scaled by {scale}")
    dtypes = {t.dtype for t in operands}
    autocast = dtypes != {returned.dtype}
    if any(is_dtensor(t) for t in operands):
        raise UnsupportedUseError("it is a DTensor; patch_model serves tensor parallelism")
    if not dtypes <= set(_FLOATS) or (autocast and torch.float64 in dtypes):
        raise UnsupportedUseError(f"it multiplies {', '.join(map(str, sorted(dtypes, key=str)))}")
    index = logits.index
    shift = _shift(index[0], operands[0].shape) if len(index) == 1 else None
    options = {
        "transposed": layer.transposed,
        "index": () if shift else index,
        "shift": shift,
        "grad": returned.requires_grad,
        "autocast": returned.dtype if autocast else None,
        "softcap": logits.outer,
        "logit_scale": scale,
    }
    read = [n for n in (*arguments, *nodes_in(index)) if n is not None]
    return _Call(graph, head, layer, arguments, options, read)


def _shift(index: tuple[Any, ...], shape: tuple[Any, ...]) -> str | None:
    """Return whether an index of (..., T, D) leaves out the last or the first of T alone, and which."""
    items, rank = list(index), len(shape)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - len(items) + 1)
    items += [slice(None)] * (rank - len(items))
    if equal(shape[-2:-1], (0,)):
        return None  # there is none to leave out
    if len(items) != rank or any(i != slice(None) for i in (*items[:-2], items[-1])):
        return None
    taken = items[-2]
    if not isinstance(taken, slice) or taken.step not in (None, 1):
        return None
    if taken.start in (None, 0) and taken.stop == -1:
        return "last"
    return "first" if taken.start == 1 and taken.stop is None else None


def _is_as_returned(tile: Tile) -> bool:
    """Return whether a tile is what the head returned, perhaps scaled, capped, or of some tokens only."""
    logits = tile.logits
    last = logits.dim == tensor(logits.head).dim() - 1
    return tile.kind == "logits" and tile.picks is None and not logits.reshaped and last


def _drop(call: _Call, outputs: list[tuple[Node, Tile]]) -> None:
    """Return something without memory in place of the logits."""
    output = next(iter(reversed(call.graph.nodes)))
    for node, tile in outputs:
        logits = tensor(node)
        with call.graph.inserting_before(output):
            options = {
                "vocabulary": call.vocabulary(),
                "dtype": logits.dtype,
                "index": tile.logits.index,
            }
            new = call.graph.call_function(rewrite.stand_in, (call.layer.input,), options)
        output.replace_input_with(node, new)


def _ask_hidden_states(call: _Call, sizes: list[Node]) -> None:
    """Take sizes of the logits from the hidden states, and the vocabulary's from the weight."""
    last = tensor(call.head).dim() - 1

    def ask(node: Node, dim: int) -> None:
        vocabulary = dim % (last + 1) == last
        source = call.layer.weight if vocabulary else call.layer.input
        dim = int(call.layer.transposed) if vocabulary else dim
        _replace(node, "size", (source, dim), {})

    for node in sizes:
        if len(node.args) > 1 and function_name(node) == "size":
            ask(node, argument(node, 1, "dim"))
            continue
        for user in list(node.users):
            ask(user, argument(user, 1, "index"))


def _replace(node: Node, function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Make a node a call of another function or method; it stays the same node, since other heads may know it."""
    node.op = "call_method" if isinstance(function, str) else "call_function"
    node.target, node.args, node.kwargs = function, args, options


def _outside_inference_mode(node: Node, head: Node) -> Node:
    """Return where inference mode was entered after the head, if `node` is within: its tensors know no gradients."""
    place, left = node, 0
    while node is not head:
        node = node.prev
        left += function_name(node) == "_exit_inference_mode"
        if function_name(node) == "_enter_inference_mode":
            place, left = (place, left - 1) if left else (node, 0)
    return place


def _hoist(graph: Graph, picks: list[Any], place: Node, made_of_logits: set[Node]) -> None:
    """Move what picks are computed from before `place`, as far as it stands behind."""
    order = _order(graph)
    behind: set[Node] = set()
    waiting = [node for node in picks if order[node] >= order[place]]
    while waiting:
        node = waiting.pop()
        at_random = re.search("rand|multinomial|bernoulli", function_name(node) or "")
        if node in made_of_logits or changed_by(node) or at_random:
            raise UnsupportedUseError(
                "its targets are computed from its logits, in place or at random"
            )
        value = tensor(node)
        if value is not None and (value.is_floating_point() or is_transformed(node)):
            # Gradients or autocast may be switched on or off in between.
            raise UnsupportedUseError(
                "its targets are computed after its first use, not from ids alone"
            )
        _check_unchanged(node.all_input_nodes, place, node)
        behind.add(node)
        waiting += [n for n in node.all_input_nodes if order[n] >= order[place] and n not in behind]
    for node in sorted(behind, key=order.__getitem__):
        place.prepend(node)


def _check_unchanged(read: list[Any], start: Node, end: Node, *, saved: bool = False) -> None:
    """Refuse to read tensors at `end` that were read at `start` and have been changed in between.

    Nor may they be changed later, where they are saved for the backward pass: what was there saved other tensors.
    """
    if saved:
        end = next(iter(reversed(end.graph.nodes)))
    changed = change_between(read, start, end)
    if changed is not None:
        raise UnsupportedUseError(
            f"a tensor that it is computed from is changed in place{_where(changed)}"
        )


def _order(graph: Graph) -> dict[Node, int]:
    return {node: position for position, node in enumerate(graph.nodes)}


def _name(head: Node) -> str:
    """Return the name of a head's weight, as a module is named where it belongs to one."""
    layer = linear_layer(head)
    weight = str(layer.weight.target) if layer and layer.weight.op == "placeholder" else head.name
    return re.sub(r"^L_.*?_modules_|_parameters_\w+_$", "", weight).replace("_modules_", ".")


def _where(node: Node) -> str:
    """Return where in the source a node was called, as far as that is known."""
    places = re.findall(r'File "(.+)", line (\d+)', node.stack_trace or "")
    return f" at {Path(places[-1][0]).name}:{places[-1][1]}" if places else ""


def _report(operator_name: str, call: _Call, loss: Node, options: dict[str, Any]) -> None:
    counters["levelhead"][operator_name] += 1
    shown = ("label_smoothing", "softcap", "logit_scale")
    chosen = ", ".join(f"{name}={options[name]}" for name in shown if name in options)
    _logger.info("%s%s: %s(%s)", call.name, _where(loss), operator_name, chosen)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@functools.cache
def _source() -> str:
    """Return a digest of this pass and of the operators, whose autograd formulas end up in compiled graphs."""
    digest = hashlib.sha256(library.VERSION.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
