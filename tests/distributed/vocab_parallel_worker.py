"""A head whose rows are shared by the ranks, a scenario a function; float64 unless it says so."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from tests.distributed.dtensors import full, refusals, scenarios, weights
from tests.distributed.launch import TIMEOUT
from tests.problems import Problem, gradients
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import levelhead
from levelhead.ops import chunked
from levelhead.ops.sizes import changed
from levelhead.ops.vocab_parallel import vocab_parallel_logit_stats

V = 67  # on two ranks 34 + 33, on four 17 + 17 + 17 + 16


def problem(n: int = 9, d: int = 5, v: int = V, *, bias: bool = True, **options: Any) -> Problem:
    """One whose targets lie in every shard, the first entry and the last among them; two are ignored."""
    random = torch.Generator().manual_seed(n * v)

    def normal(*shape: int) -> Tensor:
        return (1.5 * torch.randn(*shape, generator=random, dtype=torch.float64)).requires_grad_()

    target = torch.linspace(0, v - 1, n).long()
    if n > 4:
        target[[1, 3]] = options.get("ignore_index", -100)
    head = normal(n, d), normal(v, d)
    return Problem(*head, target, linear_bias=normal(v) if bias else None, **options)


def ignored_nan() -> Problem:
    smoothing = torch.full((9,), 0.1, dtype=torch.float64)
    whole = problem(label_smoothing=smoothing, token_weight=weights())
    with torch.no_grad():
        for tensor in (whole.input, smoothing, whole.token_weight):
            tensor[1] = torch.nan
    return whole


def nothing_counts(reduction: str) -> Problem:
    whole = problem(label_smoothing=0.1, reduction=reduction)
    return replace(whole, target=torch.full_like(whole.target, -100))


LOSSES: dict[str, Callable[[], Problem]] = {
    "hard targets": problem,
    "smoothing 0.1": lambda: problem(label_smoothing=0.1),
    "smoothing 1, sum": lambda: problem(label_smoothing=1.0, reduction="sum"),
    "no reduction": lambda: problem(label_smoothing=0.1, reduction="none"),
    "no bias": lambda: problem(bias=False, label_smoothing=0.1),
    "softcap": lambda: problem(label_smoothing=0.1, softcap=2.0),
    "softcap and scale": lambda: problem(label_smoothing=0.1, softcap=3.0, logit_scale=0.3),
    "z-loss": lambda: problem(label_smoothing=0.1, z_loss=0.01, logit_scale=1.7),
    "options as tensors": lambda: problem(
        label_smoothing=0.1,
        softcap=torch.tensor(3.0),
        logit_scale=torch.tensor(0.5),
        z_loss=torch.tensor(0.125),
    ),
    "token weight": lambda: problem(label_smoothing=0.1, token_weight=weights()),
    "token weight, sum": lambda: problem(token_weight=weights(), reduction="sum"),
    "another ignore_index": lambda: problem(label_smoothing=0.1, ignore_index=0),
    "ignored tokens hold NaN": ignored_nan,
    "one token": lambda: problem(n=1, label_smoothing=0.1),
    "all tokens ignored, sum": lambda: nothing_counts("sum"),
    "all tokens ignored, mean": lambda: nothing_counts("mean"),
    "all tokens ignored by weight, mean": lambda: problem(token_weight=0 * weights()),
    "a rank without rows": lambda: problem(v=5, label_smoothing=0.1, z_loss=0.01),
    "a vocabulary of one": lambda: problem(v=1, label_smoothing=0.1),
    "reference": lambda: problem(label_smoothing=0.1, softcap=2.0, impl="reference"),
}


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(whole: Problem, over: DeviceMesh | None = None, *placements: Any) -> Problem:
    """The same problem with weight and bias sharded over the vocabulary."""
    over, placements = over or mesh(), placements or (Shard(0),)

    def shard(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return distribute_tensor(tensor.detach(), over, placements).requires_grad_(
            tensor.requires_grad
        )

    return replace(
        whole, linear_weight=shard(whole.linear_weight), linear_bias=shard(whole.linear_bias)
    )


def first(tokens: int, whole: Problem) -> Problem:
    """The same problem with fewer tokens."""
    x = whole.input.detach()[:tokens].clone().requires_grad_()  # a view would be recompiled
    return replace(whole, input=x, target=whole.target[:tokens].clone())


def run(part: Problem, loss: Tensor | None = None) -> dict[str, Any]:
    loss = part.fused() if loss is None else loss
    # That of tests.problems.gradients; a compiled backward does not let its graph be retained.
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    found = torch.autograd.grad(loss, part.parameters, upstream)
    return {"loss": loss.detach(), "gradients": [full(g) for g in found]}


# Statistics.


def statistics_problem(v: int = V) -> tuple[Problem, Tensor, list[Tensor]]:
    """A problem, three picks a token (some nowhere, one twice) and gradients for four statistics."""
    whole = problem(v=v, softcap=3.0, logit_scale=1.3)
    random = torch.Generator().manual_seed(v)
    picks = torch.randint(-2, v + 2, (9, 3), generator=random)
    picks[:, 2] = picks[:, 0]
    shapes = [(9,), (9, 3), (9,), (9,)]
    return (
        whole,
        picks,
        [torch.randn(s, generator=random, dtype=torch.float64) for s in shapes],
    )


def statistics_of(part: Problem, picks: Tensor) -> levelhead.ops.LogitStats:
    return levelhead.linear_logit_stats(
        part.input,
        part.linear_weight,
        picks,
        linear_bias=part.linear_bias,
        softcap=part.softcap,
        logit_scale=part.logit_scale,
        impl=part.impl,
    )


def statistics_and_gradients(v: int) -> dict[str, Any]:
    whole, picks, upstream = statistics_problem(v)
    part = sharded(whole)
    stats = statistics_of(part, picks)
    found = torch.autograd.grad(stats[:4], part.parameters, upstream)
    return {
        "statistics": [field.detach() for field in stats],
        "gradients": [full(g) for g in found],
        "differentiable": [field.requires_grad for field in stats],
        "layouts": [str(g.placements) for g in found[1:]],
    }


def one_statistic(index: int) -> list[Tensor]:
    """Gradients where the others have none: what the backward gets for them is None."""
    whole, picks, upstream = statistics_problem()
    part = sharded(whole)
    stats = statistics_of(part, picks)
    return [full(g) for g in torch.autograd.grad(stats[index], part.parameters, upstream[index])]


def ties() -> Tensor:
    """The argmax where all logits are equal."""
    part = sharded(problem())
    zero = torch.zeros_like(part.input)
    stats = levelhead.linear_logit_stats(zero, part.linear_weight, part.target)
    return stats.argmax


def unequal_shards() -> dict[str, Any]:
    """The primitive, for shards that DTensor would not make: the first rank has none, the last most."""
    whole, picks, upstream = statistics_problem()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = [0, *range(1, ranks - 1), V - sum(range(ranks - 1))]
    first = sum(sizes[:rank])
    rows = slice(first, first + sizes[rank])
    leaves = [t.detach()[rows].requires_grad_() for t in (whole.linear_weight, whole.linear_bias)]
    stats = vocab_parallel_logit_stats(
        whole.input, leaves[0], picks, leaves[1], 3.0, 1.3, "chunked", sizes, dist.group.WORLD
    )
    found = torch.autograd.grad(stats[:4], [whole.input, *leaves], upstream)
    return {"rows": (rows.start, rows.stop), "statistics": list(stats), "gradients": list(found)}


def far_from_0(offset: int, *, masked: bool = False) -> Problem:
    """Logits that float32 holds exactly, with an offset; ``masked``: the last rank has no entry that counts."""
    whole = problem(label_smoothing=0.1, reduction="none")
    x, weight, bias = (p.detach().mul(8).round().div(8).float() for p in whole.parameters)
    bias += offset
    if masked:
        bias[V // 2 :] = -torch.inf
        whole = replace(whole, label_smoothing=torch.zeros(()), target=whole.target % (V // 2))
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    return replace(whole, input=leaves[0], linear_weight=leaves[1], linear_bias=leaves[2])


def checkpointed() -> list[Tensor]:
    """In a checkpoint, whose saved tensors can be read once in a backward; the graph is used for each gradient."""
    part = sharded(problem(label_smoothing=0.1))
    loss = checkpoint(part.fused, use_reentrant=False)
    found = [torch.autograd.grad(loss, [p], retain_graph=True)[0] for p in part.parameters]
    return [full(g) for g in found]


# Layouts.


def replicated_input() -> dict[str, Any]:
    """A DTensor that is whole on every rank, as ColwiseParallel hands to a head."""
    over = mesh()
    part = sharded(problem(label_smoothing=0.1), over)
    x = distribute_tensor(part.input.detach(), over, [Replicate()]).requires_grad_()
    part = replace(part, input=x)
    result = run(part)
    (gradient,) = torch.autograd.grad(part.fused(), [x])
    return result | {"layout": str(gradient.placements), "type": type(result["loss"]).__name__}


def two_dimensions() -> dict[str, Any]:
    """A mesh of data parallel times tensor parallel ranks; the groups share no batch."""
    over = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    row = over.get_local_rank("dp")
    whole = first(9 - row, problem(label_smoothing=0.1))
    part = sharded(whole, over, Replicate(), Shard(0))
    found = gradients(part.fused(), part)
    local = [g.to_local() if isinstance(g, DTensor) else g for g in found]
    most = -(-V // over.size(1))
    start = over.get_local_rank("tp") * most
    return {"tokens": 9 - row, "rows": (start, min(start + most, V)), "gradients": local}


def the_module() -> dict[str, Any]:
    """LinearCrossEntropyLoss, its layer sharded by torch's own tensor parallelism."""
    whole = problem(label_smoothing=0.1)
    module = levelhead.LinearCrossEntropyLoss(
        5, V, bias=True, dtype=torch.float64, label_smoothing=0.1
    )
    with torch.no_grad():
        module.linear.weight.copy_(whole.linear_weight)
        module.linear.bias.copy_(whole.linear_bias)
    parallelize_module(module, mesh(), {"linear": ColwiseParallel()})
    loss = module(whole.input, whole.target)
    found = torch.autograd.grad(
        loss, [whole.input, module.linear.weight, module.linear.bias], torch.full_like(loss, 0.5)
    )
    return {"loss": loss.detach(), "gradients": [full(g) for g in found]}


