"""Compiled: one graph, no break, no recompile, one loss a step, equal to the eager dense one; each from cold."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from tests.integrations.compile_cases import CASES, Case, Counts, cold_counts, expected

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "compile.json"


QUICK = ("linear_cross_entropy", "llama")


def _is_slow(case):
    long = case.what == "llama" and case.mode == "training, dynamic=True"
    return case.backend == "inductor" or case.what not in QUICK or long


def _named(backend):
    return [
        pytest.param(
            case, id=f"{case.what}, {case.mode}", marks=[pytest.mark.slow] * _is_slow(case)
        )
        for case in CASES
        if case.backend == backend
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("case", _named("aot_eager"))
def test_by_aot_eager(case, cache):
    counts = cold_counts(case, cache)
    assert counts == expected(case, counts)


@pytest.mark.parametrize("case", _named("inductor"))
def test_by_inductor(case, cache):
    counts = cold_counts(case, cache)
    assert counts == expected(case, counts)


@pytest.mark.slow
def test_from_the_first_import(tmp_path):
    case = Case("llama", "training", "aot_eager")
    assert cold_counts(case, str(tmp_path), imports_too=True) == expected(case)


def test_the_committed_counts_are_of_these_cases_and_as_expected():
    rows = json.loads(RESULTS.read_text())["rows"]
    names = Counts.__dataclass_fields__
    for case, row in zip(CASES, rows, strict=True):
        counts = Counts(**{name: row[name] for name in names})
        assert row == asdict(case) | asdict(expected(case, counts))
