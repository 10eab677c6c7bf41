"""What `levelhead capacity` prints: the verdict in a sentence, the numbers, what would change it."""

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .measure import HeadSummary, Report, Verdict

_VERDICTS: dict[Verdict, str] = {
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


def show(report: Report) -> None:
    """Print the report."""
    console = Console()
    console.print(f"[bold]{escape(_verdict(report))}[/]\n", soft_wrap=False)
    console.print(_head(report))
    console.print(_bounds(report))
    console.print(_remedies(report))


def _verdict(report: Report) -> str:
    verdict, sample = report.verdict, report.sample
    bounds = report.ceiling if verdict == "impossible" else sample and sample.bounds
    return "Can this head become over-confident? " + _VERDICTS[verdict].format(
        share=sample.observed.share_at_optimum if sample else 0,
        target=report.optimum.confidence,
        limit=bounds.capacity.max_probability if bounds else 1,
    )


def _head(report: Report) -> Table:
    head, optimum, options = report.head, report.optimum, report.options
    training = [f"smoothing {options.smoothing:g}", f"temperature {options.temperature:g}"]
    if options.softcap is not None:
        training.append(f"softcap {options.softcap:g}")
    singular = f"{head.spectral_norm:.4g}; {head.centred_spectral_norm:.4g} less the mean row"
    table = Table(show_header=False)
    table.add_row("model", escape(options.model))
    table.add_row(
        "head", f"{head.vocab_size:,} x {head.hidden_size:,}, {head.dtype}, {_form(head)}"
    )
    table.add_row("largest singular value", singular)
    table.add_row("largest row norm, less the mean row", f"{head.largest_centred_row_norm:.4g}")
    table.add_row("training", ", ".join(training))
    table.add_row("its optimum: margin of the target", _number(optimum.margin))
    table.add_row("probability of the target there", f"{optimum.confidence:.4f}")
    table.add_row("loss there, the least (nats)", f"{optimum.loss_floor:.4f}")
    return table


def _form(head: HeadSummary) -> str:
    parts = [
        "with a bias" if head.centred_bias_norm else "no bias",
        "" if head.logit_scale == 1 else f"logits x {head.logit_scale:.4g}",
        "no softcap" if head.softcap is None else f"softcap {head.softcap:g}",
    ]
    return ", ".join(filter(None, parts))


def _bounds(report: Report) -> Table:
    ceiling, sample = report.ceiling, report.sample
    titles, columns, norms = [], [], []
    if ceiling is not None and report.ceiling_norm is not None:
        titles.append("any input\n(final norm)")
        columns.append(ceiling.capacity)
        norms.append(report.ceiling_norm)
    if sample is not None:
        titles += ["hidden states up to\nthe largest seen", "seen"]
        columns.append(sample.bounds.capacity)
        norms.append(sample.bounds.capacity.hidden_norm)
    seen = None if sample is None else sample.observed
    table = Table("", *titles)
    for label, values, fact in (
        ("norm of hidden states, at most", norms, None),
        ("rho, norm of the centred logits, at most", [c.radius for c in columns], None),
        ("margin of a logit, at most", [c.margin for c in columns], "max_margin"),
        ("probability, at most", [c.max_probability for c in columns], "max_confidence"),
        ("entropy (nats), at least", [c.min_entropy for c in columns], None),
    ):
        last = [_number(getattr(seen, fact)) if fact else ""] if seen else []
        table.add_row(label, *map(_number, values), *last)
    reach = ["[green]yes[/]" if c.reachable else "[red]no[/]" for c in columns]
    last = [f"{seen.share_at_optimum:.2%} of tokens"] if seen else []
    table.add_row("optimum of the smoothed loss within reach", *reach, *last)
    if sample is not None:
        found, observed = sample.hidden_norms, sample.observed
        table.caption_justify = "left"
        table.caption = (
            f"{found.count:,} tokens: norms of hidden states mean {found.mean:.4g}, median "
            f"{found.quantiles[0.5]:.4g}, 5% {found.quantiles[0.05]:.4g}, 95% "
            f"{found.quantiles[0.95]:.4g}, max {found.max:.4g}; the optimum needs "
            f"{_number(sample.bounds.capacity.required_norm)}. "
            f"Mean confidence {observed.mean_confidence:.4f}, mean entropy "
            f"{observed.mean_entropy:.4f} nats."
            + (" Both bounds hold; either may be the tighter." if ceiling is not None else "")
        )
    return table


def _remedies(report: Report) -> str:
    """Return what temperature and softcap would do."""
    margin, softcap = report.optimum.margin, report.options.softcap
    least = (
        f"A softcap on the logits of training must be at least {margin / 2:.4g} to leave it "
        "within reach"
    )
    if softcap is not None and 2 * softcap < margin:
        return f"{least}: {softcap:g} rules it out at any temperature."
    bounds = {"any input": report.ceiling}
    bounds["the norms seen"] = None if report.sample is None else report.sample.bounds
    lines = [
        f"Within reach for {name} up to a training temperature of {found.max_temperature:.4g}."
        for name, found in bounds.items()
        if found is not None and found.max_temperature is not None
    ]
    return "\n".join([*lines, f"{least}."])


def _number(value: float) -> str:
    return "none" if math.isinf(value) else f"{value:.4g}"
