"""What nodes of a graph hold that was made of logits: a number per token and vocabulary entry, or a reduction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch.fx import Node


class UnsupportedUseError(Exception):
    """The reason why a use of the logits cannot be computed from their statistics."""


@dataclass(frozen=True)
class Logits:
    """Logits in a graph: ``outer * tanh(inner * a)``, or ``inner * a``, of what a linear layer returns.

    Attributes:
        head: the node of the layer.
        dim: the dimension of the vocabulary; the others are those of the tokens, in their order.
        index: positions taken, one after the other, as indices of the hidden states.
        reshaped: whether the tokens have other dimensions than those the layer returned.
        inner: a factor.
        outer: the softcap, None for none.
        bias: a node added to the product, where the layer has no bias itself.
    """

    head: Node
    dim: int
    index: tuple[Any, ...] = ()
    reshaped: bool = False
    inner: float = 1.0
    outer: float | None = None
    bias: Node | None = None

    @property
    def source(self) -> tuple[Any, ...]:
        """What determines the statistics, whatever the layout."""
        return self.head, self.index, self.inner, self.outer, self.bias


Kind = Literal["logits", "log_probs", "probs", "expected_logits", "expected_log_probs"]


@dataclass(frozen=True)
class Tile:
    """A number per token and vocabulary entry, made of the logits.

    Attributes:
        logits: the logits.
        kind: what of them: themselves, their log-softmax or softmax, or logits or log-probabilities times
            the probabilities.
        factor: multiplies that.
        picks: a node of ids, one a token: the entry that counts, all others being 0; None: all count.
    """

    logits: Logits
    kind: Kind = "logits"
    factor: float = 1.0
    picks: Node | None = None


Statistic = Literal["logsumexp", "picked", "mean", "sum", "max", "argmax", "cross_entropy"]


@dataclass(frozen=True)
class Reduction:
    """A node that the statistics of a tile suffice for.

    Attributes:
        node: the node.
        of: the node reduced.
        tile: what that is.
        statistic: which.
        picks: for ``picked`` a node of ids, for ``cross_entropy`` one of targets.
        width: how many ids there are for a token.
        options: for ``cross_entropy``: label_smoothing, ignore_index, reduction.
    """

    node: Node
    of: Node
    tile: Tile
    statistic: Statistic
    picks: Node | None = None
    width: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def differentiated(self) -> bool:
        """Whether it has a gradient; that of a node alone may be one that was added to it in place."""
        before, after = (n.meta["example_value"] for n in (self.of, self.node))
        return bool(before.requires_grad and after.requires_grad)


@dataclass(frozen=True)
class Extremum:
    """The pair that max(dim) returns."""

    of: Node
    tile: Tile


@dataclass(frozen=True)
class Size:
    """A shape, or one size, of logits that still have the layout of the hidden states."""

    tile: Tile


Fact = Tile | Reduction | Extremum | Size
