"""Write the figures of README and docs/ from results/, and what works from the tests: `python -m benchmarks.render`.

A test fails when they differ.
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import costs, figures, papers
from .shapes import SHAPES

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ARCHITECTURES = ROOT / "tests" / "integrations" / "architectures.json"
Results = dict[str, Any]


def render(page: str) -> str:
    """Return a page with each block between `<!-- name -->` and `<!-- /name -->` made anew."""
    block = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
    return block.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", page)


def _results(name: str) -> Results:
    found: Results = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def _gpu() -> Results | None:
    return _results("gpu") if (RESULTS / "gpu.json").exists() else None


def demonstration(results: Results) -> str:
    """Return the demo's table: means over the seeds."""

    def mean(kind: str, key: str) -> float:
        return statistics.mean(seed[kind][key] for seed in results["seeds"])

    rows: list[tuple[str, str, Callable[[float], str]]] = [
        ("accuracy", "accuracy", "{:.3f}".format),
        ("mean confidence", "confidence", "{:.3f}".format),
        ("ECE", "ece", "{:.3f}".format),
        ("NLL", "nll", "{:.3f}".format),
        ("time per step", "step_seconds", lambda seconds: f"{1e3 * seconds:.0f} ms"),
    ]
    smoothing, peak = results["settings"]["smoothing"], results["loss_peak_bytes"]
    lines = [f"| held-out | hard targets | smoothing {smoothing:g} |", "|---|---:|---:|"]
    for label, key, show in rows:
        lines.append(f"| {label} | {show(mean('dense', key))} | {show(mean('fused', key))} |")
    memory = (f"{peak[kind] / 2**20:.1f} MiB" for kind in ("dense", "fused"))
    lines.append(f"| peak memory of the loss | {' | '.join(memory)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Means over {len(results['seeds'])} seeds, {results['wall_seconds']:.0f} s in all on "
            f"{results['cpu_count']} CPU cores (`benchmarks/results/demo/results.json`).",
        ]
    )


