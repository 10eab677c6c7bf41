"""What is no question, probability or bin is refused, and what stands where there is no choice counts nowhere."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.objectives.draws import Questions, accuracies, questions
from torch import Tensor

from levelhead.objectives.calibration_aware import (
    choice_probabilities,
    classwise_bins,
    classwise_ece_loss,
    confidence_bins,
    ece_loss,
    rank_preserving_target,
)

INF, NAN = torch.inf, torch.nan
ANYTHING = st.sampled_from([0.0, 0.5, 1.0, 7.0, -3.0, NAN, INF, -INF])


def widened(p: Tensor, filling: float) -> tuple[Tensor, Tensor]:
    """A choice that is not there, before all others, where an argmax would look first."""
    wide = torch.cat([torch.full((len(p), 1), filling, dtype=p.dtype), p], -1)
    there = torch.ones(wide.shape, dtype=torch.bool)
    there[:, 0] = False
    return wide, there


@given(questions(), ANYTHING)
def test_where_no_choice_is_the_bins_see_nothing(drawn: Questions, filling: float) -> None:
    p, target = drawn
    wide, there = widened(p, filling)
    assert all(
        map(torch.equal, confidence_bins(wide, target + 1, valid=there), confidence_bins(p, target))
    )
    for got, want in zip(
        classwise_bins(wide, target + 1, valid=there), classwise_bins(p, target), strict=True
    ):
        assert torch.equal(got[:, 1:], want)
        assert (got[:, 0] == 0).all()


@given(questions(), accuracies, ANYTHING)
def test_where_no_choice_is_the_losses_see_nothing(
    drawn: Questions, accuracy: float, filling: float
) -> None:
    p, target = drawn
    p.requires_grad_()
    wide, there = widened(p.detach(), filling)
    wide.requires_grad_()
    a = torch.full(p.shape[:1], accuracy, dtype=torch.float64)
    torch.testing.assert_close(
        rank_preserving_target(wide, a, valid=there)[:, 1:], rank_preserving_target(p, a)
    )
    by_class = classwise_bins(p, target)
    none = torch.zeros(len(p), 1, dtype=torch.int64)
    binned = confidence_bins(p, target)
    losses = (ece_loss(p, *binned), classwise_ece_loss(p, *by_class) * p.shape[1])
    wide_losses = (
        ece_loss(wide, *binned, valid=there),
        classwise_ece_loss(wide, *(torch.cat([none, column], -1) for column in by_class))
        * wide.shape[1],
    )
    for got, want in zip(wide_losses, losses, strict=True):
        torch.testing.assert_close(got, want)
        (mine,), (theirs,) = (
            torch.autograd.grad(loss.sum(), x) for loss, x in ((got, wide), (want, p))
        )
        torch.testing.assert_close(mine[:, 1:], theirs)
        assert (mine[:, 0] == 0).all()


P = torch.tensor([[0.9, 0.06, 0.04], [0.2, 0.7, 0.1]])
ONE = torch.tensor([[True, True, True], [False, True, False]])
RIGHT, SIZE, ACCURACY = torch.tensor([1, 1]), torch.tensor([2, 2]), torch.tensor([0.5, 0.5])
BY_CLASS = (torch.tensor([[1, 1, 0]] * 2), torch.tensor([[2, 2, 0]] * 2))


def changed(values: Tensor, at: Any, value: float) -> Tensor:
    values = values.clone()
    values[at] = value
    return values


NO_PROBABILITY = [(NAN, "is nan"), (INF, "is inf"), (1.2, "is 1.2"), (-0.1, "is -0.1")]


@pytest.mark.parametrize(("value", "text"), NO_PROBABILITY)
@pytest.mark.parametrize(
    "function",
    [
        lambda p: confidence_bins(p, torch.tensor([0, 1])),
        lambda p: classwise_bins(p, torch.tensor([0, 1])),
        lambda p: rank_preserving_target(p, ACCURACY),
        lambda p: ece_loss(p, RIGHT, SIZE),
        lambda p: classwise_ece_loss(p, *BY_CLASS),
    ],
)
def test_what_is_no_probability_is_refused(function: Any, value: float, text: str) -> None:
    """Wherever it stands, not only where it is the largest."""
    with pytest.raises(
        ValueError, match=re.escape(f"probabilities[1, 0] {text}, which is no probability")
    ):
        function(changed(P, (1, 0), value))


@pytest.mark.parametrize(
    "function",
    [
        lambda there: choice_probabilities(P, torch.where(there, 5, -1)),
        lambda there: confidence_bins(P, torch.tensor([0, 1]), valid=there),
        lambda there: classwise_bins(P, torch.tensor([0, 1]), valid=there),
        lambda there: rank_preserving_target(P, ACCURACY, valid=there),
        lambda there: ece_loss(P, RIGHT, SIZE, valid=there),
    ],
)
def test_a_question_with_one_choice_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match=re.escape("question [1] has 1 of the two choices")):
        function(ONE)


@pytest.mark.parametrize(
    ("right", "size", "text"),
    [
        (3, 2, "right[1] is 3, outside [0, size]; pass what the E-step found"),
        (-1, 2, "right[1] is -1, outside [0, size]"),
        (0, 0, "size[1] is 0, below 1; pass what the E-step found"),
        (-5, -5, "size[1] is -5, below 1"),
    ],
)
def test_what_is_no_bin_is_refused(right: int, size: int, text: str) -> None:
    columns = changed(RIGHT, 1, right), changed(SIZE, 1, size)
    with pytest.raises(ValueError, match=re.escape(text)):
        ece_loss(P, *columns)
    if size == right == 0:  # by class, a choice that is not there
        return
    by_class = (torch.stack([column] * 3, 1) for column in columns)
    with pytest.raises(ValueError, match=re.escape(text[: text.index("[")] + "[1, 0] is")):
        classwise_ece_loss(P, *by_class)


@pytest.mark.parametrize("accuracy", [NAN, INF, -0.5, 1.5])
def test_an_accuracy_is_a_share(accuracy: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"accuracy[1] is {accuracy:g}, outside [0, 1]")):
        rank_preserving_target(P, changed(ACCURACY, 1, accuracy))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: choice_probabilities([[0.0, 1.0]], torch.zeros(1, 2).long()),
            "picked must be a torch.Tensor",
        ),
        (
            lambda: choice_probabilities(P.long(), P.long()),
            "picked must be float16, bfloat16, float32 or float64",
        ),
        (lambda: choice_probabilities(P, P), "choices must hold integers, got torch.float32"),
        (lambda: choice_probabilities(P, P > 0), "choices must hold integers, got torch.bool"),
        (lambda: confidence_bins(P.tolist(), RIGHT), "probabilities must be a torch.Tensor, got ["),
        (lambda: confidence_bins(P, [0, 1]), "target must be a torch.Tensor, got ["),
        (
            lambda: confidence_bins(P > 0, RIGHT),
            "probabilities must be float16, bfloat16, float32 or float64",
        ),
        (lambda: classwise_bins(P, RIGHT, valid=ONE.long()), "valid must be bool, got torch.int64"),
        (
            lambda: rank_preserving_target(P, RIGHT),
            "accuracy must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (lambda: rank_preserving_target(P, 0.5), "accuracy must be a torch.Tensor, got 0.5"),
        (lambda: ece_loss(P, RIGHT.float(), SIZE), "right must hold integers, got torch.float32"),
        (lambda: ece_loss(P, RIGHT, SIZE > 0), "size must hold integers, got torch.bool"),
        (lambda: confidence_bins(P.to("meta"), RIGHT), "probabilities is a meta tensor"),
    ],
)
def test_another_type_is_refused(call: Any, text: str) -> None:
    with pytest.raises(TypeError, match=re.escape(text)):
        call()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: rank_preserving_target(P, ACCURACY, valid=ONE[0]), "valid must have shape (2, 3)"),
        (lambda: ece_loss(P, RIGHT, SIZE[:1]), "size must have shape (2,)"),
        (
            lambda: ece_loss(P, RIGHT.to("meta"), SIZE),
            "right is on meta but the probabilities on cpu",
        ),
        (
            lambda: choice_probabilities(P, P.long().to("meta")),
            "picked is on cpu but choices is on meta",
        ),
    ],
)
def test_another_shape_or_device_is_refused(call: Any, text: str) -> None:
    """Also where it would broadcast."""
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bins_larger_than_float16_holds(dtype: torch.dtype) -> None:
    narrow, right, size = P.to(dtype), torch.tensor([400_000] * 2), torch.tensor([800_000] * 2)
    want = ece_loss(narrow.double(), right, size)
    torch.testing.assert_close(ece_loss(narrow, right, size), want.to(dtype), rtol=1e-2, atol=1e-7)


def test_where_nobody_looks_the_question_has_nan() -> None:
    """In a compiled graph, as on an accelerator; other questions are what they were."""
    compiled = torch.compile(ece_loss, fullgraph=True, backend="aot_eager")
    by_class = torch.compile(classwise_ece_loss, fullgraph=True, backend="aot_eager")
    there = torch.ones_like(ONE)
    want = ece_loss(P, RIGHT, SIZE)[0]
    for p, right, size, valid in (
        *((changed(P, (1, 0), value), RIGHT, SIZE, there) for value, _ in NO_PROBABILITY),
        (P, changed(RIGHT, 1, 3), SIZE, there),
        (P, RIGHT, changed(SIZE, 1, -100), there),
        (P, RIGHT, SIZE, ONE),
    ):
        losses = compiled(p, right, size, valid=valid)
        assert losses[1].isnan()
        torch.testing.assert_close(losses[0], want)
    for at, right in ((1, 9), (2, 1)):  # more than there are, and of a choice that is not there
        losses = by_class(P, changed(BY_CLASS[0], (1, at), right), BY_CLASS[1])
        assert losses.isnan().tolist() == [False, True]


def test_a_student_that_is_nan_stays_nan() -> None:
    p = choice_probabilities(
        torch.tensor([[0.0, NAN, 1.0], [0.0, 1.0, INF]]), torch.tensor([[5, 6, 7]] * 2)
    )
    assert p.isnan().all()
    one = choice_probabilities(torch.tensor([[0.0, NAN, 1.0]]), torch.tensor([[5, -1, 7]]))
    assert one.isfinite().all()
