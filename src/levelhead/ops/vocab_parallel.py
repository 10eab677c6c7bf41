"""A head sharded over the vocabulary: each rank of a tensor-parallel group holds some of its rows.

A rank computes the statistics of its own rows. A few numbers a token are gathered, and every rank merges them in the
same order into the same bits; weights and logits stay where they are. Backward, each rank has what its rows add to the
gradient of the input, which is summed over the group: the input is replicated, and so is its gradient.

This module loads torch.distributed.tensor; api.py imports it when it meets a DTensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from . import library
from .checks import has_tangent
from .statistics import LogitStats, empty_set, merge, statistics_dtype


def linear_logit_stats(
    input: Tensor,  # (N, D), the same on every rank
    linear_weight: DTensor,  # (V, D), sharded over V
    picks: Tensor,  # (N, K), the same on every rank
    linear_bias: Tensor | None,  # (V,), sharded as linear_weight
    softcap: float | None,
    logit_scale: float,
    impl: str | None,
    variables: Tensor | None,  # (2,), in place of softcap and logit_scale
) -> LogitStats:
    """Return the statistics of the logits as plain tensors (N,) and (N, K), the same on every rank.

    Gradients of weight and bias are DTensors of their placements; that of ``input`` is the whole one on every rank.

    Raises:
        ValueError: placements other than these; targets that differ between the ranks (eager CPU; elsewhere the
            statistics become NaN).
    """
    mesh, placements, dim = linear_weight.device_mesh, linear_weight.placements, _dim(linear_weight)
    if linear_bias is not None and not _laid_out(linear_bias, linear_weight, placements):
        raise ValueError(
            f"linear_bias must be a DTensor on the mesh of linear_weight with its placements {tuple(placements)}, got "
            f"{_layout(linear_bias)}; use distribute_tensor(linear_bias, linear_weight.device_mesh, "
            "linear_weight.placements)"
        )
    everywhere = [Replicate()] * mesh.ndim
    if isinstance(input, DTensor) and not _laid_out(input, linear_weight, everywhere):
        raise ValueError(
            "input must be a plain tensor that is the same on every rank, or a DTensor on the mesh of linear_weight "
            f"that is Replicate() everywhere, got {_layout(input)}; use input.redistribute(placements=[Replicate()])"
        )
    return vocab_parallel_logit_stats(
        input.to_local() if isinstance(input, DTensor) else input,
        linear_weight.to_local(),
        picks,
        linear_bias.to_local() if isinstance(linear_bias, DTensor) else None,
        softcap,
        logit_scale,
        impl,
        rows_of_shards(linear_weight.shape[0], mesh.size(dim)),
        mesh.get_group(dim),
        variables,
    )


def check_tokens(linear_weight: DTensor, tokens: dict[str, Any]) -> None:
    """Refuse, beside a head sharded over the vocabulary, DTensors that have an entry for each token; by name."""
    _dim(linear_weight)
    for name, tensor in tokens.items():
        if isinstance(tensor, DTensor):
            raise ValueError(
                f"{name} must be a plain tensor, the same on every rank, beside a linear_weight that is sharded, got "
                f"{_layout(tensor)}; use {name}.full_tensor()"
            )


def rows_of_shards(vocabulary: int, ranks: int) -> list[int]:
    """Return how many rows each rank has of a head that DTensor has sharded; the last ones may have none."""
    most = -(-vocabulary // ranks)
    return [min(most, max(vocabulary - rank * most, 0)) for rank in range(ranks)]


def vocab_parallel_logit_stats(
    input: Tensor,  # (N, D), the same on every rank
    linear_weight: Tensor,  # (V_r, D), this rank's rows, maybe none
    picks: Tensor,  # (N, K), ids of the whole vocabulary, the same on every rank
    linear_bias: Tensor | None,  # (V_r,)
    softcap: float | None,
    logit_scale: float,
    impl: str | None,
    sizes: Sequence[int],  # V_r of every rank, in the order of their rows
    group: dist.ProcessGroup,
    variables: Tensor | None = None,  # (2,), in place of softcap and logit_scale
) -> LogitStats:
    """Return the statistics over the rows of all ranks, the same bits on every rank.

    Every rank of ``group`` must call this, and differentiate it, with the same options, ``requires_grad`` and
    upstream gradients.

    Raises:
        ValueError: ``linear_weight`` has not the rows that ``sizes`` says; ``picks`` differ between the ranks (eager
            CPU; elsewhere the statistics become NaN).
    """
    rank = dist.get_rank(group)
    if len(linear_weight) != sizes[rank]:
        raise ValueError(
            f"rank {rank} holds {len(linear_weight)} rows of linear_weight, but must hold {sizes[rank]} of "
            f"{sum(sizes)} shared by {len(sizes)} ranks; shard it with torch.distributed.tensor.distribute_tensor"
        )
    if has_tangent(input):  # not the function's own jvp, with which the compiler would not trace it
        library.refuse_forward_mode(None)
    stats: tuple[Tensor, ...] = _VocabParallelLogitStats.apply(  # type: ignore[no-untyped-call]
        input, linear_weight, picks, linear_bias, softcap, logit_scale, impl, tuple(sizes), group,
        variables,
    )  # fmt: skip
    return LogitStats(*stats)


class _VocabParallelLogitStats(torch.autograd.Function):
    """The general pair of library.py, with a gather after the forward and a sum after the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        picks: Tensor,
        linear_bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        impl: str | None,
        sizes: tuple[int, ...],
        group: dist.ProcessGroup,
        variables: Tensor | None,
    ) -> LogitStats:
        first = sum(sizes[: dist.get_rank(group)])
        head = input, linear_weight, picks - first, linear_bias
        if len(linear_weight):
            own = LogitStats(
                *library.linear_logit_stats(*head, softcap, logit_scale, impl, variables)
            )
            own = own._replace(argmax=own.argmax + first)
        else:
            own = empty_set(picks, statistics_dtype(input.dtype))
        stats = _merged(own, picks, sizes, group)
        saved = stats.relative_logsumexp, stats.relative_expected, stats.max, variables
        ctx.save_for_backward(*head, *saved)
        ctx.share, ctx.group = len(linear_weight) / sum(sizes), group
        ctx.softcap, ctx.logit_scale, ctx.impl = softcap, logit_scale, impl
        ctx.mark_non_differentiable(stats.max, stats.argmax)
        ctx.set_materialize_grads(False)
        return stats

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        logsumexp, picked, mean, expected, _, _ = grad_outputs
        # Read once: a checkpoint hands them out once in a backward.
        *saved, variables = ctx.saved_tensors
        input, linear_weight, _, linear_bias, *_ = saved
        mask = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        if len(linear_weight):
            # The operator divides by its own rows what is due to an entry of the whole vocabulary.
            mean = None if mean is None else mean * ctx.share
            dx, dw, db = library.linear_logit_stats_backward(
                logsumexp, picked, mean, expected, *saved,
                ctx.softcap, ctx.logit_scale, mask, ctx.impl, variables,
            )  # fmt: skip
        else:
            own = (input, linear_weight, linear_bias)
            dx, dw, db = (None if t is None else torch.zeros_like(t) for t in own)
        if mask[0]:
            dist.all_reduce(dx.detach(), group=ctx.group)  # dx itself refuses a double backward
        dx, dw, db = (g if needed else None for g, needed in zip((dx, dw, db), mask, strict=True))
        return dx, dw, None, db, *(None,) * 6


