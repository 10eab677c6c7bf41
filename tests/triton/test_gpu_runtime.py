"""On a GPU: the same bits every time, whatever else it does; graphs, streams, memory, no waiting, a second GPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.problems import Problem
from tests.triton.problem import (
    GPU_RUNS,
    NARROW,
    RUNS,
    assert_loss_within_budget,
    assert_statistics_within_budget,
    make,
    shape,
    with_gradients,
)
from torch import Tensor

import levelhead
from levelhead.ops import sums
from levelhead.ops.sizes import sizes

STEPS = ["mean", "none", "statistics"]


def step(problem: Problem, kind: str) -> dict[str, Tensor]:
    """Return what a step of training computes: losses or statistics, and all gradients."""
    if kind != "statistics":
        return with_gradients({"loss": problem.fused(reduction=kind)}, problem)
    stats = levelhead.linear_logit_stats(
        problem.input, problem.linear_weight, problem.target[:, None],
        linear_bias=problem.linear_bias, softcap=problem.softcap, impl=problem.impl,
    )  # fmt: skip
    return with_gradients(stats._asdict(), problem)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("impl", "device"), RUNS)
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("dtype", [NARROW, torch.float32])
def test_two_runs_are_equal_bit_for_bit_whatever_memory_held_before(
    dtype: torch.dtype, kind: str, impl: str, device: str
) -> None:
    problem = make(shape("uneven", device), dtype, device, impl=impl)
    runs = []
    for held in (0.0, torch.nan, 1e30):
        # What is freed here is what the step is given next.
        rooms = [torch.full((size,), held, device=device) for size in (2**10, 2**16, 2**20)]
        del rooms
        runs.append(step(problem, kind))
    assert_same_bits(runs[1], runs[0])
    assert_same_bits(runs[2], runs[0])


@pytest.mark.parametrize(("impl", "device"), GPU_RUNS)
@pytest.mark.parametrize("kind", STEPS)
def test_results_do_not_depend_on_what_other_streams_do(kind: str, impl: str, device: str) -> None:
    problem = make(shape("even", device), torch.bfloat16, device, impl=impl)
    expected = step(problem, kind)
    load, ours = torch.cuda.Stream(), torch.cuda.Stream()
    noise = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(load):
        for _ in range(20):
            noise = (noise @ noise).tanh()
    beside = step(problem, kind)
    with torch.cuda.stream(ours):
        apart = step(problem, kind)
    torch.cuda.synchronize()
    assert_same_bits(beside, expected)
    assert_same_bits(apart, expected)


def _capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return the graph of a function and the results that a replay fills: warm first, on a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize(("impl", "device"), GPU_RUNS)
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_captured_step_replays_on_new_inputs_bit_for_bit(
    dtype: torch.dtype, kind: str, impl: str, device: str
) -> None:
    problem, other = (
        make(shape("even", device), dtype, device, impl=impl, seed=seed) for seed in (0, 1)
    )
    first, second = step(problem, kind), step(other, kind)
    graph, results = _capture(lambda: step(problem, kind))
    graph.replay()
    assert_same_bits(results, first)
    for name, tensor in vars(other).items():
        if isinstance(tensor, Tensor):
            getattr(problem, name).data.copy_(tensor.detach())
    graph.replay()
    assert_same_bits(results, second)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize(("impl", "device"), GPU_RUNS)
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_host_never_waits(dtype: torch.dtype, kind: str, impl: str, device: str) -> None:
    problem = make(shape("uneven", device), dtype, device, impl=impl)
    step(problem, kind)  # warm: kernels are compiled and loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(problem, kind)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _bound(problem: Problem, kind: str) -> int:
    """Return what a step may need beyond inputs and gradients, in bytes, as the modules' docstrings have it."""
    from levelhead.ops.triton import backward

    (tokens, hidden), vocabulary = problem.input.shape, len(problem.linear_weight)
    item = problem.input.itemsize
    # The input with ignored rows overwritten, and some numbers a token.
    always = tokens * hidden * item + 256 * tokens
    if kind == "none":
        entries = backward._slab_entries(problem.input, vocabulary)
        slab = next(sums.slices(vocabulary, entries, sizes().entry_alignment)).stop
        wide = 4 * hidden * (tokens + min(slab, sizes().sum_rows))
        return always + tokens * slab * item + wide
    row = -(-vocabulary // sizes().row_alignment) * sizes().row_alignment
    logits = 4 * row * sizes().logits_tokens
    if not problem.linear_weight.requires_grad:
        wide = 4 * hidden * sizes().logits_tokens
        return always + logits + item * row * sizes().logits_tokens + wide
    wide = 4 * hidden * (vocabulary + sizes().gradient_tokens)
    return always + logits + item * row * sizes().gradient_tokens + wide


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "frozen"), [("none", False), ("mean", True), ("mean", False)])
def test_memory_beyond_inputs_and_gradients_stays_under_its_bound(kind: str, frozen: bool) -> None:
    tokens, hidden, vocabulary = 6001, 1024, 65537
    options = {"impl": "triton", "linear_bias": None, "token_weight": None, "reduction": kind}
    problem = make((tokens, hidden, vocabulary), torch.bfloat16, "cuda", **options)
    problem.linear_weight.requires_grad_(not frozen)
    needed = [p for p in problem.parameters if p.requires_grad]

    def extra() -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        gradients = torch.autograd.grad(problem.fused().sum(), needed)
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
        return int(peak - before - sum(g.nbytes for g in gradients))

    extra()  # the library allocates its workspace once
    measured, logits = extra(), tokens * vocabulary * 2
    assert measured <= _bound(problem, kind)
    if frozen or kind == "none":
        assert _bound(problem, kind) < logits / 2


@pytest.mark.parametrize(("impl", "device"), GPU_RUNS)
@pytest.mark.parametrize("kind", STEPS)
def test_tensors_on_another_gpu_than_the_current_one(kind: str, impl: str, device: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = make(shape("uneven", device), torch.bfloat16, "cuda:1", impl=impl)
    with torch.cuda.device(1):
        expected = step(problem, kind)
    with torch.cuda.device(0):
        actual = step(problem, kind)
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize(("impl", "device"), RUNS)
@pytest.mark.parametrize("dtype", [NARROW, torch.float32])
def test_for_compute_sanitizer_every_kernel_with_rows_and_columns_to_spare(
    dtype: torch.dtype, impl: str, device: str
) -> None:
    """Small, because the sanitizer is slow: CONTRIBUTING.md says how."""
    problem = make((5, 6, 35) if device == "cpu" else (131, 72, 601), dtype, device, impl=impl)
    for reduction in ("mean", "none"):
        assert_loss_within_budget(replace(problem, reduction=reduction))
    assert_statistics_within_budget(problem, problem.target[:, None].expand(-1, 5) - 1)
