"""What a run of `levelhead sft` came to, in summary.json and for the terminal."""

from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from levelhead.objectives.regime import Regime

from ..examples import Counts
from ..progress import main_console

_MIB = 2**20
HOW = (
    "reckoned, not measured, for the largest batch on one device. Dense: its positions x "
    "vocabulary x (logits in the dtype of the computation, their float32 copy where that is "
    "narrower, and their float32 gradient). Levelhead: the most that its buffers of logits may take"
)


@dataclass(frozen=True)
class Change:
    """The first and the last of the losses that were logged, nats."""

    first: float
    last: float


@dataclass(frozen=True)
class TokenCalibration:
    """How right and how sure the model was of evaluation tokens at the last evaluation, each in [0, 1]."""

    token_accuracy: float
    mean_confidence: float
    ece: float  # expected calibration error, 10 bins of equal width
    trust: float  # accuracy - ece, the score of FIRST (Shum et al. 2024, https://arxiv.org/abs/2408.12168)


@dataclass(frozen=True)
class LogitMemory:
    """Bytes that the logits of the largest batch on one device take; `how` says by which formula."""

    positions: int
    vocabulary: int
    dense_bytes: int
    levelhead_bytes: int
    how: str


@dataclass(frozen=True)
class Run:
    """What a run came to: the content of summary.json. Of a resumed run, its earlier parts count too."""

    levelhead: str  # version, as of the next two
    torch: str
    transformers: str
    platform: str
    device: str
    processes: int
    settings: dict[str, object]  # the options, completed
    rows: dict[str, Counts]  # of "data" and "eval"
    steps: int
    epochs: float
    loss: Change | None  # None: no finite one was logged
    eval_loss: Change | None  # not smoothed
    calibration: TokenCalibration | None
    tokens: int
    seconds: float  # of this part alone: training, evaluation and checkpoints
    tokens_per_second: float
    logits: LogitMemory
    regimes: dict[str, Regime]  # of calibration-aware fine-tuning, by what was asked and when


def show(run: Run) -> None:
    """Print the run, in one of its processes."""
    console = main_console()
    console.print(_table(run), _notes(run), sep="\n")
    if run.regimes:
        console.print(_calibration(run.regimes), soft_wrap=True)
    console.print(f"Model: [bold]{escape(str(run.settings['output']))}[/]", soft_wrap=True)


def _table(run: Run) -> Table:
    """Return the run for the terminal."""
    dense, ours = run.logits.dense_bytes, run.logits.levelhead_bytes
    title = f"{run.steps:,} steps, {run.epochs:.3g} epochs"
    view = Table(title=title, title_justify="left", show_header=False)
    label = "training loss, smoothed (nats)"
    if run.settings["teacher"]:
        label = "training loss, KL to the teacher (nats)"
    if run.settings["calibration_aware"] == "rcft":
        label = "training loss with regulariser"
    view.add_row(label, _change(run.loss))
    view.add_row("evaluation loss (nats)", _change(run.eval_loss))
    if found := run.calibration:
        view.add_row("accuracy on evaluation tokens", f"{found.token_accuracy:.4f}")
        view.add_row("their calibration error", f"{found.ece:.4f}")
        view.add_row("trust score, the difference", f"{found.trust:.4f}")
    view.add_row("tokens", f"{run.tokens:,}")
    view.add_row("tokens per second", f"{run.tokens_per_second:,.0f}")
    view.add_row("time (s)", f"{run.seconds:.1f}")
    view.add_row("memory of the logits, dense (MiB)", f"{dense / _MIB:,.1f}")
    view.add_row("with levelhead, at most (MiB)", f"{ours / _MIB:,.1f}")
    view.add_row("saved (MiB)", f"{(dense - ours) / _MIB:,.1f}")
    return view


def _change(losses: Change | None) -> str:
    return "none" if losses is None else f"{losses.first:.4g} -> {losses.last:.4g}"


def _notes(run: Run) -> str:
    """Return what the table shows exactly, to be printed below it."""
    bins = "The calibration error is that of the likeliest token, in 10 bins of equal width. "
    return (
        "Losses are the first and the last that were logged; the evaluation loss is not smoothed. "
        f"{bins if run.calibration else ''}Memory is {run.logits.how}."
    )


def _calibration(regimes: dict[str, Regime]) -> str:
    """Return accuracy and confidence of the answers before and after, and what follows from them."""
    lines = ["", "Calibration (95% interval of the accuracy)"]
    for name, regime in regimes.items():
        lines.append(f"  {name}: {regime.numbers}")
    verdicts = dict.fromkeys(regime.verdict for regime in regimes.values())
    if len(verdicts) == 1:
        lines.append(f"  {next(iter(verdicts))}")
    else:
        lines += [f"  {name}: {regime.verdict}" for name, regime in regimes.items()]
    return "\n".join(lines) + "\n"
