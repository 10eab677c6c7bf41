"""Entries that a bias of -inf masks out, as a padded vocabulary: nothing that is 0 times their -inf is NaN."""

from typing import Any

import pytest
import torch
from tests.problems import IMPLEMENTATIONS, Problem, assert_equal, gradients
from torch import Tensor

import levelhead
from levelhead.ops.loss import token_loss

N, D, V, MASKED = 5, 8, 9, 3


def _problem(impl: str, reduction: str, masked: int = MASKED) -> Problem:
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, D, generator=random).double().requires_grad_() for n in (N, V))
    bias = torch.zeros(V).double()
    bias[V - masked :] = -torch.inf
    target = torch.randint(V - MASKED, (N,), generator=random)
    return Problem(
        x, weight, target, linear_bias=bias.requires_grad_(), impl=impl, reduction=reduction
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(), (N,)], ids=["one", "per token"])
def test_smoothing_as_a_tensor_of_0_is_no_smoothing(
    shape: tuple[int, ...], reduction: Any, impl: str
) -> None:
    problem = _problem(impl, reduction)
    actual, expected = problem.fused(label_smoothing=torch.zeros(shape).double()), problem.dense()
    assert expected.isfinite().all()
    assert_equal(actual, expected)
    truth = gradients(expected, problem)
    for _ in range(2):  # the stored gradients, then recomputed ones
        assert_equal(gradients(actual, problem), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_smoothing_is_infinite_where_it_is_not_0(impl: str) -> None:
    eps = torch.tensor([0.0, 0.1, 0.0, 0.1, 0.0]).double()
    problem = _problem(impl, "none")
    loss = problem.fused(label_smoothing=eps)
    assert loss.isinf().tolist() == [False, True, False, True, False]
    assert_equal(loss[eps == 0], problem.dense()[eps == 0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("masked", [0, MASKED])
def test_a_learned_smoothing_of_0_has_a_gradient_that_is_not_nan(masked: int, impl: str) -> None:
    """The target's logit less the mean; 0 where that is infinite, as torch.xlogy has it."""
    problem, eps = _problem(impl, "sum", masked), torch.zeros(N).double().requires_grad_()
    (actual,) = torch.autograd.grad(problem.fused(label_smoothing=eps), eps)
    z = problem.logits().detach()
    expected = z.gather(1, problem.target[:, None])[:, 0] - z.mean(1)
    assert_equal(actual, torch.zeros_like(eps) if masked else expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_ignored_token_may_carry_a_smoothing_and_a_weight_of_nan(
    reduction: Any, impl: str
) -> None:
    def tensors(nan: float) -> dict[str, Tensor]:
        ones = torch.ones(N).double()
        ones[1] = nan
        return {"label_smoothing": 0.1 * ones, "token_weight": ones}

    problem = _problem(impl, reduction, masked=0)
    problem.target[1] = -100
    actual, expected = problem.fused(**tensors(torch.nan)), problem.fused(**tensors(1.0))
    assert_equal(actual, expected)
    assert_equal(gradients(actual, problem), gradients(expected, problem))


def test_smoothing_as_a_number_0_is_no_smoothing_where_a_loss_is_made_of_statistics() -> None:
    problem = _problem("chunked", "none", masked=1)
    stats = levelhead.linear_logit_stats(
        problem.input, problem.linear_weight, problem.target, linear_bias=problem.linear_bias
    )
    head = (stats.max, stats.relative_logsumexp, stats.picked, stats.relative_mean)
    assert_equal(token_loss(*head, 0.0, 0.0), token_loss(*head, None, 0.0))
    assert token_loss(*head, 0.0, 0.0).isfinite().any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_follows_from_the_probabilities_is_nan_where_all_entries_are_masked_out(
    impl: Any,
) -> None:
    problem = _problem(impl, "mean", masked=V)
    stats = levelhead.linear_logit_stats(
        problem.input, problem.linear_weight, problem.target,
        linear_bias=problem.linear_bias, impl=impl,
    )  # fmt: skip
    for field in (stats.confidence, stats.entropy, stats.log_probs):
        assert field.isnan().all()
