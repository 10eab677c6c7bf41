"""The tuner, as far as it goes without a GPU: candidates, what is left out, and what is written."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu_bench, tune
from benchmarks.stage import CudaClock
from benchmarks.step import Case
from torch import Tensor

from levelhead.ops import reference
from levelhead.ops.sizes import sizes
from levelhead.ops.triton import launch

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = json.loads(launch.CONFIGURATIONS.read_text())


def test_the_file_of_configurations_is_in_the_format_the_tuner_writes() -> None:
    assert launch.CONFIGURATIONS.read_text().rstrip() == tune.text(CONFIGURATIONS).rstrip()


def test_one_row_is_replaced_and_the_others_stay_as_they_were() -> None:
    old = next(r for r in CONFIGURATIONS if (r["kernel"], r["architecture"]) == ("state", "sm_90"))
    new = tune.replaced(CONFIGURATIONS, old, {"BLOCK_N": 1}, "measured")
    index = CONFIGURATIONS.index(old)
    assert new[index] == old | {"options": {"BLOCK_N": 1}, "provenance": "measured"}
    assert list(new[index]) == list(old), "the order of the keys is the file's"
    assert new[:index] + new[index + 1 :] == CONFIGURATIONS[:index] + CONFIGURATIONS[index + 1 :]
    assert old in CONFIGURATIONS
    with pytest.raises(ValueError, match="is not in list"):
        tune.replaced(new, old, {}, "")


def test_the_provenance_says_on_what_when_and_by_how_much() -> None:
    ranked = [(21.304, {"BLOCK_N": 1}), (22, {"BLOCK_N": 2}), (30, {"BLOCK_N": 3})]
    machine = {"device": "NVIDIA Test", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc1234"}
    machine["utc"] = "2026-11-21T16:00:00+00:00"
    source = (
        "measured on NVIDIA Test, torch 2.11.0, triton 3.6.0, commit abc1234, 2026-11-21: 21.30 ms"
    )
    assert tune.provenance(machine, ranked) == source + " (runner-up 22.00 ms)"
    assert tune.provenance(machine, ranked[:1]) == source


@pytest.mark.parametrize(
    "row",
    [r for r in CONFIGURATIONS if r["kernel"] in tune.KERNELS and r["architecture"] == "sm_90"],
    ids=lambda row: f"{row['kernel']} {row['dtypes'][0]}",
)
def test_candidates_begin_with_the_pinned_and_differ(row: Any) -> None:
    options = tune.candidates(row)
    assert options[0] == row["options"]
    assert 8 <= len(options) <= 13
    assert len({tuple(o.values()) for o in options}) == len(options)
    assert all(list(o) == list(row["options"]) for o in options)


def test_other_options_hold_as_long_as_they_are_tried() -> None:
    before = launch.configuration("softmax", torch.empty(1))
    with suppress(RuntimeError), tune.pinned("softmax", "interpreter", "float32", {"BLOCK_V": 7}):
        assert launch.configuration("softmax", torch.empty(1)) == {"BLOCK_V": 7}
        raise RuntimeError("a compiler's")
    assert launch.configuration("softmax", torch.empty(1)) == before


@pytest.mark.parametrize("factor", [1.0, 1.05, torch.nan])
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_a_wrong_candidate_is_seen(kernel: str, factor: float) -> None:
    class Computed(tune.Subject):
        """By chunks instead of by the kernel, and off by a factor."""

        def __call__(self, dtype: torch.dtype | None = None) -> Tensor | None:
            if self.kernel == "state":
                return self.stats.logsumexp * factor
            weight = (self.token_weight, self.smoothing)
            tensors = (self.x, self.weight, self.target, None, *weight)
            dtypes = (dtype, None, None)
            _, (dx, *_) = reference.linear_cross_entropy(*tensors, 0.0, None, 1.0, dtypes)
            return dx * factor

    wrong = Computed(kernel, Case(200, 16, 96, dtype="bfloat16")).wrong()
    assert (wrong is None) == (factor == 1)


def test_the_sizes_that_it_varies_are_there() -> None:
    for name, values, mode in tune.SIZES:
        assert getattr(sizes(), name) in values
        assert mode in gpu_bench.MODES


_RANK = """
import json, time
from benchmarks import tune
from benchmarks.step import Case
from levelhead.ops.triton import launch

class Clock:
    def seconds(self, run):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

tune._WIDE = [(16, 16, 4, 2, 4, 1), (3, 16, 4, 2, 4, 1)]
tune._ROWS = [(32, 1), (3, 1)]
tune.ROUNDS = 1
tune._TOO_SLOW = 100
for row in json.loads(launch.CONFIGURATIONS.read_text()):
    if row["architecture"] == "interpreter" and row["kernel"] in tune.KERNELS:
        cases = [Case(9, 6, 23)]
        options = tune.candidates(row)
        firsts = [next(tune.first(row, cases, candidate, Clock())) for candidate in options]
        print(json.dumps([row, tune.turns(row, cases, firsts, Clock()), firsts]))
"""


@pytest.mark.slow
def test_the_tuner_ranks_what_runs_and_leaves_out_what_does_not() -> None:
    """In Triton's interpreter; it refuses blocks of three, as the compiler does."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _RANK],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    if "only 0-dimensional arrays can be converted" in run.stdout:
        pytest.skip("the interpreter of this Triton (3.6) does not run on this NumPy (2.4)")
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert [old["kernel"] for old, _, _ in found] == list(tune.KERNELS)
    for old, ranked, firsts in found:
        times = [ms for ms, _ in ranked]
        assert times == sorted(times)
        assert len(ranked) == 2
        assert old["options"] in [options for _, options in ranked]
        (left_out,) = [first for first in firsts if "left out" in first]
        assert 3 in left_out["options"].values()
        assert "ms" not in left_out


def test_who_is_far_behind_in_its_first_run_gets_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "subjects", lambda *_: [])
    row = {"kernel": "softmax", "architecture": "interpreter"}
    times: list[tuple[int, float]] = [(16, 10.0), (32, 11.9), (64, 12.1)]
    firsts = [{"options": {"BLOCK_V": size}, "ms": ms} for size, ms in times]
    firsts.append({"options": {"BLOCK_V": 3}, "left out": "wrong"})
    ranked = tune.turns(row, [Case(9, 6, 23)], firsts, CudaClock())
    assert [options["BLOCK_V"] for _, options in ranked] == [16, 32]
    assert tune.turns(row, [Case(9, 6, 23)], firsts[3:], CudaClock()) == []
