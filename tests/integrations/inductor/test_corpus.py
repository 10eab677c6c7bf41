"""Every spelling of the corpus: computed by the operator it is marked with, or left alone; equal either way."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.integrations.inductor.backend import pass_only
from tests.integrations.inductor.corpus import LOSS, SPELLINGS, STATISTICS
from torch import Tensor
from torch._dynamo.utils import counters

from levelhead.integrations.inductor import fusion

B, T, D, V = 2, 6, 5, 17


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()
    fusion._warn_once.cache_clear()


def _problem() -> tuple[list[Tensor], Tensor]:
    random = torch.Generator().manual_seed(0)
    h, weight, bias = (
        torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_()
        for shape in ((B, T, D), (V, D), (V,))
    )
    y = torch.randint(0, V, (B, T), generator=random)
    y[0, 2] = y[1, 4] = -100
    return [h, weight, bias], y


def _step(function: Any, parameters: list[Tensor], y: Tensor) -> tuple[Any, ...]:
    results = function(*parameters, y)
    results = results if isinstance(results, tuple) else (results,)
    gradients = torch.autograd.grad(results[0], parameters, allow_unused=True)
    return *results, *gradients


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str, dynamic: bool) -> None:
    if name == "torch_linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch 2.13's")
    if name == "gradient_by_func" and dynamic and torch.__version__ < "2.13":
        pytest.skip("by any backend: a tensor of torch.func with a symbolic size breaks Dynamo")
    function, expected = SPELLINGS[name]
    parameters, y = _problem()
    compiled = torch.compile(function, backend=pass_only(), fullgraph=True, dynamic=dynamic)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = _step(compiled, parameters, y)
    ours = [str(w.message) for w in caught if "levelhead" in str(w.message)]
    if expected in (LOSS, STATISTICS):
        assert counters["levelhead"] == {expected: 1}, ours
        assert not ours
    else:
        assert counters["levelhead"] == {"declined": 1}
        assert len(ours) == 1
        assert expected in ours[0]
        assert "corpus.py:" in ours[0]
    for got, true in zip(actual, _step(function, parameters, y), strict=True):
        if true is None:
            assert got is None
            continue
        # Rounding of the dtype that the spelling computes in; one of them rounds logits to bfloat16.
        single = torch.float32 in (actual[0].dtype, true.dtype)
        tolerance = 2e-2 if "autocast" in name else 2e-6 if single else 1e-11
        torch.testing.assert_close(got, true, rtol=tolerance, atol=tolerance)


# Made of log-probabilities; "logsumexp minus target", say, is rounded where it is written so.
OF_DIFFERENCES = [
    "nll_of_log_softmax",
    "label_smoother",
    "timm",
    "gathered_log_probs",
    "indexed",
    "one_hot",
    "normalised_logits",
    "softmax_and_log",
    "entropy_bonus",
    "two_targets",
]


@pytest.mark.parametrize("name", OF_DIFFERENCES)
def test_logits_far_from_0_lose_nothing(name: str) -> None:
    """The same bits for logits that float32 holds exactly and the same 2^15 below, by way of a constant unit."""
    function, _ = SPELLINGS[name]
    parameters, y = _problem()
    h, weight, bias = (p.detach().mul(8).round().div(8).float() for p in parameters)
    h[..., 0] = 1
    compiled = torch.compile(function, backend=pass_only(), fullgraph=True)

    def step(offset: int) -> tuple[Any, ...]:
        far = weight.clone()
        far[:, 0] += offset
        leaves = [p.clone().requires_grad_() for p in (h, far, bias)]
        loss, *_ = results = _step(compiled, leaves, y)
        return loss, results[
            -2
        ]  # the gradient of hidden states is a sum over weights, which are large now

    for far, near in zip(step(-(2**15)), step(0), strict=True):
        torch.testing.assert_close(far, near, rtol=0, atol=0)
    assert counters["levelhead"]["declined"] == 0
