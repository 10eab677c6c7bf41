"""Times and peak memory on a GPU, and the targets they are held to: the stage `bench` of `make gpu`.

A peer whose package is not there is a row that says so. How it measures: measure.py.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from levelhead.measure.methods import COMPILED, GPU_METHODS

from .measure import Group, Row, measure
from .shapes import SHAPES
from .stage import Stage, Task
from .step import Case
from .targets import OURS, TARGET_SHAPES, said, verdicts

MODELS = ("Llama-3 8B", "Gemma-2 2B", "Qwen2.5 0.5B", "GPT-2")
MODES = ("forward+backward", "frozen head", "forward", "reduction none")
TOKENS = 8192


def plan() -> list[Group]:
    """Return what is measured together: first the shapes that have targets, last what takes longest."""

    def group(
        shape: str, mode: str = MODES[0], dtype: str = "bfloat16", autocast: bool = False
    ) -> Group:
        v, d = SHAPES[shape]
        narrow = dtype == "bfloat16" and not autocast
        both = narrow and (shape in TARGET_SHAPES or mode == MODES[0])
        smoothings = (0.1, 0.0) if both else (0.1,)
        cases = [Case(TOKENS, d, v, eps, mode, dtype, autocast, "cuda") for eps in smoothings]
        return shape, cases, GPU_METHODS

    known = sorted(product(MODES, MODELS), key=lambda pair: pair[1] not in TARGET_SHAPES)
    groups = [group(shape, mode) for mode, shape in known]
    return [*groups, group("Llama-3 8B", autocast=True), group("Llama-3 8B", dtype="float32")]


def floor_seconds(row: Row, device: str) -> float | None:
    """Return the least time of Levelhead's stages by the datasheet of the device, None if there is none."""
    from levelhead.measure import roofline

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


def rows(stage: Stage, group: Group) -> Iterator[Row]:
    """Measure a group; all its methods take turns."""
    shape, cases, methods = group
    if stage.tiny:  # compilers would take minutes, and are no part of this code
        methods = {name: methods[name] for name in methods if name.startswith(("F.", "levelhead"))}
        methods.pop(COMPILED)
    for row in measure(shape, [stage.fit(case) for case in cases], methods, stage.clock):
        if row["method"] == OURS and "ms_p50" in row:
            floor = floor_seconds(row, stage.machine["device"])
            row["datasheet_floor_ms"] = 1e3 * floor if floor else None
        yield row


def tasks(stage: Stage) -> list[Task]:
    """Return a task for every group."""

    def name(shape: str, cases: list[Case]) -> str:
        autocast = ", autocast" if cases[0].autocast else ""
        return f"{shape}, {cases[0].mode}, {cases[0].dtype}{autocast}"

    groups = [group for group in plan() if group[0] in stage.some(MODELS)]
    return [(name(*group[:2]), partial(rows, stage, group)) for group in groups]


def run(stage: Stage) -> int:
    """Measure every group and print the verdicts."""
    stage.summary = lambda rows: {"verdicts": verdicts(rows)}
    code = stage.run(tasks(stage))
    for verdict in verdicts(stage.rows):
        print(said(verdict))
    print(f"with {stage.path} in benchmarks/results: python -m benchmarks.render")
    return code
