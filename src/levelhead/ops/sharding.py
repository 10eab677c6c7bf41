"""Data parallelism with DTensors: tokens sharded over the ranks, the head the same on all of them.

How the operators are sharded is registered here, when api.py imports this module because it met a DTensor. A rank works
on its own tokens; the loss, a sum, and the gradients of the head are partial sums, added up when somebody
needs the whole. A head that is itself sharded, over the vocabulary, is the business of vocab_parallel.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from .arguments import OF_HEAD, PER_TOKEN, named, position
from .checks import unwrapped

Rule = tuple[list[Placement | None], list[Placement | None]]  # placements of results, of arguments
_OPS = torch.ops.levelhead


def check_layout(tokens: dict[str, Any], head: dict[str, Any]) -> None:
    """Refuse tensors, some of which are DTensors, that are not laid out as this module says.

    Args:
        tokens: by name, what has an entry for each token; a 0-dim tensor is the same for all.
        head: by name, weight and bias.
    """
    named: dict[str, Any] = {
        name: unwrapped(tensor)
        for name, tensor in (tokens | head).items()
        if isinstance(tensor, Tensor)
    }
    plain = [name for name, tensor in named.items() if not isinstance(tensor, DTensor)]
    if plain:
        mixed = [name for name in named if name not in plain]
        layouts = ", ".join(
            f"{name} with placements {tuple(named[name].placements)}" for name in mixed
        )
        raise ValueError(
            f"DTensors and plain tensors do not mix: {layouts}; but plain: {', '.join(plain)}. Distribute these too, "
            f"as in distribute_tensor({plain[0]}, {mixed[0]}.device_mesh, placements), or give plain tensors alone, "
            "as to_local() and full_tensor() make them"
        )
    mesh = named["linear_weight"].device_mesh
    for name, tensor in named.items():
        if tensor.device_mesh != mesh:
            raise ValueError(
                f"{name} is on {tensor.device_mesh} but linear_weight on {mesh}; distribute them over one mesh"
            )
        whole = name in head or tensor.dim() == (1 if name == "input" else 0)
        valid = (Replicate(),) if whole else (Shard(0), Replicate())
        if any(placement not in valid for placement in tensor.placements):
            raise ValueError(
                f"{name} has placements {tuple(tensor.placements)}; valid are "
                f"{' and '.join(map(repr, valid))}, for tokens are shared by the ranks and the head is the same on all "
                f"of them. Use {name}.redistribute(placements=...)"
            )
        ranks = 1
        for dim, placement in enumerate(tensor.placements):
            ranks *= mesh.size(dim) if placement == Shard(0) else 1
        if named["input"].dim() > 2 and tensor.shape[0] % ranks:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} is sharded over its first dimension by {ranks} ranks, which does not "
                "divide it, so its tokens cannot be counted through; pad the batch, or flatten the tokens before "
                "they are distributed"
            )


def _rules(operator: str, results: str, args: tuple[Any, ...]) -> list[Rule]:
    """Return both ways to share an operator's work: each rank has some tokens, or all of them.

    A letter says what a result is: per (t)oken, a (s)um over the tokens, or (n)o tensor worth the name.
    """
    rules: list[Rule] = []
    for place in (
        {"t": Shard(0), "s": Partial(), "n": Replicate()},
        dict.fromkeys("tsn", Replicate()),
    ):
        arguments = dict.fromkeys(PER_TOKEN, place["t"]) | dict.fromkeys(OF_HEAD, Replicate())
        given = named(operator, args)._asdict()
        placements = [
            None if value is None else arguments.get(name) for name, value in given.items()
        ]
        rules.append(([place[kind] for kind in results], placements[: len(args)]))
    return rules


def _gradients(output_mask: list[bool]) -> str:
    return "".join(kind if needed else "n" for kind, needed in zip("tss", output_mask, strict=True))


@register_sharding(  # type: ignore[untyped-decorator]
    _OPS.linear_logit_stats.default
)
def _(*args: Any) -> list[Rule]:
    return _rules("linear_logit_stats", "tttttt", args)


@register_sharding(  # type: ignore[untyped-decorator]
    _OPS.linear_logit_stats_backward.default
)
def _(*args: Any) -> list[Rule]:
    operator = "linear_logit_stats_backward"
    return _rules(operator, _gradients(named(operator, args).output_mask), args)


@register_sharding(  # type: ignore[untyped-decorator]
    _OPS.linear_cross_entropy.default
)
def _(*args: Any) -> list[Rule]:
    operator = "linear_cross_entropy"
    return _rules(operator, "s" + _gradients(named(operator, args).output_mask), args)


# DTensor remembers what becomes of a call by its tensors, and by its arguments from the first integer on: here there is
# none, and a call that asks for other gradients would get the results of the one before. It is told where the mask is.
for _operator in ("linear_logit_stats_backward", "linear_cross_entropy"):
    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[
        getattr(_OPS, _operator).default
    ] = RuntimeSchemaInfo(position(_operator, "output_mask"), needs_pytree=True)
