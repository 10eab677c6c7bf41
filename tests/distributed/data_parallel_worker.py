"""Tokens that are shared by the ranks as DTensors, a scenario a function; float64 unless it says so."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from tests.distributed.dtensors import full, refusals, scenarios, weights
from tests.distributed.launch import TIMEOUT
from tests.distributed.vocab_parallel_worker import LOSSES as OF_VOCAB_PARALLEL
from tests.distributed.vocab_parallel_worker import V, mesh, problem, statistics_problem
from tests.problems import Problem
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)

import levelhead


def rank_ignored() -> Problem:
    """Nothing counts on the first rank, which has five of the nine tokens."""
    whole = problem(label_smoothing=0.1)
    return replace(whole, target=whole.target.index_fill(0, torch.arange(5), -100))


LOSSES: dict[str, Callable[[], Problem]] = {
    **OF_VOCAB_PARALLEL,
    "a rank whose tokens are all ignored": rank_ignored,
    "the same, no reduction": lambda: replace(rank_ignored(), reduction="none"),
}


def of_tokens(tensor: Tensor, over: DeviceMesh, *placements: Placement) -> DTensor:
    found = distribute_tensor(tensor.detach(), over, placements or (Shard(0),))
    return found.requires_grad_(tensor.requires_grad)


def shared(whole: Problem, over: DeviceMesh | None = None, *placements: Placement) -> Problem:
    """The same problem, its tokens sharded over the ranks, its head replicated."""
    over = over or mesh()
    everywhere = [Replicate()] * over.ndim
    tensors = {
        name: None if tensor is None else of_tokens(tensor, over, *place)
        for name, place in {
            "input": placements,
            "target": placements,
            "token_weight": placements,
            "label_smoothing": placements,
            "linear_weight": everywhere,
            "linear_bias": everywhere,
        }.items()
        for tensor in [getattr(whole, name)]
        if not isinstance(tensor, float)
    }
    return replace(whole, **tensors)


def run(part: Problem, loss: Tensor | None = None) -> dict[str, Any]:
    loss = part.fused() if loss is None else loss
    steps = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64).view(loss.shape)
    place = [p if isinstance(p, Shard) else Replicate() for p in loss.placements]
    upstream = distribute_tensor(steps.to(loss.dtype), loss.device_mesh, place)
    found = torch.autograd.grad(loss, part.parameters, upstream)
    return {
        "loss": full(loss.detach()),
        "gradients": [full(g) for g in found],
        "layouts": [str(t.placements) for t in (loss, *found)],
    }


# Layouts.


def replicated() -> dict[str, Any]:
    return run(shared(problem(label_smoothing=0.1), None, Replicate()))


def two_dimensions() -> dict[str, Any]:
    over = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "other"))
    return run(shared(problem(label_smoothing=0.1), over, Shard(0), Replicate()))


def target_elsewhere() -> dict[str, Any]:
    """Targets that are whole on every rank beside sharded hidden states."""
    part = shared(problem(label_smoothing=0.1))
    return run(replace(part, target=part.target.redistribute(placements=[Replicate()])))


def batch(reduction: str) -> Problem:
    """Four sequences of three tokens."""
    whole = problem(n=12, label_smoothing=0.1, reduction=reduction)
    x = whole.input.detach().view(4, 3, 5).requires_grad_()
    return replace(whole, input=x, target=whole.target.view(4, 3))


def the_module() -> dict[str, Any]:
    whole = problem(label_smoothing=0.1)
    module = levelhead.LinearCrossEntropyLoss(
        5, V, bias=True, dtype=torch.float64, label_smoothing=0.1
    )
    with torch.no_grad():
        module.linear.weight.copy_(whole.linear_weight)
        module.linear.bias.copy_(whole.linear_bias)
    part = shared(whole)
    module = distribute_module(module, part.input.device_mesh)
    part = replace(part, linear_weight=module.linear.weight, linear_bias=module.linear.bias)
    return run(part, module(part.input, part.target))


def functional() -> dict[str, Any]:
    """torch.func over DTensors."""
    part = shared(problem(label_smoothing=0.1))

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return levelhead.linear_cross_entropy(
            x, weight, part.target, linear_bias=bias, label_smoothing=0.1
        )

    leaves = [p.detach() for p in part.parameters]
    found, value = torch.func.grad_and_value(loss, (0, 1, 2))(*leaves)
    return {"loss": full(value), "gradients": [full(g) / 2 for g in found]}  # as `run` does


def smoothing_tensor() -> dict[str, Any]:
    part = shared(problem())
    eps = of_tokens(torch.tensor(0.1, dtype=torch.float64), part.input.device_mesh, Replicate())
    with torch.inference_mode():
        loss = full(part.fused(label_smoothing=eps))
    return run(part, part.fused(label_smoothing=eps)) | {"in inference mode": loss}


def narrow(dtype: torch.dtype) -> dict[str, Any]:
    return run(shared(problem(label_smoothing=0.1).to(dtype)))


# Statistics.


def statistics() -> dict[str, Any]:
    whole, picks, upstream = statistics_problem()
    part = shared(whole)
    over = part.input.device_mesh
    stats = levelhead.linear_logit_stats(
        part.input,
        part.linear_weight,
        of_tokens(picks, over),
        linear_bias=part.linear_bias,
        softcap=part.softcap,
        logit_scale=part.logit_scale,
    )
    found = torch.autograd.grad(stats[:4], part.parameters, [of_tokens(g, over) for g in upstream])
    return {
        "statistics": [full(field.detach()) for field in stats],
        "gradients": [full(g) for g in found],
        "layouts": [str(field.placements) for field in stats],
    }


def operator() -> list[str]:
    """How the results of the raw operator are laid out."""
    part = shared(problem())
    token = of_tokens(torch.ones(9).double(), part.input.device_mesh)
    results = torch.ops.levelhead.linear_cross_entropy(
        part.input, part.linear_weight, part.target, None, token, None,
        0.0, None, 1.0, [True, True, False], "chunked",
    )  # fmt: skip
    return [str(result.placements) for result in results]


# Refusals.


def _plain(name: str) -> Callable[[Problem], Problem]:
    return lambda part: replace(part, **{name: full(getattr(part, name)).detach()})


def _laid_out(name: str, *placements: Placement) -> Callable[[Problem], Problem]:
    def change(part: Problem) -> Problem:
        tensor = getattr(part, name).detach()
        return replace(part, **{name: tensor.redistribute(placements=placements)})

    return change


def _partial(part: Problem) -> Problem:
    over = part.input.device_mesh
    return replace(part, input=DTensor.from_local(full(part.input).detach(), over, [Partial()]))


def _other_mesh(part: Problem) -> Problem:
    over = init_device_mesh("cpu", (2, 1))
    return replace(part, target=distribute_tensor(full(part.target), over, [Shard(0), Replicate()]))


def _uneven_batch(part: Problem) -> Problem:
    over = part.input.device_mesh
    x, target = full(part.input).detach().view(3, 3, 5), full(part.target).view(3, 3)
    return replace(
        part, input=of_tokens(x, over), target=of_tokens(target, over), token_weight=None
    )


def _alone(part: Problem) -> Problem:
    """A head that is a DTensor, and nothing else."""
    part = replace(part, token_weight=None)
    for name in ("input", "target"):
        part = _plain(name)(part)
    return part


REFUSALS: dict[str, Callable[[Problem], Problem]] = {
    "plain input": _plain("input"),
    "plain target": _plain("target"),
    "plain weight": _plain("linear_weight"),
    "plain bias": _plain("linear_bias"),
    "plain token weight": _plain("token_weight"),
    "head alone": _alone,
    "plain smoothing": lambda part: replace(part, label_smoothing=torch.tensor(0.1).double()),
    "hidden units sharded": _laid_out("input", Shard(1)),
    "bias sharded": _laid_out("linear_bias", Shard(0)),
    "head sharded over hidden units": _laid_out("linear_weight", Shard(1)),
    "partial input": _partial,
    "another mesh": _other_mesh,
    "uneven batch": _uneven_batch,
}


SCENARIOS: dict[str, Callable[[], Any]] = {
    **{name: lambda make=make: run(shared(make())) for name, make in LOSSES.items()},
    **{
        f"batch, {reduction}": lambda reduction=reduction: run(shared(batch(reduction)))
        for reduction in ("mean", "sum", "none")
    },
    "replicated": replicated,
    "two dimensions": two_dimensions,
    "target elsewhere": target_elsewhere,
    "the module": the_module,
    "smoothing tensor": smoothing_tensor,
    "functional": functional,
    "statistics": statistics,
    "operator": operator,
    **{name: lambda name=name: narrow(getattr(torch, name)) for name in ("float16", "bfloat16")},
    "refusals": lambda: refusals(lambda: shared(problem(token_weight=weights())), REFUSALS),
    **scenarios(problem, shared, lambda tensor: of_tokens(tensor, mesh())),
}


def start() -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
