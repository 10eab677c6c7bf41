"""The traffic and FLOP model says what the host code launches: launches are recorded, and not run."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from levelhead.measure import roofline
from levelhead.measure.roofline import A100, H100, H200, Steps, Work
from levelhead.ops import library, rows, sums
from levelhead.ops.sizes import Sizes
from levelhead.ops.statistics import StatsGradient, statistics_dtype
from levelhead.ops.triton import backward, forward, softmax

D = 24  # hidden units; nothing else has this width, so a matrix with it is an input, a weight or a gradient of theirs
K = 3  # picks
NARROW, WIDE = torch.float16, torch.float32  # the dtypes with configurations for small problems
# One token; one chunk; fewer entries than picks, and one slab; several of each, the last one shorter.
SHAPES = [(1, 53), (8, 503), (40, 53), (47, 701)]
DTYPES = [(NARROW, NARROW), (NARROW, WIDE), (WIDE, WIDE), (WIDE, NARROW), (torch.float64,) * 2]
CASES = [(*shape, *dtypes) for shape, dtypes in product(SHAPES, DTYPES)]
# Gradients of float16 are kept in float32; only those of bfloat16 are narrow when the loss returns.
BFLOAT16 = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, WIDE), (WIDE, torch.bfloat16)]
LOSS_CASES = CASES + [(*shape, *dtypes) for shape, dtypes in product(SHAPES, BFLOAT16)]
PROCESSORS = 13
SMALL = replace(H200, architecture="interpreter", processors=PROCESSORS)

# What a kernel reads; all other tensors it is handed are results.
READS = {
    "state_kernel": {"x", "weight", "bias"},
    "merge_kernel": {"states", "best_ids"},
    "pick_kernel": {"x", "weight", "bias", "picks"},
    "gradient_kernel": {
        "x", "weight", "bias", "maximum", "coefficients", "picks", "grad_picked",
    },
    "softmax_kernel": {"products", "bias", "target", "token_weight", "label_smoothing"},
}  # fmt: skip
# The step of the model that a kernel is, and the steps that are passes over matrices instead.
KERNEL_STEPS = {
    "state_kernel": "logits",
    "merge_kernel": "merge",
    "pick_kernel": "picks",
    "gradient_kernel": "gradient of logits",
    "softmax_kernel": "softmax",
}
PASSES = ["mask", "narrow the weight", "fill", "unscale", "round"]


class Recorder(TorchDispatchMode):
    """Adds up what is launched, by step; "passes" are what the library does to matrices besides products."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: defaultdict[str, Work] = defaultdict(Work)

    def launch(self, kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        if not programs:
            return
        name = kernel.fn.__name__
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        sizes = {key: _bytes(value) for key, value in values.items() if isinstance(value, Tensor)}
        operations = 0
        if name in ("state_kernel", "gradient_kernel"):
            operations = 2 * len(values["x"]) * values["weight"].numel()
        if name == "state_kernel":  # is handed the room of all later shares as well
            for key, fields in (("states", 5), ("best_ids", 1)):
                sizes[key] = fields * values["shares"] * values["N"] * values[key].itemsize
        if name == "pick_kernel":  # reads of the weight what is picked
            operations = 2 * values["picks"].numel() * values["x"].shape[1]
            sizes["weight"] = len(values["picks"].unique()) * _bytes(values["weight"][0])
        read = sum(size for key, size in sizes.items() if key in READS[name])
        self.steps[KERNEL_STEPS[name]] += Work(operations, read, sum(sizes.values()) - read, 1)

    def addmm_(self, out: Tensor, a: Tensor, b: Tensor, *, alpha: float, beta: float = 1) -> Tensor:
        del alpha
        assert out.shape == (a.shape[0], b.shape[1])
        # The operand that is transposed tells the product: x W^T, da^T x, or neither, da W.
        step = "logits" if b.stride(1) != 1 else "gradient of input"
        step = "gradient of weight" if a.stride(1) != 1 else step
        read = _bytes(a) + _bytes(b) + (_bytes(out) if beta else 0)
        self.steps[step] += Work(2 * a.numel() * b.shape[1], read, _bytes(out), 1)
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty")):
            overwrites = name.startswith(("copy_", "fill_", "zero_"))
            matrices = [t for t in args[overwrites:] if _is_matrix(t)]
            written = _bytes(result) if _is_matrix(result) else 0
            if matrices or written:
                self.steps["passes"] += Work(0, sum(map(_bytes, matrices)), written, 1)
        return result


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == D


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _cut_small(monkeypatch: pytest.MonkeyPatch, change_sizes: Callable[..., Sizes]) -> None:
    """Several chunks, parts, slabs and shares in small problems; ignored rows stay, as on an accelerator."""
    monkeypatch.setattr(rows, "_can_leave_out", lambda _: False)
    monkeypatch.setattr(forward, "processors", lambda _: PROCESSORS)
    change_sizes(
        slab_bytes=100 * D * NARROW.itemsize,
        gradient_entries=100,
        entry_alignment=8,
        logits_tokens=8,
        gradient_tokens=20,
        sum_rows=64,
    )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, change_sizes: Callable[..., Sizes]) -> Recorder:
    _cut_small(monkeypatch, change_sizes)
    recorder = Recorder()
    for module in (forward, backward, softmax):
        monkeypatch.setattr(module, "launch", recorder.launch)
    for module in (sums, backward, softmax):
        monkeypatch.setattr(module, "addmm_", recorder.addmm_)
    return recorder


