"""The tables of time and memory in README and docs/benchmarks.md, made of the rows that measure.py writes."""

from typing import Any

from levelhead.measure.methods import DENSE, OURS

from . import figures
from .measure import PRODUCTS
from .shapes import OVER_TOKENS, OVER_VOCABULARY
from .targets import ratio

Row = dict[str, Any]
Results = dict[str, Any]
MODES = ("forward+backward", "frozen head", "forward", "eval statistics")
_UNMEASURED = "Not yet measured; `make bench` measures it."
_UNMEASURED_GPU = "On a GPU: not yet measured; `make gpu` measures it (`gpu.json` beside it)."


def headline(results: Results) -> str:
    """Return the sentence with the number."""
    dense, ours = (_first(results, method) for method in (DENSE, OURS))
    return (
        "**Label smoothing for language models without the logits in memory: "
        f"{_mebibytes(ours)} MiB where PyTorch needs {_mebibytes(dense)}, "
        f"in {ratio(ours, dense):.2f} × its time.**"
    )


def benchmark(results: Results, gpu: Results | None) -> str:
    """Return the README's table: a training step by every method on a CPU, and what is known of GPUs."""
    dense = _first(results, DENSE)
    group = _group(results["rows"], dense)
    lines = [
        "| forward + backward, label smoothing 0.1 | time | dense = 1 | memory beyond gradients |",
        "|---|---:|---:|---:|",
    ]
    for method in _methods(group):
        row = _smoothed(group, method)
        if "failure" in row:
            lines.append(f"| {method} | {_failure(row)} | | |")
            continue
        # Against the dense loss with the same smoothing.
        against = next(r for r in group if (r["method"], r["eps"]) == (DENSE, row["eps"]))
        star = "*" if row["eps"] == 0 else ""
        lines.append(
            f"| {method}{star} | {_seconds(row)} | {ratio(row, against):.2f} × | {_mebibytes(row)} MiB |"
        )
    machine = results["machine"]
    starred = " * Without smoothing, which it does not have." if "*" in "".join(lines[2:]) else ""
    notes = [
        f"{_size(dense)}; {machine['cores']} CPU cores, torch {machine['torch']}, commit "
        f"{machine['commit']}. Medians of paired runs.{starred} `make bench` measures anew "
        f"(`benchmarks/results/cpu.json`). {_UNMEASURED_GPU if gpu is None else ''}".rstrip(),
        *summary(results["verdicts"]),
        *([pictures(results, ["memory"], "benchmarks")] if figures.memory(results["rows"]) else []),
        "Every method, mode and size: [benchmarks](docs/benchmarks.md).",
    ]
    text = "\n".join([*lines, "", "\n\n".join(notes)])
    return text if gpu is None else "\n".join([text, "", *accelerated(gpu)])


def summary(verdicts: list[Row]) -> list[str]:
    """Return a line a target: at how many sizes it is met, and the worst."""
    lines = []
    for target in dict.fromkeys(verdict["target"] for verdict in verdicts):
        found = [verdict for verdict in verdicts if verdict["target"] == target]
        known = [verdict for verdict in found if verdict["value"] is not None]
        met = sum(verdict["verdict"] == "met" for verdict in found)
        line = f"- {target}, at most {found[0]['at_most']:g}: met at {met} of {len(found)} sizes"
        if known:
            worst = max(known, key=lambda verdict: verdict["value"])
            line += f"; the worst is {worst['value']:.3g}, {_size(worst)}"
        lines.append(line + ".")
    return ["Targets:\n\n" + "\n".join(lines)] if lines else []


def targets(results: Results) -> str:
    """Return every verdict, a line a size."""
    verdicts = results["verdicts"]
    if not verdicts:
        return _UNMEASURED
    names = list(dict.fromkeys(verdict["target"] for verdict in verdicts))
    bounds = {verdict["target"]: verdict["at_most"] for verdict in verdicts}
    lines = [
        f"| | {' | '.join(f'{name}, at most {bounds[name]:g}' for name in names)} |",
        "|---" + "|---" * len(names) + "|",
    ]
    for size in dict.fromkeys(map(_size, verdicts)):
        cells = {v["target"]: _verdict(v) for v in verdicts if _size(v) == size}
        lines.append(f"| {size} | {' | '.join(cells.get(name, '') for name in names)} |")
    return "\n".join(lines)


def methods(results: Results) -> str:
    """Return every method at the first size: time, memory and error, with and without smoothing."""
    return "\n".join(_tables(results, [_first(results, DENSE)]))


def modes(results: Results) -> str:
    """Return the other modes at every size that has them, and other dtypes."""
    first = _first(results, DENSE)
    one_of_each = {_place(row): row for row in reversed(results["rows"])}
    others = [
        row
        for row in reversed(one_of_each.values())
        if (row["mode"], row["dtype"]) != (MODES[0], first["dtype"])
    ]
    return "\n".join(_tables(results, others)) if others else _UNMEASURED


def _tables(results: Results, one_of_each: list[Row]) -> list[str]:
    lines = []
    for one in one_of_each:
        group = _group(results["rows"], one)
        lines += [
            f"**{one['mode']}: {_size(one)}**",
            "",
            "| | ε | time | 20 to 80 % | bare products = 1 | memory beyond gradients | error of loss | of gradient |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            *map(_full, group),
            "",
        ]
    groups = [row for one in one_of_each for row in _group(results["rows"], one)]
    says = {row["method"]: row["warns"] for row in groups if "warns" in row}
    for method, text in says.items():
        lines.append(f"{method}, smoothed, warns: {text.split('. Got')[0].replace('`', '')}.")
    return lines


