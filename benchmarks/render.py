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
README = Path(__file__).parents[1] / "README.md"
CUSTOM_OP = README.with_name("docs") / "custom_op.md"
BENCHMARKS = CUSTOM_OP.with_name("benchmarks.md")
ARCHITECTURES = README.with_name("tests") / "integrations" / "architectures.json"
Results = dict[str, Any]


def render(readme: str) -> str:
    """Return the README with each block between `<!-- name -->` and `<!-- /name -->` made anew."""
    files = ("cpu.json", "demo/results.json")
    cpu, demo = (json.loads((RESULTS / name).read_text()) for name in files)
    gpu = RESULTS / "gpu.json"
    return _filled(
        readme,
        {
            "headline": costs.headline(cpu),
            "benchmark": costs.benchmark(
                cpu, json.loads(gpu.read_text()) if gpu.exists() else None
            ),
            "demo": demonstration(demo),
            "works": works(json.loads(ARCHITECTURES.read_text())),
            "stages": stages(),
            "compile": compiled(json.loads((RESULTS / "compile.json").read_text())),
            "corpus": corpus(),
            "remedies": papers.remedies(_results("calibration_study")),
            "reach": papers.reach(_results("large_vocabulary")),
            "distillation": papers.distillation(_results("distillation")),
            "aligned": papers.aligned(_results("calibration_aware")),
        },
    )


def _results(name: str) -> Results:
    found: Results = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def render_custom_op(page: str) -> str:
    """Return docs/custom_op.md likewise."""
    return _filled(
        page, {"boundary": boundary(json.loads((RESULTS / "boundary.json").read_text()))}
    )


def render_benchmarks(page: str) -> str:
    """Return docs/benchmarks.md likewise."""
    cpu = json.loads((RESULTS / "cpu.json").read_text())
    return _filled(
        page,
        {
            "targets": costs.targets(cpu),
            "sizes": costs.sizes(cpu),
            "figures": costs.pictures(cpu, list(figures.FIGURES), "../benchmarks"),
            "training": costs.training(cpu),
            "methods": costs.methods(cpu),
            "modes": costs.modes(cpu),
        },
    )


def _filled(page: str, blocks: dict[str, str]) -> str:
    for name, text in blocks.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not block.search(page):
            raise ValueError(f"the page has no block {name!r}")
        page = block.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
    return page


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

    from levelhead.ops.triton import roofline

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
            "`ops/triton/roofline.py`, which a test holds to what is launched.",
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
    rows = [*_architectures(table["architectures"]), *_engines()]
    for where, what, test in rows:
        lines.append(f"| {where} | {what} | `tests/{test}.py` |")
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


def _engines() -> list[tuple[str, str, str]]:
    from tests.distributed import accelerate_worker, test_ddp, test_deepspeed, test_fsdp
    from tests.distributed import test_tensor_parallel as tensor_parallel

    stages: dict[str, list[str]] = {}
    for name in [*test_deepspeed.RUNS, *test_deepspeed.RESUMED, *test_deepspeed.THROUGH_TRAINER]:
        what, _, stage = name.partition("ZeRO-")
        stages.setdefault(what.removesuffix(", "), []).extend(stage)
    deepspeed = [f"{what} ZeRO {'/'.join(on)}" if on else what for what, on in stages.items()]
    prepared = [*accelerate_worker.SCENARIOS, *accelerate_worker.DEEPSPEED]
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
        (where, "; ".join(names).strip(), f"distributed/test_{test}")
        for where, (names, test) in scenarios.items()
    ]


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
    CUSTOM_OP.write_text(render_custom_op(CUSTOM_OP.read_text()))
    BENCHMARKS.write_text(render_benchmarks(BENCHMARKS.read_text()))
    figures.draw(json.loads((RESULTS / "cpu.json").read_text()), RESULTS / "figures")