# Precision.


def narrow_problem(dtype: torch.dtype) -> Problem:
    """Logits of a few units, as those of a model are."""
    whole = problem(n=64, d=32, v=251, label_smoothing=0.1)
    with torch.no_grad():
        whole.linear_weight.div_(4)
    return whole.to(dtype)


def narrow(dtype: torch.dtype, *, dense: bool, autocast: bool = False) -> dict[str, Any]:
    """Ours or the dense way of tensor parallelism: a DTensor product whose logits are gathered."""
    over = mesh()
    whole = narrow_problem(dtype)
    part = sharded(whole, over)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            return run(part)
    if not dense:
        return run(part)
    x = DTensor.from_local(part.input, over, [Replicate()])
    z = torch.nn.functional.linear(x, part.linear_weight, part.linear_bias)
    z = z.redistribute(placements=[Replicate()]).to_local().float()
    loss = torch.nn.functional.cross_entropy(z, whole.target, label_smoothing=0.1)
    return run(part, loss)


# torch.compile.


def compiled() -> list[dict[str, Any]]:
    """One graph, forward and backward, and the same one for other numbers of tokens."""
    part = sharded(problem(label_smoothing=0.1, z_loss=0.01))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]

    def loss(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return levelhead.linear_cross_entropy(
            x, weight, target, linear_bias=bias, label_smoothing=0.1, z_loss=0.01
        )

    function = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    results = []
    for tokens in (9, 7, 6):
        some = first(tokens, part)
        value = function(some.input, some.linear_weight, some.linear_bias, some.target)
        results.append(run(some, value) | {"graphs": graphs["unique_graphs"]})
    return results


def compiled_mismatch() -> Tensor:
    part = sharded(problem(label_smoothing=0.1))
    target = part.target.clone()
    target[0] = dist.get_rank()
    torch._dynamo.reset()
    function = torch.compile(levelhead.linear_cross_entropy, backend="aot_eager")
    return function(part.input, part.linear_weight, target, linear_bias=part.linear_bias).detach()


# Memory.


class Allocations(TorchDispatchMode):
    """Remembers what the operators inside return, and so keeps its addresses taken."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                self.made.append(getattr(local, "elem", local))  # of a collective under way
        return result


@contextmanager
def allocations() -> Iterator[Allocations]:
    """Within the operators too, which run without the modes of their caller."""
    mode = Allocations()
    originals = chunked.linear_logit_stats, chunked.linear_logit_stats_backward

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any) -> Any:
            with mode:
                return original(*args)

        return function

    chunked.linear_logit_stats, chunked.linear_logit_stats_backward = map(watched, originals)
    try:
        with mode:
            yield mode
    finally:
        chunked.linear_logit_stats, chunked.linear_logit_stats_backward = originals


def memory(*, frozen: bool, gathered: bool = False) -> dict[str, Any]:
    """The sizes in bytes of what forward and backward allocate; ``gathered``: how it must not be."""
    n, d, v = 320, 24, 4000
    with changed(buffer_share=0, buffer_bytes=2**18):
        part = sharded(problem(n, d, v, bias=False, label_smoothing=0.1))
        part.linear_weight.requires_grad_(not frozen)
        weight = part.linear_weight.to_local().untyped_storage().data_ptr()
        with allocations() as found:
            head = part.linear_weight.full_tensor() if gathered else part.linear_weight
            replace(part, linear_weight=head).fused().backward()
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found.made}
        sizes.pop(weight, None)
    rows = len(part.linear_weight.to_local())
    return {
        "largest": max(sizes.values()),
        "of_the_shard": sum(size == rows * d * 8 for size in sizes.values()),
        "shard": rows * d * 8,
        "logits": n * v * 8,
        "weight": v * d * 8,
    }


# Refusals.


def _shifted_target(part: Problem) -> Problem:
    target = part.target.clone()
    target[0] += dist.get_rank()
    return replace(part, target=target)


def _layout(*placements: Any) -> Callable[[Problem], Problem]:
    def change(part: Problem) -> Problem:
        return replace(part, linear_weight=part.linear_weight.redistribute(placements=placements))

    return change


def _as_dtensor(name: str, placement: Any) -> Callable[[Problem], Problem]:
    def change(part: Problem) -> Problem:
        over, plain = part.linear_weight.device_mesh, full(getattr(part, name)).detach()
        return replace(part, **{name: distribute_tensor(plain, over, [placement])})

    return change


def _partial(part: Problem) -> Problem:
    over = part.linear_weight.device_mesh
    weight = DTensor.from_local(full(part.linear_weight).detach(), over, [Partial()])
    return replace(part, linear_weight=weight)


def _other_shards(part: Problem) -> Problem:
    """All but one row on the first rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = V - ranks + 1 if rank == 0 else 1
    local = torch.randn(rows, 5, dtype=torch.float64)
    over = part.linear_weight.device_mesh
    weight = DTensor.from_local(local, over, [Shard(0)], shape=(V, 5), stride=(5, 1))
    return replace(part, linear_weight=weight)


REFUSALS: dict[str, Callable[[Problem], Problem]] = {
    "sharded over hidden units": _layout(Shard(1)),
    "not sharded": _layout(Replicate()),
    "partial": _partial,
    "plain bias": lambda part: replace(part, linear_bias=full(part.linear_bias)),
    "bias not sharded": _as_dtensor("linear_bias", Replicate()),
    "sharded input": _as_dtensor("input", Shard(0)),
    "target": _as_dtensor("target", Replicate()),
    "token weight": lambda part: _as_dtensor("token_weight", Replicate())(
        replace(part, token_weight=weights())
    ),
    "other shards": _other_shards,
    "other targets": _shifted_target,
}


SCENARIOS: dict[str, Callable[[], Any]] = {
    **{name: lambda make=make: run(sharded(make())) for name, make in LOSSES.items()},
    **{f"statistics of {v}": lambda v=v: statistics_and_gradients(v) for v in (V, 64, 5, 1)},
    **{f"statistic {i} alone": lambda i=i: one_statistic(i) for i in range(4)},
    "ties": ties,
    "unequal shards": unequal_shards,
    "near 0": lambda: run(sharded(far_from_0(0))),
    "far from 0": lambda: run(sharded(far_from_0(-(2**15)))),
    "masked": lambda: run(sharded(far_from_0(-(2**15), masked=True))),
    "checkpointed": checkpointed,
    "replicated input": replicated_input,
    "two dimensions": two_dimensions,
    "the module": the_module,
    **{
        f"{dtype}{', dense' if dense else ''}": lambda dtype=dtype, dense=dense: narrow(
            getattr(torch, dtype), dense=dense
        )
        for dtype in ("float32", "bfloat16", "float16")
        for dense in (False, True)
    },
    "autocast": lambda: narrow(torch.float32, dense=False, autocast=True),
    "compiled": compiled,
    "compiled, other targets": compiled_mismatch,
    "memory": lambda: memory(frozen=False),
    "memory, frozen head": lambda: memory(frozen=True),
    "memory, gathered": lambda: memory(frozen=False, gathered=True),
    "refusals": lambda: refusals(lambda: sharded(problem(label_smoothing=0.1)), REFUSALS),
    **scenarios(problem, sharded, lambda tensor: tensor),
}


def start() -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
