"""Times and peak memory on a GPU, and the targets they are held to: `make gpu`, `python -m benchmarks.gpu`.

Correctness first: a method whose loss or gradients are off, or that does not run, is a row with the reason and without
times. The methods take turns, smoothed and not, and so do the bare products, the floor: the three multiplications of
forward and backward (6 NVD, NVD being one multiply-add per token, vocabulary entry and hidden unit) with nothing
between them. Needs torch and triton, nothing else; the file is written after every group of cases.
"""

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from .gate import Gate
from .methods import GPU_METHODS, Loss, dense
from .step import Case, Step, machine, quantiles
from .targets import OURS, PRODUCTS, TARGET_SHAPES, verdicts

RESULTS = Path(__file__).parent / "results" / "gpu.json"
Row = dict[str, Any]

# Vocabulary and hidden size, (V, D).
SHAPES = {
    "Llama-3 8B": (128256, 4096),
    "Gemma-2 2B": (256000, 2304),
    "Qwen2.5 0.5B": (151936, 896),
    "GPT-2": (50257, 768),
}
MODES = ("forward+backward", "frozen head", "forward", "reduction none")
TOKENS = 8192
ROUNDS = 5
STEPS = 2  # timed together: a steady state, and all rounds still fit ten minutes
# A peer may accumulate its gradients in bfloat16, over tens of chunks. Leaving out the smoothing would be 5 budgets:
# a tenth of the largest gradient beside two and a half roundings of bfloat16, 2^-7 each.
PEERS_BUDGETS = 4


class Clock(Protocol):
    """What measures a run."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the time of one run."""
        ...

    def extra_bytes(self, step: Step) -> int:
        """Return the peak of a step beyond what stood before it and the gradients that it leaves."""
        ...


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

    def extra_bytes(self, step: Step) -> int:
        """Return the peak of torch's allocator; workspaces of libraries are older than the step, and left out."""
        return step.extra_bytes()


def plan() -> list[tuple[str, list[Case]]]:
    """Return the cases by shape; those of a group differ in their smoothing alone, and are measured together."""

    def group(
        shape: str, mode: str = MODES[0], dtype: str = "bfloat16", autocast: bool = False
    ) -> tuple[str, list[Case]]:
        v, d = SHAPES[shape]
        narrow = dtype == "bfloat16" and not autocast
        both = narrow and (shape in TARGET_SHAPES or mode == MODES[0])
        smoothings = (0.1, 0.0) if both else (0.1,)
        return shape, [Case(TOKENS, d, v, eps, mode, dtype, autocast, "cuda") for eps in smoothings]

    groups = [group(shape, mode) for mode in MODES for shape in SHAPES]
    return [*groups, group("Llama-3 8B", autocast=True), group("Llama-3 8B", dtype="float32")]


def products(step: Step) -> Callable[[], None]:
    """Return the products that a step cannot avoid, in the dtype of the input: one, two or all three."""
    x, weight = step.x.detach(), step.weight.detach().to(step.x.dtype)
    count = {"forward": 1, "frozen head": 2}.get(step.case.mode, 3)
    dz = x.new_empty(len(x), len(weight))  # of all tokens: nothing to accumulate
    dx, dw = torch.empty_like(x), torch.empty_like(weight)

    def run() -> None:
        torch.mm(x, weight.T, out=dz)
        if count > 1:
            torch.mm(dz, weight, out=dx)
        if count > 2:
            torch.mm(dz.T, x, out=dw)

    return run


def measure(shape: str, cases: list[Case], methods: dict[str, Loss], clock: Clock) -> list[Row]:
    """Return a row for every method and case, and one for the bare products; the cases differ in eps alone."""
    torch.compiler.reset()  # past its eighth program of a function it would run the rest uncompiled
    named = [(case, name) for case in cases for name in methods]
    rows = [{"shape": shape, "method": name, **asdict(case)} for case, name in named]
    rows.append({"shape": shape, "method": PRODUCTS, **asdict(cases[0]), "eps": None})
    try:
        times = _times(rows, cases, methods, clock)
    except torch.OutOfMemoryError:
        failure = {"failure": "out of memory for the tensors of the case, or its float64 truth"}
        return [row | failure for row in rows]
    for row, seconds in zip(rows, times, strict=True):
        row |= quantiles(seconds) if seconds else {}
    for row in rows:
        if "ms_p50" in row:
            row["of_products"] = row["ms_p50"] / rows[-1]["ms_p50"]
    return rows


