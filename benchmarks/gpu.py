"""Times and peak memory on a GPU, and the targets they are held to: `make gpu`, `python -m benchmarks.gpu`.

Needs torch and triton, nothing else; the file is written after every group of cases. How it measures: measure.py.
"""

import argparse
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence

import torch

from .measure import RESULTS, Group, Row, line, measure, reason, write
from .methods import GPU_METHODS
from .shapes import SHAPES
from .step import Case, Step, machine
from .targets import OURS, TARGET_SHAPES, said, verdicts

MODELS = ("Llama-3 8B", "Gemma-2 2B", "Qwen2.5 0.5B", "GPT-2")
MODES = ("forward+backward", "frozen head", "forward", "reduction none")
TOKENS = 8192
STEPS = 2  # timed together: a steady state, and all rounds still fit ten minutes


class CudaClock:
    """Device events around some runs."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the time of one run in a row of them, as in training.

        One goes before: while the device is busy with it, the launches of the next are queued, and what the host
        does in Python counts only if the device has to wait for it.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        start.record()
        for _ in range(STEPS):
            run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / STEPS

    def extra_bytes(self, steps: Sequence[Step]) -> list[int | str]:
        """Return the peaks of torch's allocator; workspaces of libraries are older than the steps, and left out."""
        return [self._extra_bytes(step) for step in steps]

    def _extra_bytes(self, step: Step) -> int | str:
        try:
            return step.extra_bytes()
        except Exception as error:  # out of memory, of all things
            return reason(error)


def plan() -> list[Group]:
    """Return what is measured together."""

    def group(
        shape: str, mode: str = MODES[0], dtype: str = "bfloat16", autocast: bool = False
    ) -> Group:
        v, d = SHAPES[shape]
        narrow = dtype == "bfloat16" and not autocast
        both = narrow and (shape in TARGET_SHAPES or mode == MODES[0])
        smoothings = (0.1, 0.0) if both else (0.1,)
        cases = [Case(TOKENS, d, v, eps, mode, dtype, autocast, "cuda") for eps in smoothings]
        return shape, cases, GPU_METHODS

    groups = [group(shape, mode) for mode in MODES for shape in MODELS]
    return [*groups, group("Llama-3 8B", autocast=True), group("Llama-3 8B", dtype="float32")]


def floor_seconds(row: Row, device: str) -> float | None:
    """Return the least time of Levelhead's stages by the datasheet of the device, None if there is none."""
    from levelhead.ops.triton import roofline

    known = {"A100": roofline.A100, "H100": roofline.H100, "H200": roofline.H200}
    accelerator = next((known[name] for name in known if name in device), None)
    if accelerator is None:
        return None
    dtype, mode = getattr(torch, row["dtype"]), row["mode"]
    size = (row["n"], row["v"], row["d"], dtype)
    weight = {"weight_dtype": torch.float32 if row["autocast"] else dtype}
    if mode in ("forward+backward", "frozen head"):
        stages = [roofline.cross_entropy(*size, **weight, frozen=mode == "frozen head")]
    else:
        stages = [roofline.statistics(*size, accelerator, **weight)]
    if mode == "reduction none":
        stages.append(roofline.statistics_backward(*size, **weight))
    return sum(roofline.floor(steps, accelerator, dtype) for steps in stages)


def accelerator() -> Row:
    """Return where and with what the rows were measured."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    except OSError:  # AMD
        driver = []
    return machine() | {
        "device": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else "unknown",
        "triton": triton.__version__,
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
    """Measure every case, print the verdicts and write results/gpu.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU")
    options = parser.parse_args(arguments)
    lacking = missing()
    if lacking is not None:
        print(f"the GPU benchmark cannot run here: {lacking}", file=sys.stderr)
        return 2
    results: Row = {"machine": accelerator(), "rows": [], "verdicts": []}
    device = results["machine"]["device"]
    print(device)
    if options.check:
        return 0
    warnings.filterwarnings("ignore", message=".*options.* ignored.*")  # torch_chunked, smoothed
    for group in plan():
        rows = measure(*group, CudaClock())
        for row in rows:
            if row["method"] == OURS and "ms_p50" in row:
                row["datasheet_floor_ms"] = 1e3 * (floor_seconds(row, device) or 0) or None
            print(line(row), flush=True)
        results["rows"] += rows
        results["verdicts"] = verdicts(results["rows"])
        write(RESULTS / "gpu.json", results)
    for verdict in results["verdicts"]:
        print(said(verdict))
    print(f"{RESULTS / 'gpu.json'}\nnow: python -m benchmarks.render")
    return 0


if __name__ == "__main__":
    sys.exit(main())
