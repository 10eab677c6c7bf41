"""`levelhead plan`: what a model's head costs in memory and time, under each method and parallel layout."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import footprint
from .architecture import Architecture, read_architecture
from .arguments import count, positive
from .errors import CliError, missing_extra
from .footprint import Method, Problem

_DESCRIPTION = """\
Says what the output head and its loss will take of each GPU, from a model's config alone: the
peak of every method, what the head keeps under ZeRO, operations, and the longest micro-batch
that fits. Nothing is run or downloaded but the config.
"""
_EPILOG = """\
examples:
  levelhead plan tiny --tokens 4096
  levelhead plan meta-llama/Llama-3.1-8B --tokens 16384 --gpus 8 --zero 3 --memory 80
  levelhead plan ./my-model --tokens 8192 --gpus 8 --tensor-parallel 2 --tflops 400 --json

What it assumes:
  Peaks are those of PyTorch's allocator, beyond weight and hidden states, gradients included. The
  formulas are read off the code of each method; the tests hold those that a CPU can run to their
  measured peaks. None was measured on a GPU, and what an allocator rounds up or fragments is not
  in them.
  ZeRO as in its paper (Rajbhandari et al., SC 2020, arXiv 1910.02054): Adam, 16 bytes a trained
  parameter; stage 1 divides 12 of them over the data-parallel GPUs (8 in float32), 2 the gradients
  as well, 3 the parameters. FSDP's full sharding is stage 3. Under stage 3 the head's weight stands
  whole while its loss runs, and so does its gradient under any stage.
  --memory counts what stands at the loss: the model's states, one hidden state a layer (gradient
  checkpointing) and the head. Adapters, other moments of the step and the CUDA context come on top.
"""
_GIB = 2**30
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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


def add_parser(verbs: Any) -> None:
    """Adds `plan` to the verbs of the command."""
    parser = verbs.add_parser(
        "plan",
        help="say what a model's head will cost in memory and time, on how many GPUs",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a name on the hub, a folder, or tiny")
    parser.add_argument(
        "--tokens",
        type=count,
        required=True,
        metavar="N",
        help="tokens of one GPU's micro-batch, sequences x length, padding included",
    )
    parser.add_argument("--gpus", type=count, default=1, metavar="G", help="(default: 1)")
    parser.add_argument(
        "--zero",
        type=int,
        choices=range(4),
        default=0,
        help="ZeRO stage; 3 is also FSDP's full sharding (default: 0)",
    )
    parser.add_argument(
        "--tensor-parallel",
        type=count,
        default=1,
        metavar="P",
        help="GPUs that share each layer, and the head's rows (default: 1)",
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="(default: %(default)s)")
    parser.add_argument("--lora", action="store_true", help="the model, and so its head, is frozen")
    parser.add_argument(
        "--memory", type=positive, metavar="GIB", help="of a GPU, for the longest micro-batch"
    )
    parser.add_argument(
        "--tflops",
        type=positive,
        metavar="X",
        help="what the GPU reaches in large products, for times",
    )
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Reads the config, computes and says.

    Raises:
        CliError: The GPUs cannot be laid out so, the model cannot be read, or a package is missing.
    """
    if arguments.gpus % arguments.tensor_parallel:
        raise CliError(
            f"--gpus {arguments.gpus} cannot be divided into tensor-parallel groups of "
            f"{arguments.tensor_parallel}; choose --tensor-parallel among the divisors of --gpus"
        )
    dtype = _DTYPES[arguments.dtype]
    architecture = read_architecture(
        arguments.model, dtype, trust_remote_code=arguments.trust_remote_code
    )
    if arguments.tensor_parallel > architecture.vocabulary:
        raise CliError(
            f"--tensor-parallel {arguments.tensor_parallel} leaves ranks without a row of the head, "
            f"which has {architecture.vocabulary}"
        )
    tensor = arguments.tensor_parallel
    layout = Layout(arguments.zero, tensor, arguments.gpus // tensor)
    problem = Problem(
        arguments.tokens,
        architecture.hidden,
        architecture.vocabulary,
        dtype,
        frozen=arguments.lora,
        softcap=architecture.softcap is not None,
        ranks=tensor,
    )
    rows = [
        _row(method, problem, layout, architecture, arguments.memory, arguments.tflops)
        for method in footprint.METHODS
    ]
    head = layout.states(problem.weight_numbers, dtype, frozen=problem.frozen)
    verdict = list(_verdict(rows, problem, arguments.memory, arguments.tflops))
    if arguments.json:
        content = {
            "model": asdict(architecture),
            "tokens": problem.tokens,
            "gpus": arguments.gpus,
            "zero": layout.zero,
            "tensor_parallel": tensor,
            "data_parallel": layout.data,
            "dtype": str(dtype).removeprefix("torch."),
            "frozen_head": problem.frozen,
            "memory_gib": arguments.memory,
            "tflops": arguments.tflops,
            "verdict": verdict,
            "head_at_rest_bytes": head,
            "methods": [asdict(row) for row in rows],
        }
        sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
    else:
        _show(architecture, problem, layout, head, rows, verdict)


def _row(
    method: Method,
    problem: Problem,
    layout: Layout,
    architecture: Architecture,
    memory: float | None,
    tflops: float | None,
) -> Row:
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
        limit = memory * _GIB
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


def _verdict(
    rows: list[Row], problem: Problem, memory: float | None, tflops: float | None
) -> Iterator[str]:
    """What matters, in words."""
    known = {row.method: row for row in rows if row.operations}
    dense = known[footprint.TRANSFORMERS.name]
    ours = known.get(footprint.TRITON.name, known[footprint.CHUNKED.name])
    for row, name in (
        (dense, "Dense (transformers loss)"),
        (ours, f"Levelhead ({ours.method[11:]})"),
    ):
        logits = sum(size for tensor, size in row.tensors.items() if _of_logits(tensor))
        yield (
            f"{name}: {gib(row.peak_bytes)} per GPU at the peak of head and loss; logits and what is "
            f"made of them: {gib(logits)}."
        )
    of_dense = (ours.peak_bytes or 0) / (dense.peak_bytes or 1)
    yield (
        (
            f"Levelhead's peak is {of_dense:.2g} x the dense one"
            if of_dense < 1
            else f"At so few tokens Levelhead saves nothing: {of_dense:.2g} x the dense peak"
        )
        + f"; the gradients, which any method leaves, are {gib(sum(problem.gradients().values()))}."
    )
    if memory is not None:
        longest = f"dense {dense.longest_tokens}, Levelhead {ours.longest_tokens}"
        if not ours.longest_tokens:
            yield f"No micro-batch fits --memory {memory:g}: the model's states leave no room."
        else:
            yield f"Longest micro-batch that fits --memory {memory:g}, in tokens: {longest}."
        if (ours.longest_tokens or 0) < problem.tokens:
            yield f"The {problem.tokens} tokens asked for do not fit with Levelhead."
    if tflops is None:
        yield "Time: not known without a rate; give --tflops X, what the GPU reaches in large products."
    else:
        yield (
            f"Time at {tflops:g} TFLOP/s, products alone: dense {dense.seconds:.3g} s, "
            f"Levelhead {ours.seconds:.3g} s."
        )


def _of_logits(tensor: str) -> bool:
    return any(word in tensor for word in ("logits", "softmax", "tanh", "shifted", "to sum"))


def gib(size: int | None) -> str:
    """Bytes in GiB for people, or MiB where that reads better; a dash for None."""
    if size is None:
        return "-"
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.1f} MiB"


