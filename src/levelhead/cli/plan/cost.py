"""What each method costs one GPU of a layout."""

from dataclasses import dataclass, field

import torch

from levelhead.measure import footprint
from levelhead.measure.footprint import Method, Problem

from .architecture import Architecture

GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """How a model is spread: ZeRO stage, tensor-parallel and data-parallel ranks."""

    zero: int
    tensor: int
    data: int

    def states(self, numbers: int, dtype: torch.dtype, *, frozen: bool) -> dict[str, int]:
        """Bytes that a GPU keeps of so many parameters of its tensor-parallel rank, at rest.

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


def cost(
    method: Method,
    problem: Problem,
    layout: Layout,
    architecture: Architecture,
    memory: float | None,
    tflops: float | None,
) -> Row:
    """The row of a method; `memory` in GiB and `tflops` as the user gave them, if so."""
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
    """Bytes of a GPU at the worst moment of the loss: states, checkpoints of the layers, the head."""
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
