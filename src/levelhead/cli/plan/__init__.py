"""`levelhead plan`: what a model's head costs in memory and time, under each method and parallel layout."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from levelhead.measure.footprint import METHODS, Problem

from ..arguments import DTYPES, add_dtype, add_model, count, positive
from ..errors import CliError
from .architecture import read_architecture
from .cost import Layout, cost
from .report import show, verdict

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


def add_parser(verbs: Any) -> None:
    """Adds `plan` to the verbs of the command."""
    parser = verbs.add_parser(
        "plan",
        help="say what a model's head will cost in memory and time, on how many GPUs",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
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
    add_dtype(parser, "bf16")
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
    dtype = DTYPES[arguments.dtype]
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
        cost(method, problem, layout, architecture, arguments.memory, arguments.tflops)
        for method in METHODS
    ]
    head = layout.states(problem.weight_numbers, dtype, frozen=problem.frozen)
    words = list(verdict(rows, problem, arguments.memory, arguments.tflops))
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
            "verdict": words,
            "head_at_rest_bytes": head,
            "methods": [asdict(row) for row in rows],
        }
        sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
    else:
        show(architecture, problem, layout, head, rows, words)
