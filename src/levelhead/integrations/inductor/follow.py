"""What becomes of the logits of a linear layer in a graph of torch functions, node by node.

Nothing is matched as a whole. Each node is described by what it makes of the logits (`steps.py`), one step at a time;
so a loss may be spelled in any way that those steps allow.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Graph, Node

from .nodes import function_name, linear_layer, tensor
from .steps import step
from .tiles import Extremum, Fact, Logits, Reduction, Size, Tile, UnsupportedUseError

LOSSES = ("cross_entropy", "nll_loss")


@dataclass
class Uses:
    """All uses of the logits of one layer."""

    nodes: list[Node] = field(default_factory=list)  # all that follow, in their order
    reductions: list[Reduction] = field(default_factory=list)
    sizes: list[Node] = field(default_factory=list)  # nodes that ask for a shape
    outputs: list[tuple[Node, Tile]] = field(default_factory=list)  # what the graph returns
    reasons: list[str] = field(default_factory=list)  # why the logits are needed after all
    lost: list[Node] = field(
        default_factory=list
    )  # losses of what was made of them, for those reasons


def uses_of_logits(graph: Graph) -> dict[Node, Uses]:
    """Follow what every linear layer of a graph returns."""
    found: dict[Node, Uses] = {}
    facts: dict[Node, Fact] = {}
    lost: dict[Node, Uses] = {}  # what was made of logits in a way not known here
    for node in graph.nodes:
        tiles = {
            n: f.tile if isinstance(f, Extremum) else f
            for n in node.all_input_nodes
            if isinstance(f := facts.get(n), Tile | Extremum)
        }
        uses = [found[tile.logits.head] for tile in tiles.values()]
        if linear_layer(node) is not None:
            for of_head in uses:
                of_head.reasons.append(f"its logits are needed for {function_name(node)}")
            facts[node] = Tile(Logits(node, tensor(node).dim() - 1))
            found[node] = Uses(nodes=[node])
        elif node.op == "output":
            for (source, tile), of_head in zip(tiles.items(), uses, strict=True):
                of_head.outputs.append((source, tile))
        elif uses:
            try:
                facts[node] = fact = step(node, facts)
            except UnsupportedUseError as reason:
                for of_head in uses:
                    of_head.reasons.append(str(reason))
                _lose(node, uses[0], lost)
                continue
            uses[0].nodes.append(node)
            if isinstance(fact, Reduction):
                uses[0].reductions.append(fact)
            elif isinstance(fact, Size):
                uses[0].sizes.append(node)
        elif known := [lost[n] for n in node.all_input_nodes if n in lost]:
            _lose(node, known[0], lost)
    return found


def _lose(node: Node, uses: Uses, lost: dict[Node, Uses]) -> None:
    """Remember what became of logits, until it ends in a loss."""
    if function_name(node) in LOSSES:
        uses.lost.append(node)
    else:
        lost[node] = uses
