"""`levelhead plan`: what a model's head costs in memory and time, under each method and parallel layout."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from ..arguments import DTYPES, add_dtype, add_model, count, positive
from .cost import plan
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
    """Add `plan` to the verbs of the command."""
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
    """Compute and print.

    Raises:
        CliError: The GPUs cannot be laid out so, the model cannot be read, or a package is missing.
    """
    found = plan(
        arguments.model,
        arguments.tokens,
        gpus=arguments.gpus,
        zero=arguments.zero,
        tensor_parallel=arguments.tensor_parallel,
        dtype=DTYPES[arguments.dtype],
        frozen=arguments.lora,
        memory=arguments.memory,
        tflops=arguments.tflops,
        trust_remote_code=arguments.trust_remote_code,
    )
    if not arguments.json:
        show(found)
        return
    layout, problem = found.layout, found.problem
    content = {
        "model": asdict(found.architecture),
        "tokens": problem.tokens,
        "gpus": arguments.gpus,
        "zero": layout.zero,
        "tensor_parallel": layout.tensor,
        "data_parallel": layout.data,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "frozen_head": problem.frozen,
        "memory_gib": found.memory,
        "tflops": found.tflops,
        "verdict": list(verdict(found)),
        "head_at_rest_bytes": found.head_at_rest,
        "methods": [asdict(row) for row in found.rows],
    }
    sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
