"""Laws of the smoothed cross-entropy, in float64."""

from dataclasses import replace
from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.problems import INTERPRETED, Problem, assert_equal, gradients, problems

from levelhead.ops.sizes import changed


@given(problems())
def test_value_and_every_gradient_equal_torch(problem: Problem) -> None:
    expected, actual = problem.dense(), problem.fused()
    assert_equal(actual, expected)
    assert_equal(gradients(actual, problem), gradients(expected, problem))


@given(problems(label_smoothing=0.0, softcap=None, logit_scale=1.0, z_loss=0.0, token_weight=None))
def test_without_smoothing_it_is_the_cross_entropy_of_torch(problem: Problem) -> None:
    logits = F.linear(problem.input, problem.linear_weight, problem.linear_bias)
    options = {"ignore_index": problem.ignore_index, "reduction": problem.reduction}
    assert_equal(problem.fused(), F.cross_entropy(logits, problem.target, **options))


@given(problems(), st.floats(0, 1))
def test_affine_in_label_smoothing(problem: Problem, eps: float) -> None:
    hard, soft = problem.fused(label_smoothing=0.0), problem.fused(label_smoothing=1.0)
    assert_equal(problem.fused(label_smoothing=eps), (1 - eps) * hard + eps * soft)


@given(problems(), st.floats(0, 1))
def test_smoothing_as_a_tensor_equals_smoothing_as_a_number(problem: Problem, eps: float) -> None:
    expected = problem.fused(label_smoothing=eps)
    scalar = torch.tensor(eps, dtype=torch.float64)
    for tensor in (scalar, scalar.expand(problem.target.shape)):
        actual = problem.fused(label_smoothing=tensor)
        assert_equal(actual, expected)
        assert_equal(gradients(actual, problem), gradients(expected, problem))


@given(problems(softcap=None, z_loss=0.0))
def test_gradients_of_the_logits_sum_to_zero(problem: Problem) -> None:
    bias = torch.zeros(len(problem.linear_weight), dtype=torch.float64, requires_grad=True)
    problem = replace(problem, linear_bias=bias)
    *_, bias_gradient = gradients(problem.fused(), problem)
    assert_equal(bias_gradient.sum(), torch.zeros((), dtype=torch.float64))


@given(problems(softcap=None, z_loss=0.0), st.floats(-50, 50))
def test_a_shift_of_the_bias_changes_nothing(problem: Problem, shift: float) -> None:
    bias = problem.linear_bias
    bias = bias if bias is not None else torch.zeros(len(problem.linear_weight)).double()
    shifted = replace(problem, linear_bias=bias + shift)
    assert_equal(shifted.fused(), replace(problem, linear_bias=bias).fused())


@given(problems(), st.randoms(use_true_random=False))
def test_tokens_may_be_permuted(problem: Problem, random: Random) -> None:
    order = list(range(len(problem.target)))
    random.shuffle(order)
    weight = problem.token_weight
    permuted = problem.fused(
        input=problem.input[order],
        target=problem.target[order],
        token_weight=None if weight is None else weight[order],
    )
    expected = problem.fused()
    assert_equal(permuted, expected[order] if problem.reduction == "none" else expected)


@given(problems(ignore_index=-100), st.randoms(use_true_random=False))
def test_the_vocabulary_may_be_permuted(problem: Problem, random: Random) -> None:
    order = list(range(len(problem.linear_weight)))
    random.shuffle(order)
    new_id = torch.tensor(order).argsort()
    bias = problem.linear_bias
    permuted = problem.fused(
        linear_weight=problem.linear_weight[order],
        linear_bias=None if bias is None else bias[order],
        target=torch.where(problem.counts, new_id[problem.target.clamp(min=0)], problem.target),
    )
    assert_equal(permuted, problem.fused())


@given(problems(impl="chunked"), st.integers(1, 9), st.integers(8, 2000))
def test_the_size_of_chunks_and_tiles_changes_nothing(
    problem: Problem, tokens: int, budget: int
) -> None:
    expected = problem.fused()
    expected_gradients = gradients(expected, problem)
    with changed(tile_tokens=tokens, buffer_bytes=budget):
        actual = problem.fused()
        assert_equal(actual, expected)
        assert_equal(gradients(actual, problem), expected_gradients)


