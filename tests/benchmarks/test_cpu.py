"""The CPU benchmark at tiny sizes: its plan, its rows, what is not measured, and that it ends in time."""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import __main__ as cpu
from benchmarks import measure, training
from benchmarks.shapes import SHAPES
from benchmarks.step import Case, Step

from levelhead.measure import methods


class HereClock(measure.CpuClock):
    """Times as ever; starts no processes, which take seconds to import torch."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def elsewhere(self, function: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
        self.asked += arguments
        if function is training.peaks:
            return [{64: 2**20, 128: 2**30}, {64: 2**19, 128: 2**20}]
        return [17] * len(arguments)

    def close(self) -> None:
        pass


def without_compiler(group: measure.Group) -> measure.Group:
    shape, cases, compared = group
    return shape, cases, {name: m for name, m in compared.items() if "compile" not in name}


@pytest.fixture(autouse=True)
def _warnings_of_peers() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as main() does
        yield


# The plan.


def test_the_plan_has_both_smoothings_all_modes_both_dtypes_and_two_sweeps() -> None:
    plan = cpu.plan()
    cases = [case for _, group, _ in plan for case in group]
    assert {case.mode for case in cases} == {
        "forward+backward", "frozen head", "forward", methods.STATISTICS,
    }  # fmt: skip
    assert {case.dtype for case in cases} == {"float32", "bfloat16"}
    assert {case.v for s, group, _ in plan for case in group if s == cpu.OVER_VOCABULARY} == {
        *cpu.VOCABULARIES
    }
    assert {case.n for s, group, _ in plan for case in group if s == cpu.OVER_TOKENS} == {
        *cpu.SEQUENCES
    }
    for shape, group, _ in plan:
        for case in group:
            assert SHAPES.get(shape, (case.v, case.d)) == (case.v, case.d)
            assert case.device == "cpu"


def test_every_method_runs_in_the_first_group_smoothed_and_not() -> None:
    _, cases, compared = cpu.plan()[0]
    assert compared == methods.CPU_METHODS
    assert [case.eps for case in cases] == [0.1, 0.0]


def test_the_plan_fits_its_time_at_150_gflops() -> None:
    """By its products: the fewest rounds, a gated run, and two runs for memory, on one core of two each."""
    operations = 0.0
    for _, cases, compared in cpu.plan():
        for case in cases:
            of_mode = {"frozen head": 4, "forward": 2, methods.STATISTICS: 2}.get(case.mode, 6)
            once = of_mode * case.n * case.v * case.d
            operations += once * len(compared) * (measure.FEWEST + 1 + 2)
    assert (
        operations / 150e9 < 0.7 * cpu.SECONDS
    )  # the rest: truths in float64, the compiler, training


# What it writes.


def test_a_run_gives_every_row_and_the_file_of_them(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(cpu, "CpuClock", HereClock)
    monkeypatch.setattr(measure, "MOST", measure.FEWEST)
    groups = [without_compiler(group) for group in cpu.tiny(cpu.plan())]
    trained = training.Training(v=200, d=16, n=16, longest=128)
    results = cpu.run(groups, trained, tmp_path / "cpu.json", 60)
    assert json.loads((tmp_path / "cpu.json").read_text()) == results
    rows = results["rows"]
    assert len(rows) == sum(len(cases) * len(compared) + 1 for _, cases, compared in groups)
    for row in rows:
        if row["method"].startswith("levelhead"):
            assert "failure" not in row
        if "failure" in row:
            assert row["method"].split(",")[0] in ("TRL", "Liger-Kernel", "F.linear_cross_entropy")
            continue
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert len(row["ms"]) == measure.FEWEST
        assert row["of_products"] > 0
        if row["method"] != measure.PRODUCTS:
            assert row["extra_bytes"] == 17
            assert row["loss_error"] < 0.1
    assert len(results["verdicts"]) > len(groups)
    dense, ours = results["training"]
    assert (dense["longest_that_fits"], ours["longest_that_fits"]) == (64, 128)
    assert ours["tokens_per_second"] == pytest.approx(1e3 * 16 / ours["ms_p50"])
    assert {"packages", "commit", "utc", "processor", "seconds"} <= results["machine"].keys()


def test_a_row_is_a_line(tmp_path: Path) -> None:
    measure.write(tmp_path / "x.json", {"machine": {"a": 1}, "rows": [{"ms": [1.235]}, {"b": 2}]})
    text = (tmp_path / "x.json").read_text()
    assert '{"ms": [1.235]},\n{"b": 2}\n' in text
    assert json.loads(text) == {"machine": {"a": 1}, "rows": [{"ms": [1.235]}, {"b": 2}]}


def test_what_the_time_does_not_hold_is_rows_that_say_so(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(cpu, "CpuClock", HereClock)
    monkeypatch.setattr(training, "measure", lambda *_: [])
    groups = cpu.tiny(cpu.plan())[:2]
    rows = cpu.run(groups, training.Training(), tmp_path / "cpu.json", 0)["rows"]
    assert len(rows) == sum(len(cases) * len(compared) + 1 for _, cases, compared in groups)
    assert {row["failure"] for row in rows} == {"not measured: the 0 seconds were over"}


def test_tiny_sizes_do_not_overwrite_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cpu.main(["--tiny"])
    assert stopped.value.code == 2
    assert "give it another --output" in capsys.readouterr().err


# Rounds and memory.


def test_rounds_stop_when_their_time_is_over_but_not_before_the_fewest(monkeypatch: Any) -> None:
    monkeypatch.setattr(measure, "ROUNDS_SECONDS", 0)
    times = measure.take_turns([{}, {"failure": ""}], [lambda: None] * 2, HereClock())
    assert [len(seconds) for seconds in times] == [measure.FEWEST, 0]


def test_what_has_no_peak_is_not_timed() -> None:
    class Clock(HereClock):
        def extra_bytes(self, steps: Sequence[Step]) -> list[int | str]:
            return ["RuntimeError: can't allocate memory"] * len(steps)

    rows = measure.measure("tiny", [Case(8, 4, 16)], {"a": methods.dense}, Clock())
    assert rows[0]["failure"] == "RuntimeError: can't allocate memory"
    assert "ms" not in rows[0]
    assert rows[1]["method"] == measure.PRODUCTS
    assert "ms" in rows[1]


def _ends(with_abort: bool) -> int:
    if with_abort:
        os.abort()
    return 1


@pytest.mark.slow
def test_a_process_that_was_killed_is_a_reason_and_harms_no_other() -> None:
    """As the kernel kills what takes too much memory; then peaks, of dense logits and of ours."""
    clock = measure.CpuClock()
    case = Case(512, 8, 40000)
    steps = [Step(case, methods.CPU_METHODS[name]) for name in (methods.DENSE, methods.OURS)]
    try:
        killed, other = clock.elsewhere(_ends, [(True,), (False,)])
        assert (killed, other) == ("killed, as what takes too much memory is", 1)
        dense, ours = clock.extra_bytes(steps)
    finally:
        clock.close()
    logits = case.n * case.v * 4
    assert 2 * logits <= dense <= 4.5 * logits
    assert 18 * 2**20 <= ours <= 24 * 2**20  # chunks of 128 tokens


def test_a_case_without_memory_for_its_tensors_is_rows_with_the_reason(monkeypatch: Any) -> None:
    def large(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate much")

    monkeypatch.setattr(measure, "Gate", large)
    rows = measure.measure("tiny", [Case(8, 4, 16)], {"a": methods.dense}, HereClock())
    assert [row["failure"].split(" for ")[0] for row in rows] == ["out of memory"] * 2


# Methods.


@pytest.mark.parametrize(
    "name", sorted(set(methods.CPU_STATISTICS) - {"log_softmax, torch.compile"})
)
def test_statistics_agree(name: str) -> None:
    step = Step(Case(9, 4, 30, mode=methods.STATISTICS), methods.CPU_STATISTICS[name])
    assert not step.x.requires_grad
    log_p = (step.x.double() @ step.weight.double().T).log_softmax(1)
    nll = -log_p.gather(1, step.target[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(1)
    torch.testing.assert_close(step().double(), torch.stack([nll, entropy]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "eps", "why"),
    [
        ("TRL, fused head", 0.1, "NotImplementedError: has no label smoothing"),
        ("Liger-Kernel", 0.0, "NotImplementedError: needs a GPU"),
    ],
)
def test_a_peer_that_cannot_is_a_row_with_the_reason(name: str, eps: float, why: str) -> None:
    rows = measure.measure(
        "tiny", [Case(8, 4, 16, eps)], {name: methods.CPU_METHODS[name]}, HereClock()
    )
    assert rows[0]["failure"] == why


def test_what_a_method_warns_of_is_in_its_row() -> None:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("needs torch >= 2.13")
    method = {"chunked": methods.CPU_METHODS[methods.CHUNKED]}
    smoothed, plain, _ = measure.measure(
        "tiny", [Case(8, 4, 16, 0.1), Case(8, 4, 16, 0.0)], method, HereClock()
    )
    assert "label_smoothing == 0" in smoothed["warns"]
    assert "warns" not in plain


# Whole models.


def test_a_patched_model_that_differs_is_not_timed(monkeypatch: Any) -> None:
    monkeypatch.setattr(
        training.levelhead,
        "patch_model",
        _patch_with(training.levelhead.patch_model, smoothing=0.2),
    )
    trained = training.Training(v=200, d=16, n=16, longest=128)
    dense, ours = training.measure(trained, HereClock())
    assert ours["failure"].startswith("AssertionError")
    assert "tokens_per_second" not in ours
    assert "tokens_per_second" in dense


def _patch_with(patch: Any, **options: Any) -> Any:
    return lambda model, **_: patch(model, **options)


def test_lengths_are_doubled_until_they_are_beyond_the_limit(monkeypatch: Any) -> None:
    monkeypatch.setattr(training.TrainingStep, "peak_bytes", lambda _, n: 1000 * n)
    trained = training.Training(v=200, d=16, n=32, longest=4096, limit_bytes=300_000)
    assert training.peaks(trained, training.OURS) == {n: 1000 * n for n in (64, 128, 256, 512)}
