"""What README says was measured of each paper's idea, from results/."""

from typing import Any

from . import calibration_study, large_vocabulary

Results = dict[str, Any]
Intervals = dict[str, dict[str, float]]  # mean, low and high of each metric

_ALIGNED = {
    "SFT": "SFT",
    "DPO": "SFT, then DPO",
    "temperature": "…, then a fitted temperature",
    "CFT": "…, then CFT",
    "RCFT": "…, then RCFT",
    "RCFT, E-step once": "…, then RCFT, E-step once, as released",
    "no regulariser": "…, then RCFT without its regulariser",
}


def reach(results: Results) -> str:
    """Return where smoothing acts, by what the head was able to do before training."""
    found = large_vocabulary.cells(results["rows"])
    out = [cell for cell in found if cell["capacity"] < 1]
    within = [cell for cell in found if cell["capacity"] >= 1]
    acts = [cell for cell in within if large_vocabulary.acts(cell)]
    helps = [cell for cell in within if large_vocabulary.helps(cell)]
    moved = sum(map(large_vocabulary.acts, out))
    right = len(acts) + len(out) - moved
    return (
        "Capacity is the margin that the head can reach before training, over that of the smoothed optimum. Of "
        f"{len(found)} cells (D, V, remedy) {len(out)} have less than 1, and in {moved} of them smoothing moves "
        f"the mean confidence by two points; of the {len(within)} others it does in {len(acts)}, so that "
        f"predicting by that bound is right {right} times of {len(found)}. It lowers ECE by a point or more in "
        f"{len(helps)}, all of a capacity of {min(cell['capacity'] for cell in helps):.1f} or more: with less, "
        "the smoothed models are under-confident. Means over "
        f"{len({row['seed'] for row in results['rows']})} seeds, commit {results['machine']['commit']} "
        "(`benchmarks/results/large_vocabulary.json`)."
    )


def reach_table(results: Results) -> str:
    """Return what smoothing does at one vocabulary, by hidden size, with and without a temperature."""
    lines = ["| V = 16,384 | capacity | ECE, hard targets | smoothed |", "|---|---:|---:|---:|"]
    for cell in large_vocabulary.cells(results["rows"]):
        if cell["v"] == 16384 and cell["remedy"] in ("plain", "temperature 0.25"):
            name = f"D = {cell['d']}, {cell['remedy']}"
            numbers = (
                f"{cell['capacity']:.1f} | {cell['hard_ece']:.3f} | {cell['smoothed_ece']:.3f}"
            )
            lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)


def aligned(results: Results) -> str:
    """Return what is left of calibration after DPO, and what restores it."""
    ece = {key: results["summary"][key]["ece"]["mean"] for key in _ALIGNED}
    return (
        f"After TRL's DPO the ECE of a small Llama is {ece['DPO']:.3f} (before: {ece['SFT']:.3f}); CFT makes it "
        f"{ece['CFT']:.3f}, RCFT {ece['RCFT']:.3f}, RCFT without its regulariser {ece['no regulariser']:.3f}, a fitted "
        f"temperature {ece['temperature']:.3f}. {_over(results)} (`benchmarks/results/calibration_aware.json`)."
    )


def aligned_table(results: Results) -> str:
    """Return the table of the same, with accuracy, confidence and intervals."""
    return "\n".join(
        [
            *_table({name: results["summary"][key] for key, name in _ALIGNED.items()}),
            "",
            f"Means and 95 % t-intervals over {len(results['seeds'])} seeds, of new models, questions and labels each; "
            f"torch {results['machine']['torch']}, TRL {results['machine']['trl']} "
            "(`benchmarks/results/calibration_aware.json`).",
        ]
    )


def distillation(results: Results) -> str:
    """Return what distillation cost, and what recalibration changed."""
    differences = results["summary"]["paired_differences"]
    large, small = (
        differences[f"{size}, recalibrated - {size}, {against}"]["ece"]
        for size, against in (("large", "plain"), ("small", "hard labels"))
    )
    extra = {
        (row["method"], row["normalisation"]): row["extra_bytes"] / 2**20 for row in results["cost"]
    }
    ours = [value for (method, _), value in extra.items() if method == "levelhead"]
    shape = results["cost"][0]
    return (
        f"Recalibration changes the ECE of a student as large as its teacher by {_change(large)} against plain "
        f"distillation, and that of a small one by {_change(small)} against hard labels. Memory beyond gradients, "
        f"{shape['n']} tokens, D = {shape['d']}, V = {shape['v']}: {min(ours):.0f} to {max(ours):.0f} MiB, where dense "
        f"logits take {extra['dense', 'full']:.0f}; the store takes {results['store']['bytes_a_position']:.0f} bytes a "
        f"position. {_over(results)}, commit {results['machine']['commit']} (`benchmarks/results/distillation.json`)."
    )


def distillation_table(results: Results) -> str:
    """Return what distillation did to students of two sizes."""
    models = results["summary"]["models"]
    rows = {"the teacher": models["teacher"]}
    for size, name in (("large", "student as large as its teacher"), ("small", "small student")):
        for kind in ("hard labels", "plain", "recalibrated", "smoothed"):
            taught = kind if kind == "hard labels" else f"taught, {kind}"
            rows[f"{name}, {taught}"] = models[f"{size}, {kind}"]
    return "\n".join([*_table(rows), "", f"{_over(results)}."])


def _over(results: Results) -> str:
    return f"Means and 95 % t-intervals over {len(results['seeds'])} seeds"


def _change(interval: dict[str, float]) -> str:
    return f"{interval['mean']:+.3f} ({interval['low']:+.3f} to {interval['high']:+.3f})"


def remedies(results: Results) -> str:
    """Return the table of the study of all remedies."""
    named = calibration_study.NAMES
    return "\n".join(
        [
            *_table({name: results["summary"][key] for key, name in named.items()}),
            "",
            f"{_over(results)}, commit {results['machine']['commit']} "
            "(`benchmarks/results/calibration_study.json`).",
        ]
    )


def _table(rows: dict[str, Intervals]) -> list[str]:
    """The lines of a table, a model each; ECE with its interval."""
    lines = ["| | accuracy | mean confidence | ECE | NLL |", "|---|---:|---:|---:|---:|"]
    for name, metrics in rows.items():
        accuracy, confidence, nll = (
            f"{metrics[key]['mean']:.3f}" for key in ("accuracy", "confidence", "nll")
        )
        ece = metrics["ece"]
        interval = f"{ece['mean']:.3f} ({ece['low']:.3f} to {ece['high']:.3f})"
        lines.append(f"| {name} | {accuracy} | {confidence} | {interval} | {nll} |")
    return lines
