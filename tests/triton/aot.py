"""Every kernel compiled ahead of time for chips that are not here, and what it may use: `make aot` prints the table.

The public functions of the implementation run on tensors without memory, of a model's real shapes. What they launch is
compiled, by Triton's own launcher, and not run: signature, alignment and options are those of a launch on that chip.
`python -m tests.triton.aot sm_90 state` does so for the rows that have these words.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from benchmarks.shapes import SHAPES
from triton.backends.compiler import GPUTarget

from levelhead.ops import sums
from levelhead.ops.statistics import StatsGradient, statistics_dtype
from levelhead.ops.triton import backward, forward, launch, softmax

# What an architecture of the configurations is compiled for, and the KiB of shared memory that a program may have:
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", maximum per thread block (compute
# capability 8.0, 9.0 and 10.0); CDNA3 ISA, section 2.2, LDS. "other" serves chips with as little as 64 KiB (7.5).
CHIPS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
    "other": (GPUTarget("cuda", 80, 32), 64),
}
# What multiplies matrices, in PTX or amdgcn, and what it is in machine code.
UNITS = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma\.",
    "mfma": r"\bv_mfma",
}
INSTRUCTIONS = {
    "mma": r"\b[HD]MMA",
    "wgmma": r"\bHGMMA",
    "tcgen05": r"\bUTC\w*MMA",
    "mfma": r"\bv_mfma",
    "fma": r"\bFFMA",
}
TENSOR_CORE = {"sm_80": "mma", "other": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
# The first of these that an instruction names is the type of its operands.
OPERANDS = ["bf16", "f16", "tf32", "xf32", "f32", "f64"]
# Measured when the statistics became relative to the maximum: two rose by 4 and 20 bytes for the one more value a token
# that they carry, the others fell or stayed.
# Bytes that may be spilled outside the main loop, in the variants "plain" and "full", by the pinned Triton; 0 where
# there is no entry. It is what is done with a tile once it is summed, after D / BLOCK_D passes of the loop.
EPILOGUE_SPILLS = {
    ("state", "sm_80"): (480, 564),
    ("state", "sm_90"): (376, 648),
    ("state", "sm_100"): (36, 112),
    ("state", "gfx942"): (8, 16),
    ("gradient", "sm_80"): (0, 1472),
    ("gradient", "sm_90"): (352, 4068),
    ("gradient", "sm_100"): (688, 2848),
    ("gradient", "gfx942"): (0, 272),
    ("gradient", "other"): (0, 240),
}


@dataclass(frozen=True)
class Case:
    """A kernel on an architecture, with operands of a dtype; float32 ones exact, or rounded to TF32.

    The variant "plain" has no bias and no softcap, "full" has all there is. "odd" has besides no aligned stride, hidden
    units that are not contiguous, and more of them than fill whole tiles.
    """

    kernel: str
    architecture: str
    dtype: str
    variant: str
    options: dict[str, int]

    def __str__(self) -> str:
        return f"{self.kernel} {self.architecture} {self.dtype} {self.variant}"

    @property
    def product(self) -> str | None:
        """What its matrix products must use, and its operands' type."""
        if self.kernel not in ("state", "gradient"):
            return None
        operand = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}
        if self.architecture == "gfx942":
            return f"mfma {operand.get(self.dtype, 'xf32')}"
        unit = {"float32": "fma", "float64": "mma"}.get(self.dtype, TENSOR_CORE[self.architecture])
        if (unit, self.dtype) == ("tcgen05", "bfloat16"):
            return "tcgen05 f16"  # "kind::f16" is both
        return f"{unit} {operand.get(self.dtype, 'tf32')}"


@dataclass(frozen=True)
class Report:
    """What the compilers made of a case; spills in bytes, where each instruction that moves them counts once."""

    registers: int
    loop_spills: int | None  # in the main loop; None if no loop multiplies
    other_spills: int
    shared: int  # bytes
    product: str


def cases() -> Iterator[Case]:
    """Yield what is compiled of every configuration: all there is, and the commonest dtypes also plain."""
    for row in json.loads(launch.CONFIGURATIONS.read_text()):
        kernel, architecture, options = row["kernel"], row["architecture"], row["options"]
        if architecture == "interpreter":
            continue
        dtypes = list(row["dtypes"])
        if "float32" in dtypes and kernel in ("state", "gradient"):
            dtypes.append("tf32")
        for dtype in dtypes:
            if dtype in ("bfloat16", "float32") and kernel != "merge":
                yield Case(kernel, architecture, dtype, "plain", options)
            yield Case(kernel, architecture, dtype, "full", options)
        if architecture == "sm_90" and "bfloat16" in dtypes:
            yield Case(kernel, architecture, "bfloat16", "odd", options)


def reports(wanted: list[Case]) -> list[Report | str]:
    """Compile in as many processes as there are cores; they never interpret, whatever this one does."""
    with patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        workers = min(len(os.sched_getaffinity(0)), len(wanted))
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            return list(pool.map(attempt, wanted))


