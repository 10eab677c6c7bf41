"""What a GPU is for, in four stages of nine minutes: `make gpu-STAGE`, `python -m benchmarks.gpu STAGE`.

- decide: ceilings of the device, kernels against float64 and to the bit, what products and the softmax cost
- test: the tests marked `gpu`, in parallel
- bench: times and memory beside other methods, and the verdicts on the targets; `gpu.json`
- tune: launch configurations; `configurations.json`

They need torch, triton, pytest, pytest-xdist and hypothesis, no network, no repository. How they keep time and go on
where they stopped: stage.py.
"""

import argparse
import faulthandler
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from .measure import RESULTS
from .stage import LAST_SECONDS, Stage

STAGES = {  # its module, and the name of its file
    "decide": ("decide", "gpu_decide"),
    "test": ("gpu_tests", "gpu_tests"),
    "bench": ("gpu_bench", "gpu"),
    "tune": ("tune", "gpu_tune"),
}


def missing() -> str | None:
    """Return what this interpreter or machine lacks and what to do about it, None if nothing."""
    if importlib.util.find_spec("triton") is None:
        return (
            "triton is not installed: take an interpreter that has it, GPU_PYTHON=/path/to/python"
        )
    if torch.cuda.is_available():
        return None
    build = torch.version.cuda or torch.version.hip
    if build is None:
        return (
            f"torch {torch.__version__} is a build without GPUs: take an interpreter with a CUDA or "
            "ROCm build, GPU_PYTHON=/path/to/python"
        )
    return (
        f"torch {torch.__version__} finds no GPU: look at nvidia-smi or rocm-smi for the device and "
        f"its driver, which must know CUDA or ROCm {build}, and at CUDA_VISIBLE_DEVICES"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage; return 2 if it cannot run here, 1 if something failed in it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of its files")
    parser.add_argument(
        "--tiny", action="store_true", help="a rehearsal on a CPU, with TRITON_INTERPRET=1"
    )
    options = parser.parse_args(arguments)
    if options.tiny and options.output == RESULTS:
        parser.error("--tiny measures nothing that anybody should keep: give it another --output")
    lacking = None if options.tiny else missing()
    if lacking is not None:
        print(f"the stage {options.stage} cannot run here: {lacking}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", message=".*options.* ignored.*")  # torch_chunked, smoothed
    module, file = STAGES[options.stage]
    stage = Stage(options.output, file, tiny=options.tiny)
    print(stage.machine["device"], stage.machine["commit"])
    faulthandler.dump_traceback_later(LAST_SECONDS, exit=True)  # whatever hangs, rows are on disk
    try:
        code: int = import_module(f"benchmarks.{module}").run(stage)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return code


if __name__ == "__main__":
    sys.exit(main())
