"""The distillation loss and its gradients, against the dense formula in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.problems import Problem, assert_equal, problems
from torch import Tensor

from levelhead.objectives import distillation_loss

NORMALISATIONS = ["renormalised", "full", "other"]


def dense(problem: Problem, ids: Tensor, log_probs: Tensor, normalisation: str) -> Tensor:
    """The loss of each token by probabilities of the whole vocabulary, one token at a time."""
    losses = []
    for z, top, teacher in zip(problem.logits(), ids, log_probs.exp(), strict=True):
        if top[0] == -100:
            losses.append(0 * z.nan_to_num().sum())
            continue
        top, teacher = top[teacher > 0], teacher[teacher > 0]  # the rest are no candidates
        student = z.softmax(0)[top]
        if normalisation == "renormalised":
            student = student / student.sum()
        if normalisation != "other":
            teacher = teacher / teacher.sum()
        pairs = list(zip(teacher, student, strict=True))
        if normalisation == "other":
            rest = torch.ones(len(z), dtype=torch.bool)
            rest[top] = False
            pairs.append((1 - teacher.sum(), z.softmax(0)[rest].sum()))
        losses.append(sum(t * (t / s).log() for t, s in pairs if t > 1e-15) + 0 * z.sum())
    return torch.stack(losses)


@st.composite
def teachers(draw: st.DrawFn, problem: Problem) -> tuple[Tensor, Tensor]:
    """Top-k ids and log-probabilities, some of them padded, with or without a rest of the vocabulary."""
    n, v = problem.input.shape[0], len(problem.linear_weight)
    k = draw(st.integers(1, min(v, 5)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.stack([torch.randperm(v, generator=random)[:k] for _ in range(n)])
    # Of a student with other weights: from flat to all but one-hot.
    sharpness = draw(st.sampled_from([0.0, 1.0, 30.0]))
    z = sharpness * torch.randn(n, v if draw(st.booleans()) else k, generator=random).double()
    log_probs = z.log_softmax(1)[:, :k].clone()
    if draw(st.booleans()) and k > 1:
        none = torch.rand(n, k, generator=random) < 0.5
        none[:, draw(st.integers(0, k - 1))] = False
        log_probs[none] = -torch.inf
        ids[none] = draw(st.sampled_from([0, v - 1, v, v + 7, -1]))
    if k == v:  # or it would have mass where there is nothing, and the loss be infinite
        log_probs = log_probs.log_softmax(1)
    if draw(st.booleans()):
        ids[1::3] = -100
        log_probs[1::3] = torch.nan
    return ids, log_probs


@given(problems(), st.sampled_from(NORMALISATIONS), st.data())
def test_value_and_gradient_equal_the_dense_formula(
    problem: Problem, normalisation: str, data: st.DataObject
) -> None:
    ids, log_probs = data.draw(teachers(problem))
    options = {
        name: getattr(problem, name) for name in ("linear_bias", "softcap", "logit_scale", "impl")
    }
    actual = distillation_loss(
        problem.input,
        problem.linear_weight,
        ids,
        log_probs,
        normalisation=normalisation,
        reduction="none",
        **options,
    )
    expected = dense(problem, ids, log_probs, normalisation)
    tolerance = 1e-11
    if normalisation == "other" and ids.shape[1] < len(problem.linear_weight):
        # 1 - sum is known to some 1e-16, and its logarithm to that over what is left: not below 1e-4 here.
        tolerance = 1e-9
        inside = (
            problem.logits().softmax(1).gather(1, ids.clamp(0, problem.linear_weight.shape[0] - 1))
        )
        inside = inside.where(log_probs > -torch.inf, 0).sum(1).detach()
        resolved = inside < 1 - 1e-4
        actual, expected = actual.where(resolved, 0), expected.where(resolved, 0)
    assert_equal(actual, expected, tolerance)
    upstream = torch.linspace(0.5, 2, len(actual), dtype=torch.float64)
    got = torch.autograd.grad(actual, problem.parameters, upstream, allow_unused=True)
    want = torch.autograd.grad(expected, problem.parameters, upstream, allow_unused=True)
    for a, b, parameter in zip(got, want, problem.parameters, strict=True):
        zero = torch.zeros_like(parameter)
        assert_equal(zero if a is None else a, zero if b is None else b, tolerance)


def small(n: int = 6, k: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight = torch.randn(2, n // 2, 4), torch.randn(11, 4)
    top = torch.randn(2, n // 2, 11).log_softmax(-1).topk(k)
    return x.requires_grad_(), weight.requires_grad_(), top.indices, top.values


@pytest.mark.parametrize("normalisation", ["renormalised", "other"])
def test_a_student_equal_to_its_teacher_has_loss_and_gradient_zero(normalisation: Any) -> None:
    x, weight, _, _ = small()
    ids = (x @ weight.T).topk(3).indices
    log_probs = (x @ weight.T).log_softmax(-1).gather(-1, ids).detach()
    loss = distillation_loss(x, weight, ids, log_probs, normalisation=normalisation)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-6)


def test_reductions() -> None:
    x, weight, ids, log_probs = small()
    ids[0, 0] = -100
    each, total, mean, paper = (
        distillation_loss(x, weight, ids, log_probs, reduction=reduction)
        for reduction in ("none", "sum", "mean", "batchmean")
    )
    assert each[0, 0] == 0
    torch.testing.assert_close(total, each.sum())
    torch.testing.assert_close(mean, each.sum() / 5)
    torch.testing.assert_close(paper, each.sum() / 2)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_a_token_that_counts_nowhere_may_hold_nan(normalisation: Any) -> None:
    x, weight, ids, log_probs = small()
    with torch.no_grad():
        x[0, 0] = torch.nan
    log_probs[0, 0] = torch.nan
    ids[0, 0] = -100
    distillation_loss(x, weight, ids, log_probs, normalisation=normalisation).backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert x.grad is not None
    assert (x.grad[0, 0] == 0).all()


def test_a_student_that_leaves_nothing_to_the_others_is_still_led_back() -> None:
    """Beside a gap of 60 nats the other bucket is 0 in float32; the gradient must neither vanish nor be NaN."""
    z = torch.tensor([[60.0, 0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.9]]).log()
    ids = torch.tensor([[0]])
    loss = distillation_loss(z, torch.eye(4), ids, teacher, normalisation="other")
    loss.backward()
    assert z.grad is not None
    # p - t at the id itself, where t = 0.9.
    torch.testing.assert_close(z.grad[0, 0], torch.tensor(0.1), rtol=0, atol=0.02)
    torch.testing.assert_close(
        loss,
        torch.tensor(0.9).log() * 0.9 + 0.1 * torch.tensor(0.1 / 1e-6).log(),
        rtol=0.01,
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_narrow_tensors_accumulate_in_float32(dtype: torch.dtype, normalisation: Any) -> None:
    x, weight, ids, log_probs = small()
    narrow = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
    wide = [t.detach().float().requires_grad_() for t in narrow]
    for pair in (narrow, wide):
        distillation_loss(*pair, ids, log_probs, normalisation=normalisation).backward()
    for a, b in zip(narrow, wide, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=2**-7, atol=2**-10)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_it_compiles_whole(normalisation: Any) -> None:
    def step(x: Tensor, weight: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
        return distillation_loss(
            x, weight, ids, log_probs, normalisation=normalisation, softcap=5.0
        )

    x, weight, ids, log_probs = small()
    ids[1, 2] = -100
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        x.grad = weight.grad = None
        loss = function(x, weight, ids, log_probs)
        loss.backward()
        results.append((loss.detach(), x.grad, weight.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"normalisation": "softmax"}, ValueError, "unknown normalisation 'softmax'; expected one"),
        ({"reduction": "average"}, ValueError, "unknown reduction 'average'; expected one"),
        ({"teacher_log_probs": torch.zeros(2, 3, 2)}, ValueError, "must have the shape of teacher"),
        (
            {"teacher_log_probs": torch.zeros(2, 3, 3).long()},
            TypeError,
            "must be float16, bfloat16, float32 or float64",
        ),
        (
            {"teacher_ids": torch.zeros(2, 3).long()},
            ValueError,
            r"must have shape \(2, 3\) \+ \(k,",
        ),
        ({"teacher_ids": torch.zeros(2, 3, 0).long()}, ValueError, r"with k >= 1"),
        ({"teacher_ids": torch.zeros(2, 3, 3)}, TypeError, "teacher_ids must hold integer ids"),
        ({"softcap": -1.0}, ValueError, "softcap must be a positive number"),
        ({"linear_weight": torch.zeros(11, 5)}, ValueError, "input must have shape"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], says: str) -> None:
    names = ("input", "linear_weight", "teacher_ids", "teacher_log_probs")
    with pytest.raises(error, match=says):
        distillation_loss(**(dict(zip(names, small(), strict=True)) | change))