def _dim(linear_weight: DTensor) -> int:
    """Return the mesh dimension over which the vocabulary is sharded; refuse other layouts."""
    placements = linear_weight.placements
    sharded = [dim for dim, placement in enumerate(placements) if placement == Shard(0)]
    if len(sharded) != 1 or any(p not in (Shard(0), Replicate()) for p in placements):
        raise ValueError(
            "linear_weight is a DTensor with placements "
            f"{tuple(placements)}; a head is parallel over its vocabulary, with one Shard(dim=0) and Replicate() "
            "on every other mesh dimension. Lay it out so with linear_weight.redistribute(placements=[Shard(0)]) or "
            "ColwiseParallel, or gather it with linear_weight.full_tensor()"
        )
    return sharded[0]


def _merged(
    own: LogitStats, picks: Tensor, sizes: tuple[int, ...], group: dist.ProcessGroup
) -> LogitStats:
    """Return the statistics of all ranks' rows; ``own`` are those of this rank, its ``argmax`` a global id."""
    numbers = torch.stack(
        [own.relative_logsumexp, own.relative_mean, own.relative_expected, own.max], 1
    )  # (N, 4)
    numbers = _gathered(torch.cat([numbers, own.picked], 1), group)  # (R, N, 4 + K)
    ids = _gathered(torch.cat([own.argmax[:, None], picks], 1), group)  # (R, N, 1 + K)
    logsumexp, mean, expected, largest = numbers[..., :4].unbind(2)
    fields = (logsumexp, numbers[..., 4:], mean, expected, largest, ids[..., 0])
    parts = [LogitStats(*part) for part in zip(*(field.unbind() for field in fields), strict=True)]
    size, stats = sizes[0], parts[0]
    for part, part_size in zip(parts[1:], sizes[1:], strict=True):
        stats = merge(stats, size, part, part_size)
        size += part_size
    same = (ids[..., 1:] == picks).all()
    if picks.is_cpu and not torch.compiler.is_compiling() and not same:
        raise ValueError(
            "the ranks that share the rows of linear_weight were given different targets (or picks); the ranks of a "
            "tensor-parallel group must work on the same batch. Give each data-parallel group, not each rank, a batch "
            "of its own. If the weight is sharded by FSDP, use it inside the forward of its unit"
        )
    return stats._replace(relative_logsumexp=stats.relative_logsumexp.where(same, torch.nan))


def _laid_out(tensor: Tensor, like: DTensor, placements: Sequence[Placement]) -> bool:
    """Return whether a tensor is a DTensor on the mesh of ``like`` with these placements."""
    return (
        isinstance(tensor, DTensor)
        and tensor.device_mesh == like.device_mesh
        and tuple(tensor.placements) == tuple(placements)
    )


def _layout(tensor: Tensor) -> str:
    if isinstance(tensor, DTensor):
        return f"one on {tensor.device_mesh} with placements {tuple(tensor.placements)}"
    return "a plain tensor"


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the tensors (N, M) of all ranks, (R, N, M), in the order of the ranks."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.stack(parts)
