"""Budgets, not tolerances: an error against float64 of at most twice that of the dense path, plus one rounding."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.problems import Problem, gradients
from torch import Tensor

import levelhead
from levelhead.measure.gate import error_budget
from levelhead.ops import chunked, tile
from levelhead.ops.sizes import Sizes

N, D, V = 67, 96, 1003


@pytest.fixture(autouse=True)
def several_tiles(change_sizes: Callable[..., Sizes]) -> None:
    """A narrow head is cut in tiles to be cast, eleven here."""
    change_sizes(cast_bytes=4 * D * 100)


RUNS = [
    ("chunked", "cpu"),
    ("reference", "cpu"),
    pytest.param("chunked", "cuda", marks=pytest.mark.gpu),
    pytest.param("reference", "cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]


def _problem(
    dtype: torch.dtype,
    softcap: float | None,
    reduction: str,
    impl: str,
    device: str = "cpu",
    *,
    offset: float = 0.0,
    spread: float = 3.0,
) -> Problem:
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, D, generator=random) for rows in (N, V))
    bias = torch.randn(V, generator=random) + offset
    target = torch.randint(0, V, (N,), generator=random)
    target[::5] = -100
    problem = Problem(
        x.to(device),
        weight.to(device) * spread / D**0.5,
        target.to(device),
        linear_bias=bias.to(device),
        label_smoothing=0.1,
        softcap=softcap,
        logit_scale=1.3,
        reduction=reduction,
        impl=impl,
    )
    return problem.to(dtype)


def within_budget(name: str, actual: Tensor, truth: Tensor, yardstick: Tensor) -> None:
    error = (actual.double() - truth).abs()
    dense_error = (yardstick.double() - truth).abs().max().item()
    eps, largest = torch.finfo(actual.dtype).eps, truth.abs().max().item()
    budget = error_budget(dense_error, largest, eps)
    worst = error.flatten().argmax()
    assert error.max() <= budget, (
        f"{name}: worst at {worst.item()}: got {actual.flatten()[worst].item():.9g}, "
        f"truth {truth.flatten()[worst].item():.9g}; error {error.max().item():.3g} "
        f"> budget {budget:.3g} = 2 x {dense_error:.3g} (dense, same dtype) + {eps * largest:.3g}"
    )


@pytest.mark.parametrize(("impl", "device"), RUNS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradients_within_budget(
    dtype: torch.dtype, softcap: float | None, reduction: str, impl: str, device: str
) -> None:
    problem = _problem(dtype, softcap, reduction, impl, device)
    exact = problem.to(torch.float64)
    truth, yardstick, actual = exact.dense(), problem.dense(), problem.fused()
    assert actual.dtype == torch.float32
    _within_budget_with_gradients(problem, exact, actual, truth, yardstick)


def _within_budget_with_gradients(
    problem: Problem, exact: Problem, actual: Tensor, truth: Tensor, yardstick: Tensor
) -> None:
    within_budget("loss", actual, truth, yardstick)
    found = zip(
        ("input", "linear_weight", "linear_bias"),
        gradients(actual, problem),
        gradients(truth, exact),
        gradients(yardstick, problem),
        strict=True,
    )
    for name, got, true, dense in found:
        assert got.dtype == problem.input.dtype
        within_budget(name, got, true, dense)


FAR = [(-120.0, 3.0), (90.0, 0.1), (-3e4, 8.0)]  # the logits' offset and spread


@pytest.mark.parametrize(("impl", "device"), RUNS)
@pytest.mark.parametrize(("offset", "spread"), FAR)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0])
def test_logits_far_from_0_are_within_budget(
    offset: float, spread: float, reduction: str, eps: float, impl: str, device: str
) -> None:
    """Mostly right, so that the losses are small beside the logits that they are made of."""
    options = {"offset": offset, "spread": spread}
    problem = _problem(torch.float32, None, reduction, impl, device, **options)
    likeliest = problem.logits().argmax(1)
    problem = replace(
        problem, label_smoothing=eps, target=torch.where(problem.counts, likeliest, -100)
    )
    exact = problem.to(torch.float64)
    truth, yardstick, actual = exact.dense(), problem.dense(), problem.fused()
    _within_budget_with_gradients(problem, exact, actual, truth, yardstick)


@pytest.mark.parametrize(("impl", "device"), RUNS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("z_loss", [1e-6, 1e-4, 1e-2])
def test_a_z_loss_of_tokens_that_are_certain_is_within_budget(
    z_loss: float, reduction: str, impl: str, device: str
) -> None:
    """Where the target's probability is 1 to the last digit, the gradient of the z-loss is all there is."""
    problem = _problem(torch.float32, None, reduction, impl, device, spread=40.0)
    likeliest = problem.logits().argmax(1)
    certain = problem.logits().detach().softmax(1).amax(1) == 1
    assert certain.sum() > N / 4
    problem = replace(
        problem,
        label_smoothing=0.0,
        z_loss=z_loss,
        target=torch.where(certain, likeliest, -100),
    )
    exact = problem.to(torch.float64)
    truth, yardstick, actual = exact.dense(), problem.dense(), problem.fused()
    _within_budget_with_gradients(problem, exact, actual, truth, yardstick)
    again = problem.fused(z_loss=torch.tensor(z_loss))
    _within_budget_with_gradients(problem, exact, again, truth, yardstick)
    _within_budget_with_gradients(problem, exact, again, truth, yardstick)  # computed anew