def attempt(case: Case) -> Report | str:
    """Return a report, or what a compiler said instead; its exceptions do not travel between processes."""
    try:
        return report(case)
    except Exception as error:
        return f"{case}: {type(error).__name__}: {error}"


def violations(case: Case, report: Report, exact: bool = True) -> list[str]:
    """Return what breaks the budgets; without `exact` leave out what differs between versions of Triton."""
    limit = 1024 * CHIPS[case.architecture][1]
    found = []
    if report.shared > limit:
        found.append(f"{report.shared} bytes of shared memory, the chip has {limit}")
    # Triton 3.6 multiplies float64 without matrix units on sm_100.
    known = exact or case.dtype != "float64"
    if known and case.product and case.product != report.product:
        found.append(f"multiplies by {report.product}, not {case.product}")
    if case.variant == "odd":  # must compile
        return found
    if report.loop_spills is None:
        found.append(f"no loop multiplies by {case.product}")
    elif report.loop_spills:
        found.append(f"{report.loop_spills} bytes spilled in the main loop, none may")
    ceilings = EPILOGUE_SPILLS.get((case.kernel, case.architecture), (0, 0))
    ceiling = ceilings[case.variant == "full"]
    if exact and report.other_spills > ceiling:
        found.append(f"{report.other_spills} bytes spilled elsewhere, at most {ceiling} may")
    return [f"{case}: {what}" for what in found]


def cells(case: Case, report: Report) -> tuple[object, ...]:
    """Return a line of the table."""
    options = case.options
    tile = "x".join(str(size) for name, size in options.items() if name.startswith("BLOCK"))
    return (
        *(case.kernel, case.architecture, case.dtype, case.variant, tile),
        *(options["num_warps"], options.get("num_stages", "-"), report.registers),
        *(f"{report.loop_spills} / {report.other_spills}", f"{report.shared / 1024:.1f}"),
        report.product if case.product else "-",
    )


def pinned() -> bool:
    """Whether this is the Triton of constraints.txt, whose spills are known."""
    constraints = Path(__file__).parents[2] / "constraints.txt"
    return f"triton=={triton.__version__}" in constraints.read_text().splitlines()


def main() -> int:
    """Print the table, then what breaks the budgets."""
    wanted = [case for case in cases() if set(sys.argv[1:]) <= set(str(case).split())]
    form = "{:9}{:7}{:9}{:8}{:>11}{:>6}{:>7}{:>10}{:>12}{:>7}  {}"
    titles = "kernel chip dtype variant tile warps stages registers spills KiB product"
    lines, broken = [form.format(*titles.split())], []
    for case, report in zip(wanted, reports(wanted), strict=True):
        if isinstance(report, Report):
            lines.append(form.format(*cells(case, report)))
            broken += violations(case, report, pinned())
        else:
            broken.append(report)
    lines.append("spills: bytes moved in the main loop / elsewhere; KiB: of shared memory")
    print(*lines, *broken, sep="\n")
    return bool(broken)


def report(case: Case) -> Report:
    """Compile one case and read what came out."""
    kernel = compiled(case)
    text, cubin = kernel.asm.get("ptx") or kernel.asm["amdgcn"], kernel.asm.get("cubin")
    registers, spills, code = of_cubin(cubin) if cubin else of_amdgcn(text)
    in_loop, everywhere = 0, 0
    if spills:
        machine = code()
        everywhere = spilled(machine.lines)
        if case.product:
            loop = main_loop(machine, INSTRUCTIONS[case.product.split()[0]])
            in_loop = None if loop is None else spilled(machine.lines[loop])
    elsewhere = everywhere - (in_loop or 0)
    return Report(registers, in_loop, elsewhere, kernel.metadata.shared, multiplies(text))


def multiplies(text: str) -> str:
    """Return what multiplies matrices in PTX or amdgcn, and the type of its operands."""
    found = set()
    for unit, pattern in UNITS.items():
        for instruction in set(re.findall(rf"{pattern}\S*", text)):
            types = re.findall("|".join(OPERANDS), instruction)
            found.add(f"{unit} {min(types, key=OPERANDS.index)}")
    without = "fma f64" if "fma.rn.f64" in text else "fma f32"
    return " and ".join(sorted(found)) or without


