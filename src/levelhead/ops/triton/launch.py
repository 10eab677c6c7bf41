"""How kernels are launched: configurations pinned per architecture and dtype, nothing timed or chosen at run time.

A row of ``configurations.json`` says for which kernel, architecture and dtypes it holds, and its provenance: what it
was measured on, with which versions and commit, or "derived" with the reason. `make gpu-tune` measures
and writes them.
"""

import json
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch

CONFIGURATIONS = Path(__file__).with_name("configurations.json")


def configuration(kernel: str, input: torch.Tensor) -> dict[str, int]:
    """Return a kernel's block sizes, warps and pipeline stages for the device and dtype of ``input``."""
    dtype = str(input.dtype).removeprefix("torch.")
    return dict(_configurations()[kernel, architecture(input.device), dtype])


@cache
def architecture(device: torch.device) -> str:
    """Return the name that configurations have for a device's architecture."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(device)
        name = f"sm_{major}{minor}"
    known = {arch for _, arch, _ in _configurations()}
    return name if name in known else "other"


@cache
def processors(device: torch.device) -> int:
    """Return how many programs of a large tile run at once."""
    if device.type == "cpu":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def precision(dtype: torch.dtype) -> str:
    """Return how float32 operands are multiplied: as torch is set to, exactly unless the user allowed TF32."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Run ``programs`` programs of a kernel, maybe none, on the device of its first argument."""
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if programs:
            # Said, because triton's own default changes with 3.10, and 3.9 warns of it.
            kernel[(programs,)](*args, enable_fp_fusion=True, **options)


def dense(vector: torch.Tensor | None) -> torch.Tensor | None:
    """Return the vector without gaps between its elements, as kernels read it; None if it is None."""
    return None if vector is None else vector.contiguous()


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


@cache
def _configurations() -> dict[tuple[str, str, str], dict[str, int]]:
    rows = json.loads(CONFIGURATIONS.read_text())
    return {
        (row["kernel"], row["architecture"], dtype): row["options"]
        for row in rows
        for dtype in row["dtypes"]
    }
