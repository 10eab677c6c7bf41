"""Write the figures of README and docs/ from results/, and what works from the tests: `python -m benchmarks.render`.

A test fails when they differ.
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
CUSTOM_OP = README.with_name("docs") / "custom_op.md"
ARCHITECTURES = README.with_name("tests") / "integrations" / "architectures.json"
Results = dict[str, Any]
_UNMEASURED = "On a GPU: not yet measured; `make gpu` measures it (`gpu.json` beside it)."


def render(readme: str) -> str:
    """Return the README with each block between `<!-- name -->` and `<!-- /name -->` made anew."""
    files = ("cpu.json", "demo/results.json")
    cpu, demo = (json.loads((RESULTS / name).read_text()) for name in files)
    gpu = RESULTS / "gpu.json"
    return _filled(
        readme,
        {
            "headline": headline(cpu),
            "benchmark": benchmark(cpu, json.loads(gpu.read_text()) if gpu.exists() else None),
            "demo": demonstration(demo),
            "works": works(json.loads(ARCHITECTURES.read_text())),
            "stages": stages(),
            "compile": compiled(json.loads((RESULTS / "compile.json").read_text())),
            "corpus": corpus(),
        },
    )


def render_custom_op(page: str) -> str:
    """Return docs/custom_op.md likewise."""
    return _filled(
        page, {"boundary": boundary(json.loads((RESULTS / "boundary.json").read_text()))}
    )


def _filled(page: str, blocks: dict[str, str]) -> str:
    for name, text in blocks.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not block.search(page):
            raise ValueError(f"the page has no block {name!r}")
        page = block.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
    return page


def headline(results: Results) -> str:
    """Return the sentence with the number."""
    dense, ours = (_row(results, method) for method in ("F.cross_entropy", "levelhead"))
    return (
        "**Label smoothing for language models without the logits in memory: "
        f"{_mebibytes(ours)} MiB where PyTorch needs {_mebibytes(dense)}, "
        f"in {ours['ms_p50'] / dense['ms_p50']:.2f} × its time.**"
    )


def benchmark(results: Results, gpu: Results | None) -> str:
    """Return the table of time and memory on a CPU, a line a method and mode, and what is known of GPUs."""
    lines = [
        "| label smoothing 0.1 | time | against dense | memory beyond gradients |",
        "|---|---:|---:|---:|",
    ]
    for mode in ("forward+backward", "frozen head", "forward"):
        dense = _row(results, "F.cross_entropy", mode)
        lines.append(f"| **{mode}** | | | |")
        for row in results["rows"]:
            if row["eps"] == dense["eps"] and row["mode"] == mode:
                lines.append(_line(row, dense))
    machine, free = results["machine"], _row(results, "levelhead", eps=0.0)
    cost = _row(results, "levelhead")["ms_p50"] / free["ms_p50"] - 1
    return "\n".join(
        [
            *lines,
            "",
            f"N = {dense['n']} tokens, D = {dense['d']}, V = {dense['v']}, {dense['dtype']}; "
            f"{machine['cores']} CPU cores, torch {machine['torch']}, commit {machine['commit']}. "
            f"Medians of paired runs; smoothing itself costs {cost:+.1%}. `make bench` measures anew "
            f"(`benchmarks/results/cpu.json`). {_UNMEASURED if gpu is None else ''}".rstrip(),
            *([] if gpu is None else ["", *accelerated(gpu)]),
        ]
    )


def accelerated(results: Results) -> list[str]:
    """Return the table of forward and backward on a GPU, a line a method, and what is to be said about it."""
    machine, verdicts = results["machine"], results["verdicts"]
    wanted = ("forward+backward", "bfloat16", False)
    rows = [r for r in results["rows"] if (r["mode"], r["dtype"], r["autocast"]) == wanted]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    lines = [
        f"| {machine['device']} | {' | '.join(shapes)} |",
        "|---" + "|---:" * len(shapes) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [
            _cell([row for row in rows if (row["method"], row["shape"]) == (method, shape)])
            for shape in shapes
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    failed = (row for row in rows if "failure" in row)
    failures = dict.fromkeys(f"{row['method']} ({row['failure']})" for row in failed)
    missed = [v for v in verdicts if v["verdict"] != "met"]
    return [
        *lines,
        "",
        f"Forward + backward, N = {rows[0]['n']} tokens, bfloat16, label smoothing 0.1: time and memory beyond the "
        "gradients; * without smoothing. Bare products: the three multiplications and nothing else. "
        f"Torch {machine['torch']}, triton {machine['triton']}, driver {machine['driver']}, commit "
        f"{machine['commit']}; `make gpu` measures anew (`benchmarks/results/gpu.json`).",
        "",
        *([f"Not timed: {'; '.join(failures)}.", ""] if failures else []),
        f"Targets met: {len(verdicts) - len(missed)} of {len(verdicts)}.",
        *("- {shape}: {target}, at most {at_most:g}: {verdict}".format(**v) for v in missed),
    ]


def _cell(rows: list[Results]) -> str:
    """Return time and memory of a method on a shape, with smoothing if it has that."""
    timed = [row for row in rows if "failure" not in row]
    if not timed:
        return "not timed"
    row = max(timed, key=lambda row: row["eps"] or 0)
    memory = f", {_mebibytes(row)} MiB" if "extra_bytes" in row else ""
    return f"{row['ms_p50']:.1f} ms{memory}{'*' if row['eps'] == 0 else ''}"


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

    shape = n, v, d = 8192, 128256, 4096
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


def _row(
    results: Results, method: str, mode: str = "forward+backward", eps: float = 0.1
) -> Results:
    rows = (r for r in results["rows"] if (r["method"], r["mode"], r["eps"]) == (method, mode, eps))
    row: Results = next(rows)
    return row


def _line(row: Results, dense: Results) -> str:
    if "failure" in row:
        return f"| {row['method']} | {row['failure']} | | |"
    ratio = row["ms_p50"] / dense["ms_p50"]
    return (
        f"| {row['method']} | {row['ms_p50'] / 1e3:.2f} s | {ratio:.2f} × | {_mebibytes(row)} MiB |"
    )


def _mebibytes(row: Results) -> str:
    return f"{max(0, row['extra_bytes']) / 2**20:.0f}"


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
    CUSTOM_OP.write_text(render_custom_op(CUSTOM_OP.read_text()))