def compiled(case: Case) -> Any:
    """Return Triton's compiled kernel for the first launch of a case."""
    kernels = []

    def compile_only(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        if kernel.__name__ == f"{case.kernel}_kernel" and not kernels:
            kernels.append(kernel.warmup(*args, grid=(programs,), enable_fp_fusion=True, **options))

    tf32 = case.dtype == "tf32"
    dtype = "float32" if tf32 else case.dtype
    table = launch._configurations() | {(case.kernel, case.architecture, dtype): case.options}
    with ExitStack() as stack:
        for module in (forward, backward, softmax):
            stack.enter_context(patch.object(module, "launch", compile_only))
        for module in (backward, softmax, sums):  # nothing to multiply, and torch 2.11 could not
            stack.enter_context(patch.object(module, "addmm_", lambda out, *_, **__: out))
        stack.enter_context(patch.object(forward, "processors", lambda _: 132))
        stack.enter_context(patch.object(launch, "architecture", lambda _: case.architecture))
        stack.enter_context(patch.object(launch, "_configurations", lambda: table))
        triton.runtime.driver.set_active(Offline(case.architecture))
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        with torch.device("meta"):
            run(case.kernel, getattr(torch, dtype), case.variant)
    return kernels[0]


class Offline:
    """A driver of Triton for a chip that is not there."""

    def __init__(self, architecture: str) -> None:
        self._device = list(CHIPS).index(architecture)  # Triton remembers kernels by device
        self._target = CHIPS[architecture][0]

    def get_current_device(self) -> int:
        return self._device

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_stream(self, _: int) -> int:
        return 0


def run(kernel: str, dtype: torch.dtype, variant: str) -> None:
    """Call what launches a kernel, with the shapes of Llama 3 8B, or odd ones."""
    plain = variant == "plain"
    if variant == "odd":
        n, v, d = 333, SHAPES["GPT-2"][0], 1001
        x, weight = torch.empty(d, n, dtype=dtype).T, torch.empty(d, v, dtype=dtype).T
    else:
        n, v, d = 8192, *SHAPES["Llama-3 8B"]
        x, weight = torch.empty(n, d, dtype=dtype), torch.empty(v, d, dtype=dtype)
    bias, softcap = (None, None) if plain else (torch.empty(v, dtype=dtype), 30.0)
    target = torch.empty(n, dtype=torch.int64)
    row = torch.empty(n, dtype=statistics_dtype(dtype))
    some = None if plain else row
    of_inputs = (dtype, dtype, None)
    if kernel == "softmax":
        softmax.linear_cross_entropy(
            x, weight, target, bias, row, some, 0.0, softcap, 1.0, of_inputs
        )
    elif kernel == "gradient":
        gradient = StatsGradient(row, row[:, None], row, some)
        head = (x, weight, target[:, None], bias, row, row, row, softcap, 1.0)
        backward.linear_logit_stats_backward(gradient, row.bool(), *head, of_inputs)
    else:
        forward.linear_logit_stats(x, weight, target[:, None], bias, softcap, 1.0)


@dataclass(frozen=True)
class Code:
    """Machine code: its lines, and its jumps from a line to a line."""

    lines: list[str]
    jumps: list[tuple[int, int]]


def of_cubin(cubin: bytes) -> tuple[int, bool, Callable[[], Code]]:
    """Return the registers of a thread, whether it has a stack, and how to get the code, which takes half a second."""
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump("-res-usage", cubin)).groups()
    return int(registers), int(stack) > 0, lambda: of_sass(cuobjdump("-sass", cubin))


def cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, option, file.name], capture_output=True, text=True, check=True
        ).stdout


def of_sass(text: str) -> Code:
    """Read lines like `/*0a10*/  @!P0 BRA 0x9f0 ;`."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]*);", text)
    line = {int(address, 16): i for i, (address, _) in enumerate(found)}
    lines = [instruction for _, instruction in found]
    targets = [re.search(r"\bBRA\b.* 0x([0-9a-f]+)", instruction) for instruction in lines]
    return Code(lines, [(i, line[int(t[1], 16)]) for i, t in enumerate(targets) if t])


def of_amdgcn(text: str) -> tuple[int, bool, Callable[[], Code]]:
    """Return the registers of a thread, whether it has scratch memory, and how to get the code."""
    registers, scratch = (
        int(re.search(rf"\.{name}: +(\d+)", text)[1])
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.\w+):", line))}
    targets = [re.search(r"\bs_c?branch\w* +(\.\w+)", line) for line in lines]
    jumps = [(i, labels[target[1]]) for i, target in enumerate(targets) if target]
    return registers, scratch > 0, lambda: Code(lines, jumps)


def main_loop(code: Code, product: str) -> slice | None:
    """Return the lines of the innermost loop with the most products.

    A loop is what lies between a jump backwards and its target.
    """
    counts = [bool(re.search(product, line)) for line in code.lines]
    loops = [slice(to, at + 1) for at, to in code.jumps if to <= at and any(counts[to : at + 1])]
    innermost = [
        a
        for a in loops
        if not any(a != b and a.start <= b.start and b.stop <= a.stop for b in loops)
    ]
    return max(innermost, key=lambda loop: sum(counts[loop]), default=None)


def spilled(lines: list[str]) -> int:
    """Return how many bytes the lines move between registers and a thread's own memory."""
    words = {"64": 8, "128": 16, "x2": 8, "x3": 12, "x4": 16}
    pattern = r"\b(?:LDL|STL|scratch_(?:load|store)_dword)[.A-Z]*(64|128|x[234])?"
    found = (re.search(pattern, line) for line in lines)
    return sum(words.get(match[1], 4) for match in found if match)


if __name__ == "__main__":
    sys.exit(main())
