"""What is made of the rows of a GPU benchmark: verdicts, and the README's table."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import costs, measure, render, targets

ROOT = Path(__file__).parents[2]
MACHINE = {
    "device": "NVIDIA Test",
    "driver": "1.2",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "commit": "abc1234",
    "utc": "2026-11-21T16:00:00+00:00",
}


def row(method: str, eps: float | None, ms: float, **columns: Any) -> Any:
    case = {"shape": "Llama-3 8B", "mode": "forward+backward", "dtype": "bfloat16"}
    return {**case, "autocast": False, "method": method, "eps": eps, "ms_p50": ms, **columns}


def rows() -> list[Any]:
    ours = {"extra_bytes": 40, "gradient_bytes": 1000}
    cut = row("Cut Cross-Entropy, exact", 0.0, 0)
    del cut["ms_p50"]
    return [
        row("levelhead, triton", 0.1, 110, **ours),
        row("levelhead, triton", 0.0, 100, **ours),
        row("levelhead, triton", 0.1, 1, **ours) | {"autocast": True},
        row("levelhead, triton", 0.1, 1, **ours) | {"mode": "frozen head"},
        row("Liger-Kernel", 0.1, 220),
        row("F.cross_entropy, torch.compile", 0.1, 100),
        row(measure.PRODUCTS, None, 100),
        cut | {"failure": "ModuleNotFoundError: No module named 'cut_cross_entropy'"},
    ]


def test_verdicts_say_met_or_missed_by_how_much_or_why_not_measured() -> None:
    found = [v for v in targets.verdicts(rows()) if v["shape"] == "Llama-3 8B"]
    assert [(v["value"], v["verdict"]) for v in found] == [
        (1.1, "met"),
        (0.5, "met"),
        (
            None,
            "not measured: Cut Cross-Entropy, exact: "
            "ModuleNotFoundError: No module named 'cut_cross_entropy'",
        ),
        (1.1, "missed by 0.1"),
        (0.04, "met"),
        (1.1, "missed by 0.09"),
    ]


def test_verdicts_on_a_shape_without_rows_are_not_measured() -> None:
    found = [v for v in targets.verdicts(rows()) if v["shape"] == "Gemma-2 2B"]
    assert {v["verdict"] for v in found} == {"not measured: levelhead, triton: no such row"}


def test_memory_beyond_the_bound_is_missed() -> None:
    changed = rows()
    changed[0]["extra_bytes"] = 60
    assert targets.verdicts(changed)[4]["verdict"] == "missed by 0.01"


def cpu() -> Any:
    return json.loads((render.RESULTS / "cpu.json").read_text())


def test_without_results_the_readme_says_not_yet_measured() -> None:
    text = costs.benchmark(cpu(), None)
    assert "On a GPU: not yet measured; `make gpu` measures it (`gpu.json` beside it)." in text


def test_with_results_the_readme_has_their_table() -> None:
    sized = [row | {"n": 8192, "extra_bytes": 3 * 2**20} for row in rows()]
    results = {"machine": MACHINE, "rows": sized, "verdicts": targets.verdicts(sized)}
    text = costs.benchmark(cpu(), results)
    assert "not yet measured" not in text
    assert (
        "| NVIDIA Test | Llama-3 8B |\n|---|---:|\n| levelhead, triton | 110.0 ms, 3 MiB |" in text
    )
    assert "| Cut Cross-Entropy, exact | not timed |" in text
    assert "Not timed: Cut Cross-Entropy, exact (ModuleNotFoundError: No module named" in text
    assert "- Llama-3 8B: time, without smoothing = 1, at most 1.01: missed by 0.09" in text
    assert f"driver {MACHINE['driver']}, commit {MACHINE['commit']}" in text


def test_the_committed_results_are_the_ones_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (ROOT / "README.md").read_text()
    for path in [*render.RESULTS.glob("*.json"), render.RESULTS / "demo/results.json"]:
        copy = tmp_path / path.relative_to(render.RESULTS)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "gpu.json").unlink(missing_ok=True)
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    assert "On a GPU: not yet measured" in render.render(readme)
    sized = [row | {"n": 8192} for row in rows()]
    results = {"machine": MACHINE, "rows": sized, "verdicts": targets.verdicts(sized)}
    (tmp_path / "gpu.json").write_text(json.dumps(results))
    assert "| NVIDIA Test |" in render.render(readme)
