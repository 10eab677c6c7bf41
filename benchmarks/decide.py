"""What decides between designs of the loss on a GPU, in one command: the stage `decide` of `make gpu`.

Ceilings of the device; the kernels against float64, and 200 times to the bit; what each takes beside products of the
library; products by their number of tokens and the dtype of their result; the softmax by how many rows are resident;
and where the time of a whole step goes. `tflops` counts two operations a multiply-add, `gb_s` bytes read and written.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from levelhead.measure.methods import STATISTICS, baseline, fused, fused_statistics
from levelhead.ops import library
from levelhead.ops.tile import addmm_

from .gate import Gate
from .measure import Row, admit
from .shapes import SHAPES
from .stage import Stage, Task
from .step import Case, Step, quantiles
from .targets import OURS, TARGET_SHAPES
from .tune import KERNELS, Subject

MODES = ("forward+backward", "frozen head", "reduction none", STATISTICS)
TOKENS = (512, 1024, 2048, 4096, 8192)
ROUNDS, REPEATS = 7, 200
# Rows of logits that one launch has, and its programs: 256 threads and up to six of them on a multiprocessor, or 1024
# threads and one; 8 entries a thread in each.
ROWS = (66, 132, 264, 512, 8192)
PROGRAMS = ((2048, 8), (4096, 16), (8192, 32))


def timed(stage: Stage, run: Callable[[], object], operations: float = 0, moved: float = 0) -> Row:
    """Return the times of a run in some rounds, and the rates that its median means."""
    run()  # compiles, and chooses its algorithm
    row = quantiles([stage.clock.seconds(run) for _ in stage.some(range(ROUNDS))])
    rates = {"tflops": 1e-9 * operations / row["ms_p50"], "gb_s": 1e-6 * moved / row["ms_p50"]}
    return row | {name: rate for name, rate in rates.items() if rate}


def ceilings(stage: Stage) -> Iterator[Row]:
    """Yield the rates of a large copy and of a large product, on random numbers."""
    size = 64 if stage.tiny else 8192
    a, b = (torch.randn(size, size, device=stage.device).bfloat16() for _ in range(2))
    c = torch.empty_like(a)
    yield {"what": "product"} | timed(stage, lambda: torch.mm(a, b, out=c), operations=2 * size**3)
    source = a.repeat(1 if stage.tiny else 32, 1)
    copy = torch.empty_like(source)
    yield {"what": "copy"} | timed(stage, lambda: copy.copy_(source), moved=2 * source.nbytes)


def right(stage: Stage, case: Case) -> Iterator[Row]:
    """Yield the errors of a kernel as shares of its budget, or by how much it is beyond."""
    base = Step(stage.fit(case), baseline(case.mode))
    method = fused_statistics if case.mode == STATISTICS else fused("triton")
    yield admit(OURS, base.using(method, case.eps), Gate(base))


def repeated(stage: Stage, kernel: str) -> Iterator[Row]:
    """Yield how many runs of a kernel on the same tensors gave other bits than the first."""
    subject = Subject(kernel, stage.fit(Case(4096, 4096, 8192, dtype="bfloat16", device="cuda")))
    first, other = subject(subject.x.dtype), torch.zeros((), device=stage.device)
    for _ in stage.some(range(REPEATS)):
        other += (subject(subject.x.dtype) != first).any()  # of a NaN too
    yield {"runs": len(stage.some(range(REPEATS))), "different": int(other)}


def kernels(stage: Stage, case: Case) -> Iterator[Row]:
    """Yield the time of each kernel; of those that multiply the rate, which a product of the library has to beat."""
    case = stage.fit(case)
    for kernel in KERNELS:
        operations = 0 if kernel == "softmax" else 2 * case.n * case.v * case.d
        yield {"kernel": kernel} | timed(stage, Subject(kernel, case), operations)


def products(stage: Stage, case: Case) -> Iterator[Row]:
    """Yield the products of C tokens by the dtype of their result; that of the weight also added to what is there."""
    case = stage.fit(case)
    dtype, new = getattr(torch, case.dtype), partial(torch.randn, device=stage.device)
    weight = new(case.v, case.d, dtype=dtype)  # (V, D)
    for tokens in sorted({min(tokens, case.n) for tokens in TOKENS}):
        x, da = new(tokens, case.d, dtype=dtype), new(tokens, case.v, dtype=dtype)
        pairs = {"logits": (x, weight.T), "dx": (da, weight), "dw": (da.T, x)}
        for (name, (a, b)), result in product(pairs.items(), (dtype, torch.float32)):
            out = torch.zeros(len(a), b.shape[1], dtype=result, device=stage.device)
            for beta in (0, 1) if (name, result) == ("dw", torch.float32) else (0,):
                run = partial(addmm_, out, a, b, alpha=1, beta=beta)
                what = {"product": name, "tokens": tokens, "beta": beta, "result": str(result)}
                yield what | timed(stage, run, operations=2 * tokens * case.v * case.d)


def softmax(stage: Stage, case: Case) -> Iterator[Row]:
    """Yield the softmax kernel by rows a launch and by programs; `gb_s` as if each logit were read once."""
    from levelhead.ops.triton import launch
    from levelhead.ops.triton.softmax import softmax_kernel

    case = stage.fit(case)
    n, v, like = case.n, case.v, {"device": stage.device}
    logits = torch.randn(n, v, **like)
    da = torch.empty(n, v, dtype=getattr(torch, case.dtype), **like)
    target, stats = torch.randint(0, v, (n,), **like), torch.empty(4, n, **like)
    weight, smoothing = torch.full((n,), 1 / n, **like), torch.full((n,), 0.1, **like)

    def launches(rows: int, block: int, warps: int) -> None:
        for some in map(slice, range(0, n, rows), [*range(rows, n, rows), n]):
            launch.launch(
                softmax_kernel, len(target[some]), logits[some], None, target[some], weight[some],
                smoothing[some], stats[:, some], da[some], v, stats.stride(0), v, v, Z_LOSS=0.0,
                SOFTCAP=None, LOGIT_SCALE=1.0, BLOCK_V=block, num_warps=warps,
            )  # fmt: skip

    for rows, (block, warps) in product(sorted({min(rows, n) for rows in ROWS}), PROGRAMS):
        run = graphed(stage, partial(launches, rows, block, warps))
        what = {"rows": rows, "block": block, "warps": warps}
        yield what | timed(stage, run, moved=n * v * (logits.itemsize + da.itemsize))


def graphed(stage: Stage, run: Callable[[], object]) -> Callable[[], object]:
    """Return a run as one graph: the host takes longer for a small launch than the device."""
    run()  # compiles
    if stage.tiny:
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def passes(stage: Stage, case: Case) -> Iterator[Row]:
    """Yield what stands around the products: rounding the weight's gradient, and scaling it by the upstream one."""
    case = stage.fit(case)
    wide = torch.randn(case.v, case.d, device=stage.device)
    narrow, one = wide.to(getattr(torch, case.dtype)), torch.ones((), device=stage.device)
    moved = wide.nbytes + narrow.nbytes
    yield {"pass": "round"} | timed(stage, lambda: narrow.copy_(wide), moved=moved)

    def scale() -> Tensor:
        return library._scaled(narrow, one)

    yield {"pass": "scale"} | timed(stage, scale, moved=2 * narrow.nbytes)