@given(problems(), st.booleans())
def test_ignored_tokens_are_inert_even_if_they_carry_nan(problem: Problem, leave_out: bool) -> None:
    ignored = ~problem.counts
    smoothing = torch.full(problem.target.shape, problem.label_smoothing, dtype=torch.float64)
    weight = problem.token_weight
    poisoned = replace(
        problem,
        input=problem.input.detach().masked_fill(ignored[:, None], torch.nan).requires_grad_(),
        label_smoothing=smoothing.masked_fill(ignored, torch.nan),
        token_weight=None if weight is None else weight.masked_fill(ignored, torch.nan),
    )
    with pytest.MonkeyPatch.context() as patch:
        # On an accelerator ignored rows stay in the batch; the same path, here.
        patch.setattr("levelhead.ops.rows._can_leave_out", lambda _: leave_out)
        actual, expected = poisoned.fused(), problem.fused()
        assert_equal(actual, expected)
        actual_gradients = gradients(actual, poisoned)
        assert_equal(actual_gradients, gradients(expected, problem))
    assert (actual_gradients[0][ignored] == 0).all()


@given(problems(reduction="mean"), st.sampled_from(["parameters", "token_weight"]))
def test_the_mean_over_weights_that_sum_to_zero_is_nan_and_its_gradient_zero(
    problem: Problem, of: str
) -> None:
    weight = torch.zeros(problem.target.shape, dtype=torch.float64)
    weight.requires_grad_(of == "token_weight")
    loss = problem.fused(token_weight=weight)
    assert loss.isnan()
    leaves = [*problem.parameters, *([weight] if weight.requires_grad else [])]
    assert all((g == 0).all() for g in torch.autograd.grad(loss, leaves))


@given(problems(token_weight=None, reduction="sum"), st.integers(0, 2**31))
def test_linear_in_token_weight(problem: Problem, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, len(problem.target), generator=random, dtype=torch.float64)
    separate = 2 * problem.fused(token_weight=a) - 3 * problem.fused(token_weight=b)
    together = problem.fused(token_weight=2 * a - 3 * b)
    assert_equal(together, separate)
    assert_equal(gradients(together, problem), gradients(separate, problem))


@given(problems(softcap=None, z_loss=0.0, label_smoothing=0.0, reduction="mean"))
def test_token_weight_averages_as_class_weights_of_torch_do(problem: Problem) -> None:
    class_weight = torch.linspace(0.5, 2, len(problem.linear_weight), dtype=torch.float64)
    expected = F.cross_entropy(
        problem.logits(),
        problem.target,
        weight=class_weight,
        ignore_index=problem.ignore_index,
    )
    of_target = class_weight[problem.target.where(problem.counts, 0)]
    assert_equal(problem.fused(token_weight=of_target), expected)


@given(problems(), st.floats(-4, 4))
def test_linear_in_the_upstream_gradient(problem: Problem, factor: float) -> None:
    loss = problem.fused()
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=torch.float64).view_as(loss)
    scaled = gradients(problem.fused(), problem, factor * upstream)
    assert_equal(scaled, [factor * g for g in gradients(loss, problem, upstream)])


@given(problems())
def test_differentiable_options_get_their_gradient(problem: Problem) -> None:
    n = len(problem.target)
    weight = torch.linspace(0.5, 1.5, n, dtype=torch.float64, requires_grad=True)
    eps = torch.full((n,), 0.2, dtype=torch.float64, requires_grad=True)
    loss = problem.fused(token_weight=weight, label_smoothing=eps).sum()
    weighted = replace(problem, token_weight=weight)
    hard, soft = (replace(weighted, label_smoothing=e).dense().sum() for e in (0.0, 1.0))
    expected = 0.8 * hard + 0.2 * soft
    assert_equal(loss, expected)
    (weight_gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert_equal(weight_gradient, torch.autograd.grad(expected, weight, retain_graph=True)[0])
    (eps_gradient,) = torch.autograd.grad(loss, eps)
    assert_equal(eps_gradient.sum(), soft - hard)


@given(problems(reduction="none"))
def test_gradcheck_per_token(problem: Problem) -> None:
    def loss(*parameters: torch.Tensor) -> torch.Tensor:
        x, weight, *bias = parameters
        return problem.fused(input=x, linear_weight=weight, linear_bias=bias[0] if bias else None)

    torch.autograd.gradcheck(loss, problem.parameters, fast_mode=INTERPRETED)


@given(problems(reduction="mean"))
def test_gradcheck_in_the_forward_pass(problem: Problem) -> None:
    def loss(*parameters: torch.Tensor) -> torch.Tensor:
        x, weight, *bias = parameters
        return problem.fused(input=x, linear_weight=weight, linear_bias=bias[0] if bias else None)

    # The first backward scales the stored gradient, the second recomputes it: equal up to rounding.
    torch.autograd.gradcheck(loss, problem.parameters, nondet_tol=1e-11, fast_mode=INTERPRETED)
