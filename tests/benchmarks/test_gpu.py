"""The GPU benchmark, as far as it goes without a GPU: its cases, what is timed and what is not, and that it says so."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu, gpu_bench, measure, stage, targets
from benchmarks.gate import Gate, exact
from benchmarks.shapes import SHAPES
from benchmarks.step import Case, Step
from torch import Tensor

from levelhead.measure import memory, methods
from levelhead.ops import reference

ROOT = Path(__file__).parents[2]
GROUPS = [cases for shape, cases, _ in gpu_bench.plan() if shape == "Llama-3 8B"]
SOUND = {name: methods.GPU_METHODS[name] for name in ("F.cross_entropy", "levelhead, chunked")}


class WallClock:
    """Stands in for device events, and for the peak of a device's allocator."""

    def seconds(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def extra_bytes(self, steps: Sequence[Step]) -> list[int | str]:
        for one in steps:
            one()
        return [12] * len(steps)


def tiny(cases: list[Case]) -> list[Case]:
    return [replace(case, n=24, d=16, v=96, device="cpu") for case in cases]


def measured(method: methods.Method, cases: list[Case], name: str = "a method") -> list[Any]:
    rows = measure.measure("tiny", tiny(cases), {name: method}, WallClock())
    return [row for row in rows if row["method"] == name]


# The plan and its rows.


def test_the_plan_has_every_shape_mode_and_smoothing_the_targets_speak_of() -> None:
    plan = gpu_bench.plan()
    assert {(s, cases[0].v, cases[0].d) for s, cases, _ in plan} == {
        (shape, *SHAPES[shape]) for shape in gpu_bench.MODELS
    }
    for shape in targets.TARGET_SHAPES:
        for mode in gpu_bench.MODES:
            found = {c.eps for s, cases, _ in plan for c in cases if (s, c.mode) == (shape, mode)}
            assert found == {0.0, 0.1}
    assert all((c.n, c.device) == (8192, "cuda") for _, cases, _ in plan for c in cases)


@pytest.mark.parametrize("cases", GROUPS, ids=lambda cases: f"{cases[0].mode} {cases[0].dtype}")
def test_every_case_gives_full_rows(cases: list[Case]) -> None:
    rows = measure.measure("tiny", tiny(cases), SOUND, WallClock())
    *methods_rows, floor = rows
    assert [(row["method"], row["eps"]) for row in methods_rows] == [
        (name, case.eps) for case in cases for name in SOUND
    ]
    assert floor["method"] == measure.PRODUCTS
    for row in rows:
        assert "failure" not in row
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["of_products"] == row["ms_p50"] / floor["ms_p50"]
        assert measure.line(row)
    weight = 96 * 16 * (4 if cases[0].autocast or cases[0].dtype == "float32" else 2)
    x = 24 * 16 * (4 if cases[0].dtype == "float32" else 2)
    gradients = {"frozen head": x, "forward": 0}.get(cases[0].mode, x + weight)
    for row in methods_rows:
        assert 0 <= row["error"] <= 1
        assert (row["extra_bytes"], row["gradient_bytes"]) == (12, gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("cases", GROUPS, ids=lambda cases: f"{cases[0].mode} {cases[0].dtype}")
def test_a_group_on_a_device(cases: list[Case]) -> None:
    small = [replace(case, n=512, d=128, v=4000) for case in cases]
    names = ("F.cross_entropy", "levelhead, chunked", "levelhead, triton")
    compared = {name: methods.GPU_METHODS[name] for name in names}
    for row in measure.measure("small", small, compared, stage.CudaClock()):
        assert "failure" not in row, row
        assert row["ms_p50"] > 0


# What is not timed.


def test_a_method_that_does_not_run_is_a_row_with_the_reason() -> None:
    def fails(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")

    for row in measured(fails, GROUPS[0]):
        assert row["failure"] == "OutOfMemoryError: CUDA out of memory."
        assert "ms_p50" not in row


@pytest.mark.parametrize("cases", GROUPS, ids=lambda cases: f"{cases[0].mode} {cases[0].dtype}")
def test_a_wrong_result_is_not_timed(cases: list[Case]) -> None:
    def half_smoothed(x: Tensor, w: Tensor, target: Tensor, eps: float, reduction: str) -> Tensor:
        return methods.dense(x, w, target, eps / 2, reduction)

    smoothed, *others = measured(half_smoothed, cases, "levelhead, of a kind")
    assert "times the budget" in smoothed["failure"]
    assert all("failure" not in row for row in others)  # without smoothing it is the same loss


def test_a_peer_has_more_room_but_not_for_a_forgotten_smoothing() -> None:
    def unsmoothed(x: Tensor, w: Tensor, target: Tensor, _: float, reduction: str) -> Tensor:
        return methods.dense(x, w, target, 0.0, reduction)

    assert "times the budget" in measured(unsmoothed, GROUPS[0])[0]["failure"]


def test_nan_is_not_timed() -> None:
    def nan(*args: Any) -> Tensor:
        return methods.dense(*args) * torch.nan

    assert "nan times the budget" in measured(nan, GROUPS[0])[0]["failure"]


def test_a_gradient_that_is_missing_is_not_timed() -> None:
    def frozen(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return methods.dense(x, weight.detach(), *rest)

    assert "zip() argument" in measured(frozen, GROUPS[0])[0]["failure"]


def test_a_case_too_large_for_the_device_is_rows_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def large(_: Step) -> Gate:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure, "Gate", large)
    rows = measure.measure("tiny", tiny(GROUPS[0]), SOUND, WallClock())
    assert len(rows) == 2 * len(SOUND) + 1
    assert all(row["failure"].startswith("out of memory") for row in rows)


def test_the_truth_is_the_reference_in_float64() -> None:
    mine = Step(replace(tiny(GROUPS[0])[0], dtype="float64", n=700), methods.dense)
    weight = torch.full((700,), 1 / 700, dtype=torch.float64)
    loss, (dx, dw, _) = reference.linear_cross_entropy(
        mine.x.detach(), mine.weight.detach(), mine.target, None, weight,
        torch.full_like(weight, 0.1), 0.0, None, 1.0, (torch.float64, torch.float64, None),
    )  # fmt: skip
    torch.testing.assert_close(exact(mine), [loss, dx, dw])


@pytest.mark.parametrize("cases", GROUPS, ids=lambda cases: f"{cases[0].mode} {cases[0].dtype}")
def test_a_truth_of_another_loss_is_seen(cases: list[Case]) -> None:
    def twice(*args: Any) -> Tensor:
        return 2 * methods.dense(*args)

    with pytest.raises(ArithmeticError, match="dense path is off by"):
        Gate(Step(tiny(cases)[0], twice))


# What a run is.


def test_a_run_is_forward_and_backward_from_no_gradient() -> None:
    one = Step(tiny(GROUPS[0])[0], methods.dense)
    one()
    first = [gradient.clone() for gradient in one.gradients()]
    assert len(first) == 2
    one()
    assert all(map(torch.equal, one.gradients(), first)), "the second run added to the first"


def test_extra_memory_is_the_peak_beyond_what_stood_before_and_the_gradients_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A float16 gradient that was kept in float32 until the backward counts whole, beside the one that is left."""
    one = Step(Case(24, 16, 96, dtype="float16"), methods.fused("chunked"))
    one()
    numbers = (24 + 96) * 16

    def reset_peak(_: torch.device) -> int:
        assert not one.gradients(), "gradients of the last run stood there"
        return 1000

    monkeypatch.setattr(memory, "reset_peak", reset_peak)
    monkeypatch.setattr(memory, "peak", lambda _: 1000 + (4 + 2) * numbers)
    assert one.extra_bytes() == 4 * numbers


# Floors.


@pytest.mark.parametrize(("mode", "products"), [*zip(gpu_bench.MODES, (3, 2, 1, 4), strict=True)])
def test_the_datasheet_floor_is_at_least_that_of_the_products(mode: str, products: int) -> None:
    v, d = SHAPES["Llama-3 8B"]
    case = {"n": 8192, "v": v, "d": d, "mode": mode, "dtype": "bfloat16", "autocast": False}
    seconds = gpu_bench.floor_seconds(case, "NVIDIA H200")
    bare = products * 2 * 8192 * v * d / 989e12
    assert seconds is not None
    assert bare <= seconds <= 2 * bare
    assert gpu_bench.floor_seconds(case, "AMD Instinct MI300X") is None


# Without a GPU.


def test_make_says_that_there_is_no_gpu_and_what_to_do() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = ["make", "gpu-test", f"GPU_PYTHON={sys.executable}"]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "cannot run here: torch" in run.stderr
    assert "GPU_PYTHON=" in run.stderr or "CUDA_VISIBLE_DEVICES" in run.stderr
    assert "Traceback" not in run.stderr
    assert "pytest" not in run.stdout


def test_make_says_which_packages_an_interpreter_lacks() -> None:
    command = ["make", "gpu", f"GPU_PYTHON={sys.executable} -I -S"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "lacks torch, triton, pytest, xdist, hypothesis: make gpu GPU_PYTHON=" in run.stderr


@pytest.mark.parametrize("name", gpu.STAGES)
def test_without_a_gpu_the_exit_code_is_2(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert gpu.main([name]) == 2
    assert "finds no GPU: look at nvidia-smi or rocm-smi" in capsys.readouterr().err
