"""The target of the M-step: what each choice should have, given the accuracy of the bin."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.objectives import oracle
from tests.objectives.draws import Questions, accuracies, questions

from levelhead.objectives.calibration_aware import rank_preserving_target


def _others(p: torch.Tensor) -> torch.Tensor:
    return torch.arange(p.shape[-1]) != p.argmax(-1, keepdim=True)


@given(questions(), accuracies)
def test_it_is_the_formula(drawn: Questions, accuracy: float) -> None:
    p = drawn.probabilities
    got = rank_preserving_target(p, torch.full(p.shape[:1], accuracy, dtype=torch.float64))
    want = [oracle.target(row, accuracy) for row in p.tolist()]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


@given(questions(), accuracies, st.sampled_from([torch.float32, torch.float64]))
def test_the_likeliest_has_the_accuracy_and_the_others_sum_to_the_rest(
    drawn: Questions, accuracy: float, dtype: torch.dtype
) -> None:
    p = drawn.probabilities.to(dtype)
    a = torch.full(p.shape[:1], accuracy, dtype=dtype)
    got, others = rank_preserving_target(p, a), _others(p)
    assert got.dtype == dtype
    assert torch.equal(got[~others], a)
    torch.testing.assert_close(got.where(others, 0).sum(-1), 1 - a)
    assert ((got >= 0) & (got <= 1)).all()


@given(questions(), accuracies)
def test_the_others_keep_their_ranks(drawn: Questions, accuracy: float) -> None:
    p = drawn.probabilities
    got = rank_preserving_target(p, torch.full(p.shape[:1], accuracy, dtype=torch.float64))
    for row, target, others in zip(p, got, _others(p), strict=True):
        order = row[others].argsort()
        ranked, kept = row[others][order], target[others][order]
        assert (kept.diff() >= 0).all()
        assert (kept.diff()[ranked.diff() == 0] == 0).all()
        assert kept[-1] <= 2 * kept[0] + 1e-12  # all in [a, 2a]


def test_distinct_probabilities_get_distinct_targets() -> None:
    p = torch.tensor([0.05, 0.7, 0.15, 0.1])
    got = rank_preserving_target(p, torch.tensor(0.5))
    assert got[2] > got[3] > got[0]


def test_nobody_right_leaves_nothing_to_the_likeliest() -> None:
    got = rank_preserving_target(torch.tensor([0.7, 0.2, 0.1]), torch.tensor(0.0))
    assert got[0] == 0
    assert got.sum().item() == pytest.approx(1)


@given(questions())
def test_everybody_right_leaves_nothing_to_the_others(drawn: Questions) -> None:
    p = drawn.probabilities.float()
    got = rank_preserving_target(p, torch.ones(len(p)))
    assert torch.equal(got, (~_others(p)).float())


@pytest.mark.parametrize("accuracy", [0.0, 0.4, 1.0])
def test_certainty_shares_the_rest_evenly(accuracy: float) -> None:
    got = rank_preserving_target(torch.tensor([0.0, 1.0, 0.0]), torch.tensor(accuracy))
    assert got.tolist() == pytest.approx([(1 - accuracy) / 2, accuracy, (1 - accuracy) / 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_denormal_probabilities_overflow_nothing(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    p = torch.tensor([1, tiny / 4, 0], dtype=dtype)
    for accuracy in (0.0, 0.999, 1.0):
        got = rank_preserving_target(p, torch.tensor(accuracy))
        assert got.isfinite().all()
        assert got.float().sum().item() == pytest.approx(1, abs=4 * torch.finfo(dtype).eps)


@given(questions(choices=(2, 5)), accuracies)
def test_choices_that_are_not_there_change_nothing(drawn: Questions, accuracy: float) -> None:
    p = drawn.probabilities
    a = torch.full(p.shape[:1], accuracy, dtype=torch.float64)
    wide = torch.cat([p, torch.zeros(len(p), 2)], -1)
    valid = torch.arange(wide.shape[1]).expand(wide.shape) < p.shape[1]
    got = rank_preserving_target(wide, a, valid=valid)
    torch.testing.assert_close(got[:, : p.shape[1]], rank_preserving_target(p, a))
    assert (got[:, p.shape[1] :] == 0).all()


def test_it_carries_no_gradient() -> None:
    p = torch.rand(3, 4, requires_grad=True)
    assert not rank_preserving_target(p, torch.rand(3, requires_grad=True)).requires_grad


def test_shapes_must_go_together() -> None:
    with pytest.raises(ValueError, match="accuracy must have shape"):
        rank_preserving_target(torch.rand(3, 4), torch.rand(4))
    with pytest.raises(ValueError, match="two choices"):
        rank_preserving_target(torch.rand(3, 1), torch.rand(3))
