"""The memory formulas are held to measured peaks: of the allocator, and of the committed benchmarks."""

import json
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import levelhead
from levelhead.measure import footprint
from levelhead.measure.footprint import METHODS, Method, Problem

COMMITTED = Path(__file__).parents[2] / "benchmarks/results/cpu.json"
# Many tokens, a wide head with few, a vocabulary that nothing divides.
SHAPES = [(512, 64, 5000), (128, 96, 8001), (700, 32, 3001)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 0.01
VECTORS = 2**16  # bytes: what the formulas leave out


PROBLEMS = [
    Problem(*shape, dtype, frozen=frozen, device="cpu")
    for shape in SHAPES
    for dtype in DTYPES
    for frozen in (False, True)
]
WIDE = [problem for problem in PROBLEMS if not problem.narrow]


def of_others(problems):
    """What the memory of other libraries is tried on: in `make test` one shape is enough."""
    slow = {problem: problem.tokens != SHAPES[1][0] for problem in problems}
    return [pytest.param(p, marks=[pytest.mark.slow] * slow[p], id=str(p)) for p in problems]


def allocated_peak(run):
    """The most bytes of PyTorch's CPU allocator, as torch.cuda.max_memory_allocated on a GPU."""
    # Without acc_events torch 2.11 warns that it keeps the events of one cycle; there is one.
    options = {"profile_memory": True, "acc_events": True}
    with profile(activities=[ProfilerActivity.CPU], **options) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    most = now = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        now += change
        most = max(most, now)
    return most


def operands(problem):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(problem.tokens, problem.hidden, generator=random).to(problem.dtype)
    weight = torch.randn(problem.rows, problem.hidden, generator=random).to(problem.dtype)
    target = torch.randint(problem.rows, (problem.tokens,), generator=random)
    return x.requires_grad_(), weight.requires_grad_(not problem.frozen), target


def measured(problem, loss):
    x, weight, target = operands(problem)
    loss(x, weight, target).backward()  # libraries allocate for good on their first call
    x.grad = weight.grad = None
    return allocated_peak(lambda: loss(x, weight, target).backward())


def predicted(problem, formula):
    return footprint.peak(Method("", formula), problem).total


def about(peak, problem, **tolerance):
    """What a peak may be by a formula."""
    peaks = [peak]
    if problem.dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        # Without instructions for bfloat16 the library copies the logits' gradient, of some shapes, to multiply it.
        peaks.append(peak - problem.dtype.itemsize * problem.logits)
    return [pytest.approx(one, **tolerance) for one in peaks]


def assert_exact(problem, loss, formula):
    want = measured(problem, loss)
    assert predicted(problem, formula) in about(want, problem, rel=TOLERANCE, abs=VECTORS), problem


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_dense(problem):
    def loss(x, weight, target):
        return F.cross_entropy(F.linear(x, weight).float(), target, label_smoothing=0.1)

    assert_exact(problem, loss, footprint.dense)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_levelhead_chunked(problem, softcap):
    def loss(x, weight, target):
        return levelhead.linear_cross_entropy(
            x, weight, target, label_smoothing=0.1, softcap=softcap, impl="chunked"
        )

    assert_exact(replace(problem, softcap=softcap is not None), loss, footprint.levelhead_chunked)


@pytest.mark.parametrize("problem", WIDE, ids=str)
def test_levelhead_chunked_with_a_shared_head(problem):
    """A rank does what reduction="none" does with its rows."""

    def loss(x, weight, target):
        return levelhead.linear_cross_entropy(
            x, weight, target, label_smoothing=0.1, reduction="none", impl="chunked"
        ).sum()

    shared = replace(problem, vocabulary=2 * problem.vocabulary, ranks=2)
    assert_exact(shared, loss, footprint.levelhead_chunked)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch < 2.13")
@pytest.mark.parametrize("problem", of_others(WIDE))
def test_torch_chunked(problem):
    def loss(x, weight, target):
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x, weight, target, options=options)

    assert_exact(problem, loss, footprint.torch_chunked)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("problem", of_others(PROBLEMS))
