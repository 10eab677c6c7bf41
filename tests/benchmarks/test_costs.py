"""What is made of the rows of the CPU benchmark: tables, verdicts, figures."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import costs, figures, measure, render, targets
from benchmarks.shapes import OVER_TOKENS, OVER_VOCABULARY

from levelhead.measure import methods

MIB = 2**20


def row(method: str, eps: float | None, ms: float | None = None, **columns: Any) -> Any:
    case = {"shape": "SmolLM2 135M", "n": 512, "d": 768, "v": 50257, "mode": "forward+backward"}
    case |= {"dtype": "float32", "method": method, "eps": eps}
    if ms is None:
        return case | {"failure": "NotImplementedError: has no label smoothing"} | columns
    times = {"ms_p20": ms - 1, "ms_p50": ms, "ms_p80": ms + 1, "ms": [ms, ms, ms]}
    errors = {"loss_error": 1e-8, "gradient_error": 2e-7} if method != measure.PRODUCTS else {}
    return case | times | errors | {"of_products": ms / 800} | columns


def rows() -> list[Any]:
    return [
        row(methods.DENSE, 0.1, 1000, extra_bytes=320 * MIB),
        row("TRL, fused head", 0.1),
        row(methods.OURS, 0.1, 1100, extra_bytes=32 * MIB),
        row(methods.DENSE, 0.0, 900, extra_bytes=310 * MIB),
        row("TRL, fused head", 0.0, 1800, extra_bytes=64 * MIB, warns="slow. Got it"),
        row(methods.OURS, 0.0, 1000, extra_bytes=32 * MIB),
        row(measure.PRODUCTS, None, 800),
    ]


def results(found: list[Any]) -> Any:
    machine = {"cores": 2, "torch": "2.13.0", "commit": "abc1234"}
    verdicts = targets.cpu_verdicts(found)
    return {"machine": machine, "rows": found, "training": [], "verdicts": verdicts}


# Verdicts.


def test_a_target_is_met_or_missed_by_how_much_at_every_size() -> None:
    larger = [found | {"n": 1024} for found in rows()]
    larger[2]["extra_bytes"] = 64 * MIB
    verdicts = targets.cpu_verdicts([*rows(), *larger])
    assert [(v["n"], round(v["value"], 3), v["verdict"]) for v in verdicts] == [
        (512, 1.1, "missed by 0.05"),
        (512, 0.1, "met"),
        (512, 1.1, "missed by 0.09"),
        (1024, 1.1, "missed by 0.05"),
        (1024, 0.2, "missed by 0.075"),
        (1024, 1.1, "missed by 0.09"),
    ]
    assert "N = 1024, D = 768, V = 50257, float32: extra memory" in targets.said(verdicts[4])


def test_times_are_compared_within_a_round() -> None:
    ours, dense = row(methods.OURS, 0.1, 1000), row(methods.DENSE, 0.1, 1000)
    ours["ms"], dense["ms"] = [100, 2000, 900], [100, 2000, 1000]  # a bad round was bad for both
    assert targets.ratio(ours, dense) == 1
    ours["ms"], dense["ms"] = [2, 2, 3], [1, 4, 2]
    assert targets.ratio(ours, dense) == 1.5


def test_a_method_that_was_not_timed_is_no_verdict_but_a_reason() -> None:
    found = rows()
    found[2] = row(methods.OURS, 0.1, failure="out of memory")
    assert {v["verdict"] for v in targets.cpu_verdicts(found)} == {
        "not measured: levelhead: out of memory"
    }


# Tables.


def test_the_readme_has_every_method_and_the_targets() -> None:
    text = costs.benchmark(results(rows()), None)
    assert "| F.cross_entropy | 1.00 s | 1.00 × | 320 MiB |" in text
    assert "| TRL, fused head* | 1.80 s | 2.00 × | 64 MiB |" in text, "held against ε = 0"
    assert "| levelhead | 1.10 s | 1.10 × | 32 MiB |" in text
    assert "* Without smoothing" in text
    assert "at most 1.05: met at 0 of 1 sizes; the worst is 1.1, SmolLM2 135M, N = 512" in text
    assert measure.PRODUCTS not in text


def test_a_failure_is_in_the_table() -> None:
    text = costs.benchmark(results([*rows(), row("Liger-Kernel", 0.1)]), None)
    assert "| Liger-Kernel | has no label smoothing | | |" in text


def test_the_page_has_both_smoothings_errors_and_what_was_said() -> None:
    text = costs.methods(results(rows()))
    line = "| levelhead | 0.1 | 1.10 s | 1.099 to 1.101 s | 1.38 | 32 MiB | 1.0e-08 | 2.0e-07 |"
    assert line in text
    assert "| TRL, fused head | 0.1 | has no label smoothing |" in text
    assert "| bare products |  | 0.80 s | 0.799 to 0.801 s | 1.00 |  |  |  |" in text
    assert "TRL, fused head, smoothed, warns: slow." in text


def test_other_modes_have_tables_and_sweeps_have_lines() -> None:
    frozen = [found | {"mode": "frozen head"} for found in rows()]
    sweep = [found | {"shape": OVER_TOKENS, "n": 64} for found in rows()]
    every = results([*rows(), *frozen, *sweep])
    assert costs.modes(every).count("**") == 2
    assert "**frozen head: SmolLM2 135M, N = 512" in costs.modes(every)
    assert "| N = 64, D = 768, V = 50257, float32 | 1.00 s | 1.10 s | 0.80 s |" in costs.sizes(
        every
    )
    assert costs.sizes(every).count("\n") == 3
    assert costs.targets(every).count("missed") == 4


def test_whole_models_are_compared() -> None:
    one = {"limit_bytes": 256 * MIB, "longest": 4096, "layers": 2, "d": 256, "v": 128256, "n": 1024}
    one |= {"dtype": "float32", "eps": 0.1}
    dense = one | {"method": "dense", "tokens_per_second": 500.4, "longest_that_fits": 128}
    ours = one | {"method": "ours", "tokens_per_second": 612.0, "longest_that_fits": 4096}
    text = costs.training(results(rows()) | {"training": [dense, ours]})
    assert "| dense | 500 | 128 |" in text
    assert "| ours | 612 | 4096 or more |" in text
    failed = one | {"method": "ours", "failure": "AssertionError: off"}
    text = costs.training(results(rows()) | {"training": [dense, failed]})
    assert "| ours | AssertionError: off |  |" in text


# Figures.


def swept() -> Any:
    vocabulary = [
        found | {"shape": OVER_VOCABULARY, "v": v} for v in (1000, 4000) for found in rows()
    ]
    tokens = [found | {"shape": OVER_TOKENS, "n": n} for n in (64, 128) for found in rows()]
    tokens = [found for found in tokens if found["method"] in (methods.DENSE, methods.OURS)]
    narrow = [found | {"dtype": "bfloat16"} for found in rows()]
    return results([*rows(), *narrow, *vocabulary, *tokens])


def test_figures_show_the_numbers_of_the_rows() -> None:
    found = swept()["rows"]
    assert figures.memory(found) == {
        methods.DENSE: [(1000, 320), (4000, 320)],
        methods.OURS: [(1000, 32), (4000, 32)],
    }
    time = figures.time(found)
    assert [n for n, _ in time[methods.DENSE]] == [64, 128]
    assert figures.error(found).keys() == {
        f"{method}, {dtype}"
        for method in (methods.DENSE, methods.OURS, "TRL, fused head, ε = 0")
        for dtype in ("float32", "bfloat16")
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning:PIL")
def test_a_figure_knows_what_it_was_drawn_from(tmp_path: Path) -> None:
    every = swept()
    paths = figures.draw(every, tmp_path / "figures")
    assert [path.stem for path in paths] == list(figures.FIGURES)
    for path in paths:
        numbers = figures.FIGURES[path.stem][0](every["rows"])
        assert figures.drawn_from(path) == figures.digest(numbers)
    smoothed = [found for found in every["rows"] if found["shape"] == OVER_TOKENS and found["eps"]]
    smoothed[0]["ms_p50"] += 1
    assert figures.drawn_from(paths[1]) != figures.digest(figures.time(every["rows"]))


def test_without_numbers_there_is_no_figure(tmp_path: Path) -> None:
    every = results(rows()[:0])
    assert figures.draw(every, tmp_path / "figures") == []
    assert costs.pictures(every, ["memory", "time"], "x") == costs._UNMEASURED


def test_the_committed_figures_are_those_of_the_committed_results() -> None:
    found = json.loads((render.RESULTS / "cpu.json").read_text())["rows"]
    for name, (numbers, *_) in figures.FIGURES.items():
        path, series = render.RESULTS / "figures" / f"{name}.png", numbers(found)
        drawn = figures.drawn_from(path) if path.exists() else None
        assert drawn == (figures.digest(series) if series else None), (
            "run: python -m benchmarks.render"
        )
