"""Problems for the tests that a GPU runs; without one the same tests run small, chunked or in Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.ops.test_error_budget import within_budget
from tests.problems import IMPLEMENTATIONS, INTERPRETED, Problem
from torch import Tensor

import levelhead
from levelhead.ops.statistics import LogitStats

# (impl, device): what only a GPU can show, and what shows small without one too.
GPU_RUNS = [pytest.param(impl, "cuda", marks=pytest.mark.gpu) for impl in ("triton", "chunked")]
RUNS = [(IMPLEMENTATIONS[0], "cpu"), *([] if INTERPRETED else GPU_RUNS)]
# The interpreter multiplies bfloat16 wrongly, and refuses it; TF32 it takes for float32.
NARROW = torch.float16 if INTERPRETED else torch.bfloat16
PRECISIONS = ["float16", "float32", *([] if INTERPRETED else ["bfloat16", "tf32"])]
NAMES = ("input", "linear_weight", "linear_bias")
# (N, D, V) on a GPU, and without one: no size a multiple of a tile; GPT-2; Llama 3.
SHAPES = {
    "one token": ((1, 64, 50257), (1, 4, 83)),
    "uneven": ((130, 100, 50257), (9, 6, 37)),
    "even": ((257, 768, 32000), (17, 8, 48)),
    "wide": ((8, 4096, 128256), (2, 33, 70)),
}


def shape(name: str, device: str) -> tuple[int, int, int]:
    return SHAPES[name][device == "cpu"]


def make(sizes: tuple[int, int, int], dtype: torch.dtype, device: str, **options: Any) -> Problem:
    """Return a random problem with every option in use, and logits of a few units, unless told otherwise."""
    n, d, v = sizes
    random = torch.Generator(device).manual_seed(options.pop("seed", 0))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device)

    target = torch.randint(0, v, (n,), generator=random, device=device)
    target[1::5] = -7
    options = {
        "linear_bias": normal(v),
        "token_weight": torch.rand(n, generator=random, device=device) + 0.5,
        "ignore_index": -7,
        "label_smoothing": 0.1,
        "softcap": 8.0,
        "logit_scale": 1.3,
        "z_loss": 1e-2,
        **options,
    }
    return Problem(normal(n, d), normal(v, d) * 3 / d**0.5, target, **options).to(dtype)


def exactly(problem: Problem) -> Problem:
    """Return the same problem in float64 on the CPU."""
    tensors = {
        name: value.detach().cpu()
        for name, value in vars(problem).items()
        if isinstance(value, Tensor)
    }
    if problem.token_weight is not None:
        tensors["token_weight"] = tensors["token_weight"].double()
    return replace(problem, **tensors).to(torch.float64)


def with_gradients(values: dict[str, Tensor], problem: Problem) -> dict[str, Tensor]:
    """Add, to values per token, the gradients of their sum, each value times one of a few numbers."""
    total = torch.stack(
        [(_upstream(value) * value).sum() for value in values.values() if value.requires_grad]
    ).sum()
    needed = [name for name in NAMES if _needs_gradient(getattr(problem, name))]
    gradients = torch.autograd.grad(total, [getattr(problem, name) for name in needed])
    return {**values, **dict(zip(needed, gradients, strict=True))}


def _upstream(value: Tensor) -> Tensor:
    """Return 0.5 first, which rounds nothing; some zeros; more than 1."""
    steps = torch.arange(value.numel(), device=value.device).view_as(value)
    return ((steps + 2) % 7 / 2 - 0.5).to(value.dtype)


def _needs_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def assert_loss_within_budget(problem: Problem, *, of_loss: bool = True) -> None:
    """Hold loss and gradients of a problem against float64 on the CPU, and dense PyTorch on the problem's device."""
    exact = exactly(problem)
    _freeze_alike(exact, problem)
    actual = with_gradients({"loss": problem.fused()}, problem)
    truth = with_gradients({"loss": exact.dense()}, exact)
    dense = with_gradients({"loss": problem.dense()}, problem)
    for name in NAMES:
        if name in actual:
            assert actual[name].dtype == getattr(problem, name).dtype
    assert_within_budget(actual, truth, dense, [] if of_loss else ["loss"])


def assert_statistics_within_budget(problem: Problem, picks: Tensor) -> None:
    """Hold all statistics of a problem and their gradients against float64 on the CPU."""
    exact = exactly(problem)
    stats = levelhead.linear_logit_stats(
        problem.input, problem.linear_weight, picks, linear_bias=problem.linear_bias,
        softcap=problem.softcap, logit_scale=problem.logit_scale, impl=problem.impl,
    )  # fmt: skip
    true, same = dense_statistics(exact, picks.cpu()), dense_statistics(problem, picks)
    fields = [name for name in LogitStats._fields if name != "argmax"]
    actual, truth, dense = (
        with_gradients({name: getattr(s, name) for name in fields}, p)
        for s, p in ((stats, problem), (true, exact), (same, problem))
    )
    assert_within_budget(actual, truth, dense, [])
    # Which entry is largest is right if its true logit is the largest, up to the error of one.
    chosen = exact.logits().gather(1, stats.argmax.cpu()[:, None])[:, 0]
    within_budget("argmax", chosen, truth["max"], dense["max"].cpu())


def dense_statistics(problem: Problem, picks: Tensor) -> LogitStats:
    """Return the statistics as PyTorch computes them from the logits, in float32 at least."""
    z = problem.logits()
    z = z if z.dtype == torch.float64 else z.float()
    inside = (picks >= 0) & (picks < z.shape[1])
    picked = z.gather(1, picks.where(inside, 0)).where(inside, 0)
    largest, argmax = z.detach().max(1)
    r = z - largest[:, None]
    expected = (z.softmax(1) * r).sum(1)
    return LogitStats(r.logsumexp(1), picked, r.mean(1), expected, largest, argmax)


def assert_within_budget(
    actual: dict[str, Tensor], truth: dict[str, Tensor], dense: dict[str, Tensor], but: list[str]
) -> None:
    assert actual.keys() == truth.keys() == dense.keys()
    for name in actual.keys() - set(but):
        if actual[name].numel():
            got, same = _some(actual[name]).cpu(), _some(dense[name]).cpu()
            within_budget(name, got, _some(truth[name]), same)


def _some(tensor: Tensor) -> Tensor:
    """Return every so many rows of a large gradient: float64 copies of all of it would fill the host."""
    return tensor[:: max(1, tensor.numel() // 2**25)] if tensor.dim() == 2 else tensor


def _freeze_alike(problem: Problem, like: Problem) -> None:
    for name in NAMES:
        if getattr(problem, name) is not None:
            getattr(problem, name).requires_grad_(getattr(like, name).requires_grad)


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """Yield the dtype of a precision; float32 products are TF32's inside if that is its name."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if name == "tf32" else "ieee"
    try:
        yield torch.float32 if name == "tf32" else getattr(torch, name)
    finally:
        matmul.fp32_precision = before