def test_transformers_loss(problem, softcap):
    pytest.importorskip("transformers")
    from transformers.loss.loss_utils import ForCausalLMLoss

    def forward(x, weight, target):
        logits = F.linear(x[None], weight)
        if softcap is not None:  # as Gemma 2 has it
            logits = logits / softcap
            logits = torch.tanh(logits)
            logits = logits * softcap
        return ForCausalLMLoss(logits, target[None], len(weight)), logits

    def loss(*tensors):
        return forward(*tensors)[0]  # Trainer.compute_loss lets the logits go here

    problem = replace(problem, softcap=softcap is not None)
    assert_exact(problem, loss, footprint.transformers_loss)


@pytest.mark.parametrize("problem", of_others(PROBLEMS))
def test_label_smoother(problem):
    pytest.importorskip("transformers")
    from transformers.trainer_pt_utils import LabelSmoother

    def forward(x, weight, target):
        output = {"logits": F.linear(x.view(2, -1, problem.hidden), weight)}
        return LabelSmoother(0.1)(output, target.view(2, -1), shift_labels=True), output

    # One position a sequence is cut off, which matters in small problems.
    want = measured(problem, lambda *tensors: forward(*tensors)[0])
    assert predicted(problem, footprint.label_smoother) in about(want, problem, rel=0.02)


def test_levelhead_triton(monkeypatch, change_sizes):
    """Its host code runs, and its kernels write nothing: what they fill is allocated all the same."""
    softmax = pytest.importorskip("levelhead.ops.triton.softmax")
    monkeypatch.setattr(softmax, "launch", lambda *_, **__: None)
    monkeypatch.setattr(softmax, "configuration", lambda *_: {})
    for module in (softmax, levelhead.ops.sums):  # on a CPU products widen their operands
        monkeypatch.setattr(module, "addmm_", lambda out, *_, **__: out)
    change_sizes(logits_tokens=64, gradient_tokens=256)  # several chunks of small problems

    def loss(x, weight, target):
        return levelhead.linear_cross_entropy(x, weight, target, impl="chunked")

    monkeypatch.setattr(levelhead.ops.library, "implementation", lambda *_: softmax)
    for problem in PROBLEMS:
        assert_exact(problem, loss, footprint.levelhead_triton)


def committed():
    """Problem, method of the committed row, formula and measured extra bytes."""
    smoothed = {"F.cross_entropy": footprint.dense, "levelhead": footprint.levelhead_chunked}
    formulas = {
        "F.cross_entropy, torch.compile": footprint.compiled,
        "F.linear_cross_entropy, chunked": footprint.torch_chunked,
        **smoothed,
    }
    for row in json.loads(COMMITTED.read_text())["rows"]:
        name, mode = row["method"], row["mode"]
        if name not in formulas or mode not in ("forward+backward", "frozen head"):
            continue
        if not row.get("extra_bytes") or row["dtype"] != "float32":
            continue
        falls_back = row["eps"] and "linear" in name and name not in smoothed
        problem = Problem(
            row["n"], row["d"], row["v"], torch.float32, frozen=mode == "frozen head", device="cpu"
        )
        yield problem, name, footprint.dense if falls_back else formulas[name], row["extra_bytes"]


def test_committed_results():
    errors = defaultdict(list)
    for problem, name, formula, extra_bytes in committed():
        want = footprint.extra_bytes(Method(name, formula), problem)
        errors[name].append(abs(want - extra_bytes) / extra_bytes)
    assert {"F.cross_entropy", "levelhead"} <= set(errors)
    for name, of_rows in errors.items():  # seen with pytest -s
        sys.stdout.write(f"{name}: {len(of_rows)} rows, largest error {max(of_rows):.2%}\n")
        assert max(of_rows) < 0.05, name


def test_operations():
    problem = Problem(10, 4, 30, torch.bfloat16)
    nvd = 10 * 4 * 30
    for method in METHODS:
        assert footprint.operations(method, problem) == 6 * nvd
        assert footprint.operations(method, replace(problem, frozen=True)) == 4 * nvd
    shared = replace(problem, ranks=2)
    assert footprint.operations(footprint.CHUNKED, shared) == 8 * nvd / 2
    assert footprint.operations(footprint.TRANSFORMERS, shared) == 6 * nvd / 2


def test_longest_is_the_last_that_fits():
    problem = Problem(1, 4, 30, torch.bfloat16)
    for limit in (0, 1, 2, 3, 1000, 12345):
        assert footprint.longest(lambda p, limit=limit: p.tokens <= limit, problem) == limit