def _full(row: Row) -> str:
    eps = "" if row["eps"] is None else f"{row['eps']:g}"
    if "failure" in row:
        return f"| {row['method']} | {eps} | {_failure(row)} | | | | | |"
    cells = [
        row["method"],
        eps,
        _seconds(row),
        f"{row['ms_p20'] / 1e3:.3f} to {row['ms_p80'] / 1e3:.3f} s",
        f"{row['of_products']:.2f}" if "of_products" in row else "",
        f"{_mebibytes(row)} MiB" if "extra_bytes" in row else "",
        *(f"{row[name]:.1e}" if name in row else "" for name in ("loss_error", "gradient_error")),
    ]
    return f"| {' | '.join(cells)} |"


def sizes(results: Results) -> str:
    """Return how Levelhead compares with the dense loss at every size of a training step, as sizes grow."""
    ours = [
        r for r in results["rows"] if (r["method"], r["mode"], r["eps"]) == (OURS, MODES[0], 0.1)
    ]
    lines = [
        "| forward + backward, label smoothing 0.1 | time, dense | levelhead | bare products "
        "| memory, dense | levelhead |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in ours:
        group = _group(results["rows"], row)
        by = {r["method"]: r for r in group if r["eps"] in (row["eps"], None)}
        times = [_seconds(by[name]) if name in by else "" for name in (DENSE, OURS, PRODUCTS)]
        peaks = [
            f"{_mebibytes(by[name])} MiB" if "extra_bytes" in by[name] else ""
            for name in (DENSE, OURS)
        ]
        lines.append(f"| {_size(row)} | {' | '.join([*times, *peaks])} |")
    return "\n".join(lines)


def training(results: Results) -> str:
    """Return whole training steps: tokens a second, and the longest sequence within a limit."""
    rows = results["training"]
    if not rows:
        return _UNMEASURED
    one = rows[0]
    limit = f"{one['limit_bytes'] / 2**20:.0f} MiB"
    lines = [f"| | tokens a second | longest sequence within {limit} |", "|---|---:|---:|"]
    for row in rows:
        speed = f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else _failure(row)
        longest = row.get("longest_that_fits", "")
        at_least = longest == one["longest"]  # nothing longer was tried
        lines.append(f"| {row['method']} | {speed} | {longest}{' or more' if at_least else ''} |")
    return "\n".join(
        [
            *lines,
            "",
            f"A Llama of {one['layers']} layers with D = {one['d']}, V = {one['v']}, {one['dtype']}, label smoothing "
            f"{one['eps']:g}; forward, backward and AdamW on a sequence of {one['n']} tokens, all of them labels. The "
            "limit is on what forward and backward take beyond the model and the optimiser, gradients included; "
            "lengths are powers of two.",
        ]
    )


def pictures(results: Results, names: list[str], folder: str) -> str:
    """Return the figures that the results have numbers for, from a page to which benchmarks/ is `folder`."""
    drawn = [(name, *figures.FIGURES[name]) for name in names]
    images = [
        f"![{title}]({folder}/results/figures/{name}.png)"
        for name, numbers, _, title, _ in drawn
        if numbers(results["rows"])
    ]
    return "\n\n".join(images) or _UNMEASURED


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
        cells = [_cell([row for row in rows if row["shape"] == shape], method) for shape in shapes]
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


def _cell(rows: list[Row], method: str) -> str:
    """Return time and memory of a method on a shape, with smoothing if it has that."""
    row = _smoothed(rows, method)
    if "failure" in row:
        return "not timed"
    memory = f", {_mebibytes(row)} MiB" if "extra_bytes" in row else ""
    return f"{row['ms_p50']:.1f} ms{memory}{'*' if row['eps'] == 0 else ''}"


def _smoothed(rows: list[Row], method: str) -> Row:
    """Return a method's row with smoothing, or without where it does not run with it."""
    found = [row for row in rows if row["method"] == method]
    timed = [row for row in found if "failure" not in row]
    return max(timed or found or [{"failure": "no such row"}], key=lambda row: row.get("eps") or 0)


def _first(results: Results, method: str) -> Row:
    """Return a method's row at the first size, a training step with smoothing."""
    rows = results["rows"]
    wanted = (method, MODES[0], 0.1)
    row: Row = next(row for row in rows if (row["method"], row["mode"], row["eps"]) == wanted)
    return row


def _group(rows: list[Row], one: Row) -> list[Row]:
    """Return the rows that were measured together with one."""
    return [row for row in rows if _place(row) == _place(one)]


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("shape", "mode", "dtype", "n", "d", "v"))


def _methods(rows: list[Row]) -> list[str]:
    return [name for name in dict.fromkeys(row["method"] for row in rows) if name != PRODUCTS]


def _size(row: Row) -> str:
    model = "" if row["shape"] in ("", OVER_VOCABULARY, OVER_TOKENS) else f"{row['shape']}, "
    return f"{model}N = {row['n']}, D = {row['d']}, V = {row['v']}, {row['dtype']}"


def _verdict(verdict: Row) -> str:
    value = "" if verdict["value"] is None else f"{verdict['value']:.3g}, "
    return f"{value}{verdict['verdict']}"


def _failure(row: Row) -> str:
    """Return why there are no figures, without the name of a Python exception that says nothing more."""
    return str(row["failure"]).removeprefix("NotImplementedError: ").replace("|", "/")


def _seconds(row: Row) -> str:
    if "ms_p50" not in row:
        return "not timed"
    return f"{row['ms_p50'] / 1e3:.{3 if row['ms_p50'] < 100 else 2}f} s"


def _mebibytes(row: Row) -> str:
    return f"{max(0, row['extra_bytes']) / 2**20:.0f}"