def stages() -> str:
    """Return what the stages of the Triton implementation compute and move, for the head of Llama-3 8B."""
    import torch

    from levelhead.measure import roofline

    shape = n, v, d = 8192, *SHAPES["Llama-3 8B"]
    dtype = torch.bfloat16
    functions = {
        "statistics": roofline.statistics(*shape, dtype, roofline.H200),
        "any gradient of theirs": roofline.statistics_backward(*shape, dtype),
        "the loss with its gradient": roofline.cross_entropy(*shape, dtype),
        "the same, frozen head": roofline.cross_entropy(*shape, dtype, frozen=True),
    }
    lines = [
        "| stage | TFLOP | GB read | GB written | launches |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, steps in functions.items():
        lines.append(f"| **{name}** | | | | |")
        for step, work in steps.items():
            numbers = (work.operations / 1e12, work.read / 1e9, work.written / 1e9)
            cells = " | ".join(f"{number:.2f}" for number in numbers)
            lines.append(f"| {step} | {cells} | {work.launches} |")
    return "\n".join(
        [
            *lines,
            "",
            f"N = {n} tokens, V = {v}, D = {d}, bfloat16, as on an H200; counted from the loops, not measured, by "
            "`measure/roofline.py`, which a test holds to what is launched.",
        ]
    )


def boundary(results: Results) -> str:
    """Return the table of what a call costs layer by layer, and how many operators run."""
    medians = {
        (row["layer"], row["function"], row["direction"]): row["us_p50"] for row in results["rows"]
    }
    functions = list(dict.fromkeys(row["function"] for row in results["rows"]))
    columns = [(name, way) for name in functions for way in ("forward", "forward+backward")]
    lines = [
        "| microseconds | " + " | ".join(f"`{name}`, {way}" for name, way in columns) + " |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    for layer in dict.fromkeys(row["layer"] for row in results["rows"]):
        times = [medians.get((layer, *column)) for column in columns]
        cells = " | ".join("" if time is None else f"{time:.0f}" for time in times)
        lines.append(f"| {layer} | {cells} |")
    problem, machine, count = results["problem"], results["machine"], results["operators"]
    ways = [f"{name} {found['forward']} and {found['backward']}" for name, found in count.items()]
    return "\n".join(
        [
            *lines,
            "",
            f"N = {problem['n']} tokens, D = {problem['d']}, V = {problem['v']}: almost nothing to compute. Medians of "
            f"{results['rounds']} rounds in which all take turns, processor time of one thread; torch "
            f"{machine['torch']}, commit {machine['commit']}. Operators of ours that run forward and backward, by "
            f"reduction: {', '.join(ways)}. `python -m benchmarks.boundary` measures anew "
            "(`benchmarks/results/boundary.json`).",
        ]
    )


def compiled(results: Results) -> str:
    """Return what compiles, with graphs and recompilations, a line a mode."""
    lines = ["| | of | graphs | recompiled | backend |", "|---|---|---:|---:|---|"]
    rows, machine = results["rows"], results["machine"]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        found = [row for row in rows if row["mode"] == mode]
        whats = list(dict.fromkeys(_WHAT.get(row["what"], row["what"]) for row in found))
        by = {b: {r["what"] for r in found if r["backend"] == b} for b in ("aot_eager", "inductor")}
        inductor = [
            _WHAT.get(w, w) for w in dict.fromkeys(r["what"] for r in found) if w in by["inductor"]
        ]
        of_inductor = (
            "both"
            if by["inductor"] == by["aot_eager"]
            else f"aot_eager; inductor: {', '.join(inductor)}"
        )
        backends = of_inductor if inductor else "aot_eager"
        failures = [row["failure"] for row in found if "failure" in row]
        if failures:
            lines.append(
                f"| {mode} | {', '.join(whats)} | {failures[0]} | | {', '.join(backends)} |"
            )
            continue
        if any(row["breaks"] for row in found):
            raise ValueError(f"{mode}: the table has no column for graph breaks")
        unpatched = [row["graphs_unpatched"] for row in found]
        graphs = (
            "as many as unpatched"
            if None not in unpatched and unpatched == [row["graphs"] for row in found]
            else "/".join(sorted({str(row["graphs"]) for row in found}))
        )
        recompiled = "/".join(sorted({str(row["recompiles"]) for row in found}))
        cells = (mode, ", ".join(whats), graphs, recompiled, backends)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"`fullgraph=True`, no graph break in any of {len(rows)} cases, each from a cold process, loss and "
            f"gradients held against dense smoothing; torch {machine['torch']}, transformers "
            f"{machine['transformers']}, commit {machine['commit']} (`benchmarks/results/compile.json`).",
        ]
    )


_WHAT = {
    "llama": "Llama", "gemma2": "Gemma 2", "mixtral": "Mixtral", "gpt2": "GPT-2",
}  # fmt: skip


def corpus() -> str:
    """Return what the pass makes of the spellings of a loss in the tests."""
    from tests.integrations.inductor.corpus import LOSS, SPELLINGS, STATISTICS

    def names(*outcomes: str) -> list[str]:
        return [
            name.replace("_", " ") for name, (_, found) in SPELLINGS.items() if found in outcomes
        ]

    served = {LOSS: "the fused loss", STATISTICS: "statistics, and a formula of them"}
    lines = [f"| of {len(SPELLINGS)} spellings | become | which |", "|---:|---|---|"]
    for outcome, what in served.items():
        lines.append(f"| {len(names(outcome))} | {what} | {', '.join(names(outcome))} |")
    left = names(*{found for _, found in SPELLINGS.values()} - served.keys())
    lines.append(f"| {len(left)} | what they were, with the reason | {', '.join(left)} |")
    return "\n".join(
        [
            *lines,
            "",
            "Each is equal to eager PyTorch in loss and gradients, static and dynamic, whatever becomes of it "
            "(`tests/integrations/inductor/corpus.py`).",
        ]
    )


def works(table: Results) -> str:
    """Return where a patched model was held against an unpatched one: in the sweep, and in several processes."""
    lines = ["| where | held against dense label smoothing | in |", "|---|---|---|"]
    for where, what, test in _architectures(table["architectures"]):
        lines.append(f"| {where} | {what} | `tests/{test}.py` |")
    for where, names, test in _engines():
        lines.append(f"| {where} | {len(names)} ways to set it up | `tests/{test}.py` |")
    return "\n".join(lines)


