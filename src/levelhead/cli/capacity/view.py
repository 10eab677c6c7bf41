"""What `levelhead capacity` found out, for people: the verdict in words, the numbers, what would change it."""

import math
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_VERDICTS = {
    "reached": "Yes: it already is. On {share:.2%} of the sampled tokens the model is as confident as the "
    "smoothed target ({target:.4f}) or more, and smoothing pulls it back there.",
    "possible": "It can: the bounds allow more confidence than the smoothed target has ({target:.4f}), so "
    "that smoothing may have something to hold back. They are necessary, not sufficient.",
    "impossible": "No: no input whatever makes this head as confident as the smoothed target ({target:.4f}); "
    "its probabilities stay below {limit:.4g}. Smoothing has nothing to hold back as the weights are.",
    "out of reach": "Not on this sample: no hidden state with the norms seen makes this head as confident as "
    "the smoothed target ({target:.4f}); probabilities stay below {limit:.4g}. Other inputs may have "
    "larger ones.",
}


def show(console: Console, summary: dict[str, Any]) -> None:
    """Prints the summary."""
    console.print(f"[bold]{escape(_words(summary))}[/]\n", soft_wrap=False)
    console.print(_head(summary))
    console.print(_bounds(summary))
    console.print(_remedies(summary))


def _words(summary: dict[str, Any]) -> str:
    ceiling, sample = summary["ceiling"], summary["sample"]
    bounds = ceiling if summary["verdict"] == "impossible" else sample and sample["bounds"]
    return "Can this head become over-confident? " + _VERDICTS[summary["verdict"]].format(
        share=sample["observed"]["share_at_optimum"] if sample else 0,
        target=summary["optimum"]["confidence"],
        limit=bounds["max_probability"] if bounds else 1,
    )


def _head(summary: dict[str, Any]) -> Table:
    head, optimum, settings = summary["head"], summary["optimum"], summary["settings"]
    table = Table(show_header=False)
    table.add_row("model", escape(summary["model"]))
    table.add_row(
        "head", f"{head['vocab_size']:,} x {head['hidden_size']:,}, {head['dtype']}, {_form(head)}"
    )
    table.add_row(
        "largest singular value",
        f"{head['spectral_norm']:.4g}; {head['centred_spectral_norm']:.4g} less the mean row",
    )
    table.add_row("largest row norm, less the mean row", f"{head['largest_centred_row_norm']:.4g}")
    options = [f"smoothing {settings['smoothing']:g}", f"temperature {settings['temperature']:g}"]
    if settings["softcap"] is not None:
        options.append(f"softcap {settings['softcap']:g}")
    table.add_row("training", ", ".join(options))
    table.add_row("its optimum: margin of the target", _number(optimum["margin"]))
    table.add_row("probability of the target there", f"{optimum['confidence']:.4f}")
    table.add_row("loss there, the least (nats)", f"{optimum['loss_floor']:.4f}")
    return table


def _form(head: dict[str, Any]) -> str:
    parts = [
        "with a bias" if head["centred_bias_norm"] else "no bias",
        "" if head["logit_scale"] == 1 else f"logits x {head['logit_scale']:.4g}",
        "no softcap" if head["softcap"] is None else f"softcap {head['softcap']:g}",
    ]
    return ", ".join(filter(None, parts))


def _bounds(summary: dict[str, Any]) -> Table:
    ceiling, sample = summary["ceiling"], summary["sample"]
    columns: list[tuple[str, dict[str, Any]]] = []
    if ceiling is not None:
        columns.append(("any input\n(final norm)", ceiling))
    if sample is not None:
        columns.append(("hidden states up to\nthe largest seen", sample["bounds"]))
    table = Table("", *(title for title, _ in columns), *(["seen"] if sample else []))
    observed = sample["observed"] if sample else {}
    rows = {
        "norm of hidden states, at most": ("hidden_norm", None),
        "rho, norm of the centred logits, at most": ("radius", None),
        "margin of a logit, at most": ("margin", "max_margin"),
        "probability, at most": ("max_probability", "max_confidence"),
        "entropy (nats), at least": ("min_entropy", None),
    }
    for label, (bound, seen) in rows.items():
        cells = [_number(column[bound]) for _, column in columns]
        table.add_row(label, *cells, *([_number(observed[seen]) if seen else ""] if sample else []))
    reach = ["[green]yes[/]" if column["reachable"] else "[red]no[/]" for _, column in columns]
    last = [f"{observed['share_at_optimum']:.2%} of tokens"] if sample else []
    table.add_row("optimum of the smoothed loss within reach", *reach, *last)
    if sample is not None:
        norms = sample["hidden_norms"]
        quantiles = {float(key): value for key, value in norms["quantiles"].items()}
        table.caption_justify = "left"
        table.caption = (
            f"{norms['count']:,} tokens: norms of hidden states mean {norms['mean']:.4g}, median "
            f"{quantiles[0.5]:.4g}, 5% {quantiles[0.05]:.4g}, 95% {quantiles[0.95]:.4g}, max "
            f"{norms['max']:.4g}; the optimum needs {_number(sample['bounds']['required_norm'])}. "
            f"Mean confidence {observed['mean_confidence']:.4f}, mean entropy "
            f"{observed['mean_entropy']:.4f} nats."
            + (" Both bounds hold; either may be the tighter." if ceiling is not None else "")
        )
    return table


def _remedies(summary: dict[str, Any]) -> str:
    """What temperature and softcap would do."""
    margin = summary["optimum"]["margin"]
    bounds = {"any input": summary["ceiling"]}
    bounds["the norms seen"] = summary["sample"] and summary["sample"]["bounds"]
    softcap, lines = summary["settings"]["softcap"], []
    for name, bound in bounds.items():
        if bound is None or bound["max_temperature"] is None:
            continue
        lines.append(
            f"Within reach for {name} up to a training temperature of "
            f"{bound['max_temperature']:.4g}."
        )
    least = (
        f"A softcap on the logits of training must be at least {margin / 2:.4g} to leave it "
        "within reach"
    )
    if softcap is not None and 2 * softcap < margin:
        return f"{least}: {softcap:g} rules it out at any temperature."
    return "\n".join([*lines, f"{least}."])


def _number(value: float) -> str:
    return "none" if math.isinf(value) else f"{value:.4g}"