def _show(
    architecture: Architecture,
    problem: Problem,
    layout: Layout,
    head: dict[str, int],
    rows: list[Row],
    verdict: list[str],
) -> None:
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ModuleNotFoundError as error:
        raise missing_extra(error, "cli", {"rich"}) from error
    console = Console()
    console.print(escape("\n".join(verdict)), highlight=False)
    facts = Table(show_header=False)
    cap = "" if architecture.softcap is None else f", softcap {architecture.softcap:g}"
    tied = ", tied to the input embeddings" if architecture.tied else ""
    dtype = str(problem.dtype).removeprefix("torch.")
    facts.add_row("model", escape(architecture.model))
    facts.add_row("head", f"{architecture.vocabulary} x {architecture.hidden} {dtype}{cap}{tied}")
    facts.add_row("tokens of a GPU", str(problem.tokens))
    sharing = f"data-parallel {layout.data}, tensor-parallel {layout.tensor}, ZeRO {layout.zero}"
    facts.add_row("layout", sharing)
    at_rest = ", ".join(f"{name} {gib(size)}" for name, size in head.items() if size)
    facts.add_row(
        "the head at rest", at_rest + (" (the embeddings' own)" if architecture.tied else "")
    )
    console.print(facts)
    longest = any(row.longest_tokens is not None for row in rows)
    timed = any(row.seconds is not None for row in rows)
    table = Table("head and loss, per GPU", "peak", "what stands then", "operations")
    for column in ("time",) * timed + ("longest, tokens",) * longest:
        table.add_column(column)
    for row in rows:
        if row.operations is None:
            table.add_row(row.method, "-", row.note)
            continue
        parts = sorted(row.tensors.items(), key=lambda part: -part[1])
        cells = [
            row.method + ("" if row.label_smoothing else "\n(no label smoothing)"),
            gib(row.peak_bytes),
            "\n".join(
                f"{gib(size)} {name}" for name, size in parts if size * 50 > (row.peak_bytes or 0)
            ),
            f"{row.operations / 1e12:.3g} TFLOP\n{2 * (row.products_of_2_nvd or 0)} NVD",
        ]
        if row.seconds is not None:
            cells.append(f"{row.seconds:.3g} s")
        if row.longest_tokens is not None:
            cells.append(str(row.longest_tokens))
        table.add_row(*cells)
    console.print(table)
    console.print("Assumptions: levelhead plan --help", highlight=False)
