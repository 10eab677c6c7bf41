"""The M-step: the distance to the targets, over the sizes of the bins."""

import pytest
import torch
from hypothesis import given
from tests.objectives import oracle
from tests.objectives.draws import Questions, questions

from levelhead.objectives.calibration_aware import (
    classwise_bins,
    classwise_ece_loss,
    confidence_bins,
    ece_loss,
    rank_preserving_target,
)


@given(questions())
def test_it_is_the_formula(drawn: Questions) -> None:
    p, target = drawn
    binned = confidence_bins(p, target)
    want = oracle.conf_loss(p.tolist(), oracle.conf_bins(p.tolist(), target.tolist(), 10))
    assert ece_loss(p, *binned).sum().item() == pytest.approx(want, rel=1e-5, abs=1e-9)


@given(questions())
def test_batches_add_up_whatever_their_size(drawn: Questions) -> None:
    p, target = drawn
    binned = confidence_bins(p, target)
    parts = [
        ece_loss(q, a, w)
        for q, a, w in zip(p.split(7), *(column.split(7) for column in binned), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), ece_loss(p, *binned))


@given(questions())
def test_its_gradient_takes_the_target_for_a_constant(drawn: Questions) -> None:
    p = drawn.probabilities.requires_grad_()
    right, size = confidence_bins(p, drawn.target)
    ece_loss(p, right, size).sum().backward()
    target = rank_preserving_target(p, right.double() / size)
    torch.testing.assert_close(p.grad, 2 * (p.detach() - target) / size[:, None])


def test_one_question_per_bin_sizes_as_much_as_a_full_bin() -> None:
    p = torch.tensor([[0.95, 0.05]] * 9 + [[0.65, 0.35]])
    losses = ece_loss(p, *confidence_bins(p, torch.tensor([0] * 9 + [1])))
    assert losses[:9].sum().item() == pytest.approx(2 * 0.05**2)
    assert losses[9].item() == pytest.approx(2 * 0.65**2)


def test_a_calibrated_certain_model_has_no_loss() -> None:
    p = torch.eye(4)
    assert ece_loss(p, *confidence_bins(p, torch.arange(4))).tolist() == [0, 0, 0, 0]


@given(questions())
def test_by_class_it_is_the_formula(drawn: Questions) -> None:
    p, target = drawn
    want = oracle.classwise_loss(p.tolist(), target.tolist(), 10)
    got = classwise_ece_loss(p, *classwise_bins(p, target)).sum().item()
    assert got == pytest.approx(want, rel=1e-5, abs=1e-9)


def test_shapes_must_go_together() -> None:
    p, three, all_of_them = torch.rand(3, 4), torch.ones(3).long(), torch.ones(3, 4).long()
    with pytest.raises(ValueError, match="size must have shape"):
        ece_loss(p, three, all_of_them)
    with pytest.raises(ValueError, match="right must have shape"):
        classwise_ece_loss(p, three, all_of_them)


def test_by_class_a_choice_that_is_not_there_has_no_loss() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]], requires_grad=True)
    size = torch.tensor([[2, 2, 0]])
    loss = classwise_ece_loss(p, torch.tensor([[2, 0, 0]]), size)
    loss.backward()
    assert loss.item() == pytest.approx((0.25 / 2 + 0.25 / 2) / 3)
    assert p.grad[0, 2] == 0