def engines() -> str:
    """Return every way in which an engine that runs several processes was held against dense label smoothing."""
    lines = ["| engine | ways | in |", "|---|---|---|"]
    for where, names, test in _engines():
        lines.append(f"| {where} | {'; '.join(names)} | `tests/{test}.py` |")
    return "\n".join(lines)


def _architectures(table: Results) -> list[tuple[str, str, str]]:
    groups = {
        "AutoModelForCausalLM": "causal-lm/",
        "AutoModelForSeq2SeqLM": "seq2seq/",
        "AutoModelForImageTextToText": "image-text/",
    }
    lines = []
    for name, group in groups.items():
        outcomes = [row["outcome"] for key, row in table.items() if key.startswith(group)]
        matched, refused, unknown = map(outcomes.count, ("matched", "refused", "not built"))
        what = (
            f"{matched} of {len(outcomes)} architectures; {refused} refused, {unknown} not checked"
        )
        lines.append((f"`{name}`", what, "integrations/test_architectures"))
    return lines


def _engines() -> list[tuple[str, list[str], str]]:
    from tests.distributed import accelerate_worker, test_ddp, test_deepspeed, test_fsdp
    from tests.distributed import test_tensor_parallel as tensor_parallel

    stages: dict[str, list[str]] = {}
    for name in [*test_deepspeed.RUNS, *test_deepspeed.RESUMED, *test_deepspeed.THROUGH_TRAINER]:
        what, _, stage = name.partition("ZeRO-")
        stages.setdefault(what.removesuffix(", "), []).extend(stage)
    deepspeed = [f"{what} ZeRO {'/'.join(on)}" if on else what for what, on in stages.items()]
    prepared = accelerate_worker.SCENARIOS
    kinds = ("DDP", "FSDP2", "ZeRO")
    accelerate = [name for name in prepared if name.startswith(kinds) and "prepared" not in name]
    scenarios = {
        "DDP": (test_ddp.SCENARIOS, "ddp"),
        "FSDP1, FSDP2": (test_fsdp.SCENARIOS, "fsdp"),
        "Accelerate": (accelerate, "accelerate"),
        "DeepSpeed": (deepspeed, "deepspeed"),
        "tensor parallelism": (
            dict.fromkeys([*tensor_parallel.ON_TWO, *tensor_parallel.ON_FOUR]),
            "tensor_parallel",
        ),
    }
    return [
        (where, [name.strip() for name in names], f"distributed/test_{test}")
        for where, (names, test) in scenarios.items()
    ]


BLOCKS: dict[str, Callable[[], str]] = {
    # README
    "headline": lambda: costs.headline(_results("cpu")),
    "benchmark": lambda: costs.benchmark(_results("cpu"), _gpu()),
    "demo": lambda: demonstration(_results("demo/results")),
    "works": lambda: works(json.loads(ARCHITECTURES.read_text())),
    "remedies": lambda: papers.remedies(_results("calibration_study")),
    "reach": lambda: papers.reach(_results("large_vocabulary")),
    "distillation": lambda: papers.distillation(_results("distillation")),
    "aligned": lambda: papers.aligned(_results("calibration_aware")),
    # docs
    "targets": lambda: costs.targets(_results("cpu")),
    "sizes": lambda: costs.sizes(_results("cpu")),
    "figures": lambda: costs.pictures(_results("cpu"), list(figures.FIGURES), "../benchmarks"),
    "training": lambda: costs.training(_results("cpu")),
    "methods": lambda: costs.methods(_results("cpu")),
    "modes": lambda: costs.modes(_results("cpu")),
    "boundary": lambda: boundary(_results("boundary")),
    "stages": stages,
    "compile": lambda: compiled(_results("compile")),
    "corpus": corpus,
    "engines": engines,
    "reach_table": lambda: papers.reach_table(_results("large_vocabulary")),
    "distillation_table": lambda: papers.distillation_table(_results("distillation")),
    "aligned_table": lambda: papers.aligned_table(_results("calibration_aware")),
}

if __name__ == "__main__":
    for path in PAGES:
        path.write_text(render(path.read_text()))
    figures.draw(_results("cpu"), RESULTS / "figures")