def _times(
    rows: list[Row], cases: list[Case], methods: dict[str, Loss], clock: Clock
) -> list[list[float]]:
    """Return the seconds of each row's runs, none for a method that fails, and fill in the rest of the row."""
    base = Step(cases[0], dense)
    runs: list[Callable[[], object]] = []
    for case in cases:
        gate = Gate(base.using(dense, case.eps))
        for name, loss in methods.items():
            step = base.using(loss, case.eps)
            rows[len(runs)] |= admit(name, step, gate, clock)
            runs.append(step)
        del gate  # its truth is four times a bfloat16 weight
    runs.append(products(base))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for row, run, seconds in zip(rows, runs, times, strict=True):
            if "failure" not in row:
                seconds.append(clock.seconds(run))
    return times


def admit(name: str, step: Step, gate: Gate, clock: Clock) -> Row:
    """Run a method twice, which warms it up, and return its error and memory, or why it is not timed."""
    limit = 1 if name.startswith("levelhead") else PEERS_BUDGETS
    try:
        error = gate.excess(step)
        if not error <= limit:
            raise ArithmeticError(f"its error is {error:.2g} times the budget")
        extra = clock.extra_bytes(step)
        gradients = sum(gradient.nbytes for gradient in step.gradients())
        return {"error": error, "extra_bytes": extra, "gradient_bytes": gradients}
    except Exception as error:  # whatever a peer may raise; out of memory too
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    step.x.grad = step.weight.grad = None
    gc.collect()
    torch.cuda.empty_cache()
    return {"failure": failure}


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


def line(row: Row) -> str:
    """Return a row as it is printed."""
    eps = "" if row["eps"] is None else f"eps {row['eps']:g}"
    dtype = row["dtype"] + (", autocast" if row["autocast"] else "")
    head = f"{row['shape']:13}{row['mode']:17}{dtype:19}{eps:8}{row['method']:31}"
    if "failure" in row:
        return head + row["failure"]
    extra = f"{row['extra_bytes'] / 2**20:8.0f} MiB" if "extra_bytes" in row else ""
    return f"{head}{row['ms_p50']:9.2f} ms {row['of_products']:6.2f} x{extra}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every case, print the verdicts and write results/gpu.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU")
    options = parser.parse_args(arguments)
    reason = missing()
    if reason is not None:
        print(f"the GPU benchmark cannot run here: {reason}", file=sys.stderr)
        return 2
    results: Row = {"machine": accelerator(), "rows": [], "verdicts": []}
    device = results["machine"]["device"]
    print(device)
    if options.check:
        return 0
    warnings.filterwarnings("ignore", message=".*options.* ignored.*")  # torch_chunked, smoothed
    for shape, cases in plan():
        rows = measure(shape, cases, GPU_METHODS, CudaClock())
        for row in rows:
            if row["method"] == OURS and "ms_p50" in row:
                row["datasheet_floor_ms"] = 1e3 * (floor_seconds(row, device) or 0) or None
            print(line(row), flush=True)
        results["rows"] += rows
        results["verdicts"] = verdicts(results["rows"])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for verdict in results["verdicts"]:
        value = "" if verdict["value"] is None else f"{verdict['value']:.3f}: "
        print(
            "{shape}: {target}, at most {at_most:g}: ".format(**verdict),
            value,
            verdict["verdict"],
            sep="",
        )
    print(f"{RESULTS}\nnow: python -m benchmarks.render")
    return 0


if __name__ == "__main__":
    sys.exit(main())