def step(stage: Stage, case: Case) -> Iterator[Row]:
    """Yield a whole step and the kernels that it runs, by their time."""
    run = Step(stage.fit(case), fused("triton"))
    yield {"kernel": "all"} | timed(stage, run)
    kind = "cpu" if stage.tiny else "device"
    with profile(activities=[getattr(ProfilerActivity, "CPU" if stage.tiny else "CUDA")]) as found:
        run()
        if not stage.tiny:
            torch.cuda.synchronize()
    events = [(getattr(e, f"self_{kind}_time_total"), e) for e in found.key_averages()]
    for microseconds, event in sorted(events, key=lambda pair: -pair[0])[:20]:
        yield {"kernel": event.key, "launches": event.count, "ms": 1e-3 * microseconds}


def tasks(stage: Stage) -> list[Task]:
    """Return what is measured, the most important first."""

    def case(shape: str, tokens: int, mode: str = MODES[0]) -> Case:
        v, d = SHAPES[shape]
        return Case(tokens, d, v, 0.1, mode, "bfloat16", device="cuda")

    aimed = stage.some(TARGET_SHAPES)
    found: list[Task] = [("ceilings", partial(ceilings, stage))]
    found += [(f"to the bit, {kernel}", partial(repeated, stage, kernel)) for kernel in KERNELS]
    found += [
        (f"against float64, {shape}, {mode}", partial(right, stage, case(shape, 1024, mode)))
        for shape, mode in product(stage.some((*TARGET_SHAPES, "GPT-2")), MODES)  # whose V is odd
    ]
    measures = [kernels, products, softmax, passes, step]
    found += [
        (f"{measure.__name__}, {shape}", partial(measure, stage, case(shape, 8192)))
        for measure, shape in product(measures, aimed)
    ]
    return found


def run(stage: Stage) -> int:
    """Measure all of it."""
    return stage.run(tasks(stage))