@pytest.mark.parametrize(("n", "v", "dtype", "weight_dtype"), CASES)
@pytest.mark.parametrize("k", [0, K])
def test_the_model_of_the_statistics_is_what_is_launched(
    n: int, v: int, dtype: torch.dtype, weight_dtype: torch.dtype, k: int, recorder: Recorder
) -> None:
    x, weight, picks = _problem(n, v, k, dtype, weight_dtype)
    with recorder:
        forward.linear_logit_stats(x, weight, picks, None, None, 1.0)
    model = roofline.statistics(n, v, D, dtype, SMALL, picks=k, weight_dtype=weight_dtype)
    assert _passes_together(model) == recorder.steps


@pytest.mark.parametrize(("n", "v", "dtype", "weight_dtype"), CASES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("k", [0, K])
def test_the_model_of_the_general_backward_is_what_is_launched(
    n: int,
    v: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    frozen: bool,
    k: int,
    recorder: Recorder,
) -> None:
    x, weight, picks = _problem(n, v, K, dtype, weight_dtype)
    token = torch.ones(n, dtype=statistics_dtype(dtype))
    gradient = StatsGradient(token, token[:, None].expand(n, k) if k else None, None, token)
    dtypes = library._gradient_dtypes(x, weight, None, [True, not frozen, False])
    with recorder:
        backward.linear_logit_stats_backward(
            gradient, token > 0, x, weight, picks, None, token, token, token, None, 1.0, dtypes
        )
    model = roofline.statistics_backward(
        n, v, D, dtype, picks=k, weight_dtype=weight_dtype, frozen=frozen
    )
    assert _passes_together(model) == recorder.steps


@pytest.mark.parametrize(("n", "v", "dtype", "weight_dtype"), LOSS_CASES)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_of_the_loss_is_what_is_launched(
    n: int, v: int, dtype: torch.dtype, weight_dtype: torch.dtype, frozen: bool, recorder: Recorder
) -> None:
    x, weight, _ = _problem(n, v, K, dtype, weight_dtype)
    token = torch.ones(n, dtype=statistics_dtype(dtype))
    dtypes = library._gradient_dtypes(x, weight, None, [True, not frozen, False])
    with recorder:
        softmax.linear_cross_entropy(
            x, weight, torch.zeros(n, dtype=torch.int64), None, token, token,
            0.0, None, 1.0, library._stored_dtypes(dtypes),
        )  # fmt: skip
    model = roofline.cross_entropy(n, v, D, dtype, weight_dtype=weight_dtype, frozen=frozen)
    assert _passes_together(model) == recorder.steps


def test_the_problems_have_one_and_several_parts_chunks_and_slabs(
    monkeypatch: pytest.MonkeyPatch, change_sizes: Callable[..., Sizes]
) -> None:
    _cut_small(monkeypatch, change_sizes)
    losses = [roofline.cross_entropy(n, v, D, NARROW) for n, v in SHAPES]
    backwards = [roofline.statistics_backward(n, v, D, NARROW) for n, v in SHAPES]
    statistics = [roofline.statistics(n, v, D, NARROW, SMALL, weight_dtype=WIDE) for n, v in SHAPES]
    for stage, step in (
        (losses, "logits"),
        (losses, "gradient of weight"),
        (backwards, "gradient of logits"),
        (statistics, "logits"),
    ):
        launches = {steps[step].launches for steps in stage}
        assert 1 in launches
        assert max(launches) > 2


def test_without_hidden_units_the_loss_moves_14_bytes_a_logit_and_the_general_backward_6() -> None:
    n, v = 512, 10**6
    for stage, expected in ((roofline.cross_entropy, 14), (roofline.statistics_backward, 6)):
        work = sum(stage(n, v, 0, torch.bfloat16).values(), Work())
        # Beside it 28 bytes a token, in the backward with every slab of 2048 entries.
        assert (work.read + work.written) / (n * v) == pytest.approx(expected, abs=28 / 2000)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_has_the_operations_of_its_bare_products(frozen: bool) -> None:
    shape = (1000, 5003, 64)
    for stage in (roofline.cross_entropy, roofline.statistics_backward):
        total = sum(stage(*shape, torch.bfloat16, frozen=frozen).values(), Work())
        (bare,) = roofline.bare_products(*shape, frozen=frozen).values()
        assert total.operations == bare.operations == (4 if frozen else 6) * 1000 * 5003 * 64


def test_the_floor_waits_in_every_step_for_products_or_memory_whichever_takes_longer() -> None:
    def step(products: int, read: int, written: int) -> Work:
        """Return the work of so many seconds each."""
        rate, bandwidth = int(H100.narrow), int(H100.bandwidth)
        return Work(products * rate, read * bandwidth, written * bandwidth, 1)

    steps = {"products": step(7, 2, 3), "memory": step(7, 4, 4)}
    assert roofline.floor(steps, H100, torch.bfloat16) == 7 + 8


def test_float32_products_have_the_rate_of_the_precision_that_torch_is_set_to() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    assert A100.rate(torch.float32) == A100.rate(torch.float64) == A100.exact
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert (A100.rate(torch.float32), A100.rate(torch.float64)) == (A100.tf32, A100.exact)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert A100.rate(torch.bfloat16) == A100.rate(torch.float16) == A100.narrow


def _problem(
    n: int, v: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return input (N, D), weight (V, D) and picks (N, K), all different as long as there are entries."""
    picks = (torch.arange(n * k) % v).view(n, k)
    return torch.zeros(n, D, dtype=dtype), torch.zeros(v, D, dtype=weight_dtype), picks


def _passes_together(steps: Steps) -> Steps:
    """Sum the steps that the recorder cannot tell apart."""
    together = {name: work for name, work in steps.items() if name not in PASSES}
    passes = [work for name, work in steps.items() if name in PASSES]
    return together | ({"passes": sum(passes, Work())} if passes else {})
