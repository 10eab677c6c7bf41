"""Compute what each method costs one GPU of a layout."""

from dataclasses import dataclass, field

import torch

from levelhead.measure import footprint
from levelhead.measure.footprint import METHODS, Method, Problem

from ..errors import CliError
from .architecture import Architecture, read_architecture

GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """How a model is spread over GPUs: ZeRO stage, tensor-parallel and data-parallel ranks."""

    zero: int
    tensor: int
    data: int

    def states(self, numbers: int, dtype: torch.dtype, *, frozen: bool) -> dict[str, int]:
        """Return the bytes that a GPU keeps of so many parameters of its tensor-parallel rank, at rest.

        2 + 2 + 12 bytes a parameter of 16 bits (Adam's moments and a master copy in float32), 4 + 4 + 8 of float32.
        """
        b = dtype.itemsize
        of_optimizer = 0 if frozen else (12 if b < 4 else 8)
        whole = {"parameters": b, "gradients": 0 if frozen else b, "optimizer states": of_optimizer}
        sharded_from = {"parameters": 3, "gradients": 2, "optimizer states": 1}
        return {
            name: size * (-(-numbers // self.data) if self.zero >= sharded_from[name] else numbers)
            for name, size in whole.items()
        }


@dataclass(frozen=True)
class Row:
    """What a method costs one GPU; None where it cannot run or is not known."""

    method: str
    label_smoothing: bool
    peak_bytes: int | None = None
    moment: str | None = None
    tensors: dict[str, int] = field(default_factory=dict)
    extra_bytes: int | None = None
    operations: int | None = None
    products_of_2_nvd: int | None = None
    seconds: float | None = None
    longest_tokens: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a model's head costs one GPU.

    Attributes:
        architecture: What the model's config says.
        problem: The head and its loss as one GPU has them.
        layout: How the model is spread.
        memory: Of a GPU, GiB, or None.
        tflops: What a GPU reaches in large products, or None.
        head_at_rest: Bytes of the head that a GPU keeps between steps: parameters, gradients, optimizer states.
        rows: One for each method.
    """

    architecture: Architecture
    problem: Problem
    layout: Layout
    memory: float | None
    tflops: float | None
    head_at_rest: dict[str, int]
    rows: list[Row]


def plan(
    model: str,
    tokens: int,
    *,
    gpus: int = 1,
    zero: int = 0,
    tensor_parallel: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    frozen: bool = False,
    memory: float | None = None,
    tflops: float | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Compute what a model's head and its loss take of each GPU, from the model's config alone.

    Args:
        model: A name on the hub, a folder, or "tiny".
        tokens: Of one GPU's micro-batch, padding included.
        gpus: In all.
        zero: ZeRO stage; 3 is also FSDP's full sharding.
        tensor_parallel: GPUs that share each layer, and the head's rows.
        dtype: Of weights, hidden states and gradients.
        frozen: Whether the model, and so its head, is not trained, as under LoRA.
        memory: Of a GPU, in GiB, for the longest micro-batch.
        tflops: What a GPU reaches in large products, for times.
        trust_remote_code: Whether the config may come with code.

    Raises:
        CliError: The GPUs cannot be laid out so, the model cannot be read, or a package is missing.
    """
    if gpus % tensor_parallel:
        raise CliError(
            f"--gpus {gpus} cannot be divided into tensor-parallel groups of "
            f"{tensor_parallel}; choose --tensor-parallel among the divisors of --gpus"
        )
    architecture = read_architecture(model, dtype, trust_remote_code=trust_remote_code)
    if tensor_parallel > architecture.vocabulary:
        raise CliError(
            f"--tensor-parallel {tensor_parallel} leaves ranks without a row of the head, "
            f"which has {architecture.vocabulary}"
        )
    layout = Layout(zero, tensor_parallel, gpus // tensor_parallel)
    problem = Problem(
        tokens,
        architecture.hidden,
        architecture.vocabulary,
        dtype,
        frozen=frozen,
        softcap=architecture.softcap is not None,
        ranks=tensor_parallel,
    )
    rows = [_cost(method, problem, layout, architecture, memory, tflops) for method in METHODS]
    head = layout.states(problem.weight_numbers, dtype, frozen=frozen)
    return Plan(architecture, problem, layout, memory, tflops, head, rows)


def _cost(
    method: Method,
    problem: Problem,
    layout: Layout,
    architecture: Architecture,
    memory: float | None,
    tflops: float | None,
) -> Row:
    """Return the row of a method."""
    why_not = method.why_not(problem)
    try:
        peak = None if why_not else footprint.peak(method, problem)
    except ModuleNotFoundError as error:
        peak, why_not = (
            None,
            f"{error.name} is not installed here, which sets the sizes of its buffers",
        )
    if peak is None:
        return Row(method.name, method.smoothing, note=why_not)
    operations = footprint.operations(method, problem)
    most = None
    if memory is not None:
        limit = memory * GIB
        most = footprint.longest(
            lambda longer: _at_the_loss(method, longer, layout, architecture) <= limit, problem
        )
    return Row(
        method.name,
        method.smoothing,
        peak.total,
        peak.moment,
        peak.tensors,
        footprint.extra_bytes(method, problem),
        operations,
        footprint.products(method, problem),
        None if tflops is None else operations / (1e12 * tflops),
        most,
    )


def _at_the_loss(
    method: Method, problem: Problem, layout: Layout, architecture: Architecture
) -> int:
    """Return the bytes of a GPU at the worst moment of the loss: states, checkpoints of the layers, the head."""
    dtype, frozen = problem.dtype, problem.frozen
    body = -(-(architecture.parameters - problem.hidden * problem.vocabulary) // layout.tensor)
    head = problem.weight_numbers
    states = sum(layout.states(body, dtype, frozen=frozen).values())
    at_rest = layout.states(head, dtype, frozen=frozen)
    gathered = dtype.itemsize * head if layout.zero == 3 else 0
    # The gradient of the head is in the peak of its method, whole.
    states += at_rest["parameters"] + at_rest["optimizer states"] + gathered
    hidden_states = (architecture.layers + 1) * dtype.itemsize * problem.tokens * problem.hidden
    return states + hidden_states + footprint.peak(method, problem).total
