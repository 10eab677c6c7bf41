"""Print a plan: what matters in sentences, then the tables."""

from collections.abc import Iterator

from levelhead.measure import footprint

from ..errors import missing_extra
from .cost import GIB, Plan


def verdict(plan: Plan) -> Iterator[str]:
    """Yield what matters, in sentences."""
    rows, problem, memory, tflops = plan.rows, plan.problem, plan.memory, plan.tflops
    known = {row.method: row for row in rows if row.operations}
    dense = known[footprint.TRANSFORMERS.name]
    ours = known.get(footprint.TRITON.name, known[footprint.CHUNKED.name])
    for row, name in (
        (dense, "Dense (transformers loss)"),
        (ours, f"Levelhead ({ours.method[11:]})"),
    ):
        logits = sum(size for tensor, size in row.tensors.items() if _of_logits(tensor))
        yield (
            f"{name}: {_gib(row.peak_bytes)} per GPU at the peak of head and loss; logits and what is "
            f"made of them: {_gib(logits)}."
        )
    of_dense = (ours.peak_bytes or 0) / (dense.peak_bytes or 1)
    yield (
        (
            f"Levelhead's peak is {of_dense:.2g} x the dense one"
            if of_dense < 1
            else f"At so few tokens Levelhead saves nothing: {of_dense:.2g} x the dense peak"
        )
        + f"; the gradients, which any method leaves, are {_gib(sum(problem.gradients().values()))}."
    )
    if memory is not None:
        longest = f"dense {dense.longest_tokens}, Levelhead {ours.longest_tokens}"
        if not ours.longest_tokens:
            yield f"No micro-batch fits --memory {memory:g}: the model's states leave no room."
        else:
            yield f"Longest micro-batch that fits --memory {memory:g}, in tokens: {longest}."
        if (ours.longest_tokens or 0) < problem.tokens:
            yield f"The {problem.tokens} tokens asked for do not fit with Levelhead."
    if tflops is None:
        yield "Time: not known without a rate; give --tflops X, what the GPU reaches in large products."
    else:
        yield (
            f"Time at {tflops:g} TFLOP/s, products alone: dense {dense.seconds:.3g} s, "
            f"Levelhead {ours.seconds:.3g} s."
        )


def _of_logits(tensor: str) -> bool:
    return any(word in tensor for word in ("logits", "softmax", "tanh", "shifted", "to sum"))


def _gib(size: int | None) -> str:
    """Bytes in GiB for people, or MiB where that reads better; a dash for None."""
    if size is None:
        return "-"
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def show(plan: Plan) -> None:
    """Print the verdict and the tables.

    Raises:
        CliError: A package is missing.
    """
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ModuleNotFoundError as error:
        raise missing_extra(error, "cli", {"rich"}) from error
    architecture, problem, layout, rows = plan.architecture, plan.problem, plan.layout, plan.rows
    console = Console()
    console.print(escape("\n".join(verdict(plan))), highlight=False)
    facts = Table(show_header=False)
    cap = "" if architecture.softcap is None else f", softcap {architecture.softcap:g}"
    tied = ", tied to the input embeddings" if architecture.tied else ""
    dtype = str(problem.dtype).removeprefix("torch.")
    facts.add_row("model", escape(architecture.model))
    facts.add_row("head", f"{architecture.vocabulary} x {architecture.hidden} {dtype}{cap}{tied}")
    facts.add_row("tokens of a GPU", str(problem.tokens))
    sharing = f"data-parallel {layout.data}, tensor-parallel {layout.tensor}, ZeRO {layout.zero}"
    facts.add_row("layout", sharing)
    at_rest = ", ".join(f"{name} {_gib(size)}" for name, size in plan.head_at_rest.items() if size)
    facts.add_row(
        "the head at rest", at_rest + (" (the embeddings' own)" if architecture.tied else "")
    )
    console.print(facts)
    longest = any(row.longest_tokens is not None for row in rows)
    timed = any(row.seconds is not None for row in rows)
    table = Table("head and loss, per GPU", "peak", "what stands then", "operations")
    for column in ("time",) * timed + ("longest, tokens",) * longest:
        table.add_column(column)
    for row in rows:
        if row.operations is None:
            table.add_row(row.method, "-", row.note)
            continue
        parts = sorted(row.tensors.items(), key=lambda part: -part[1])
        cells = [
            row.method + ("" if row.label_smoothing else "\n(no label smoothing)"),
            _gib(row.peak_bytes),
            "\n".join(
                f"{_gib(size)} {name}" for name, size in parts if size * 50 > (row.peak_bytes or 0)
            ),
            f"{row.operations / 1e12:.3g} TFLOP\n{2 * (row.products_of_2_nvd or 0)} NVD",
        ]
        if row.seconds is not None:
            cells.append(f"{row.seconds:.3g} s")
        if row.longest_tokens is not None:
            cells.append(str(row.longest_tokens))
        table.add_row(*cells)
    console.print(table)
    console.print("Assumptions: levelhead plan --help", highlight=False)