@pytest.mark.parametrize(("impl", "device"), RUNS)
@pytest.mark.parametrize(("offset", "spread"), FAR)
def test_statistics_of_logits_far_from_0_are_within_budget(
    offset: float, spread: float, impl: str, device: str
) -> None:
    options = {"offset": offset, "spread": spread}
    problem = _problem(torch.float32, None, "none", impl, device, **options)
    exact, picks = problem.to(torch.float64), torch.arange(2 * N, device=device).view(N, 2)
    stats = levelhead.linear_logit_stats(
        problem.input, problem.linear_weight, picks, linear_bias=problem.linear_bias,
        logit_scale=problem.logit_scale, impl=impl,
    )  # fmt: skip

    def dense(p: Problem) -> dict[str, Tensor]:
        log_p = p.logits().log_softmax(1)
        return {
            "log_probs": log_p.gather(1, picks),
            "entropy": -(log_p.exp() * log_p).sum(1),
            "confidence": log_p.amax(1).exp(),
        }

    truth, yardstick = dense(exact), dense(problem)
    for name, true in truth.items():
        actual = getattr(stats, name)
        within_budget(name, actual, true, yardstick[name])
        if name != "confidence":  # whose largest logit is not differentiated
            pairs = ((actual, problem), (true, exact), (yardstick[name], problem))
            found = (gradients(*pair) for pair in pairs)
            for got, right, same in zip(*found, strict=True):
                within_budget(f"gradient of {name}", got, right, same)


@pytest.mark.parametrize(("impl", "device"), RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_within_budget_and_the_weight_gradient_stays_wide(
    dtype: torch.dtype, impl: str, device: str
) -> None:
    problem = _problem(torch.float32, None, "mean", impl, device)
    exact = problem.to(torch.float64)
    truth = exact.dense()
    with torch.autocast(device, dtype=dtype):
        yardstick, actual = problem.dense(), problem.fused()
    within_budget("loss", actual, truth, yardstick)
    expected, dense = gradients(truth, exact), gradients(yardstick, problem)
    for got, true, same in zip(gradients(actual, problem), expected, dense, strict=True):
        assert got.dtype == torch.float32
        within_budget("gradient", got, true, same)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_operands_within_budget(
    dtype: torch.dtype, softcap: float | None, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an accelerator does, narrow operands and a float32 result, with the product itself emulated."""

    def addmm(out: Tensor, a: Tensor, b: Tensor, *, alpha: float, beta: float = 1) -> None:
        assert a.dtype == b.dtype == dtype
        torch.addmm(out, a.float(), b.float(), alpha=alpha, beta=beta, out=out)

    monkeypatch.setattr(tile, "addmm_", addmm)
    monkeypatch.setattr(chunked, "_operand_dtype", lambda x: x.dtype)
    problem = _problem(dtype, softcap, reduction, "chunked")
    exact = problem.to(torch.float64)
    truth, yardstick, actual = exact.dense(), problem.dense(), problem.fused()
    within_budget("loss", actual, truth, yardstick)
    expected, dense = gradients(truth, exact), gradients(yardstick, problem)
    for got, true, same in zip(gradients(actual, problem), expected, dense, strict=True):
        within_budget("gradient", got, true, same)


def test_a_budget_can_fail() -> None:
    problem = _problem(torch.bfloat16, None, "mean", "chunked")
    truth = problem.to(torch.float64).dense()
    wrong = replace(problem, label_smoothing=0.12).fused()
    with pytest.raises(AssertionError, match=r"loss: worst at 0: got .* > budget"):
        within_budget("loss", wrong, truth, problem.dense())
