"""The E-step: bins, their accuracies and their sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.objectives import oracle
from tests.objectives.draws import Questions, questions

from levelhead.objectives.calibration_aware import classwise_bins, confidence_bins


@given(questions(), st.integers(1, 12))
def test_counts_are_those_of_the_bin(drawn: Questions, bins: int) -> None:
    p, target = drawn
    want = oracle.conf_bins(p.tolist(), target.tolist(), bins)
    got = confidence_bins(p, target, bins=bins)
    assert list(zip(got.right.tolist(), got.size.tolist(), strict=True)) == want


def test_one_question_per_bin_is_right_or_wrong() -> None:
    p = torch.tensor([[0.55, 0.45], [0.35, 0.65], [0.75, 0.25], [1.0, 0.0]])
    got = confidence_bins(p, torch.tensor([0, 0, 1, 0]))
    assert got.right.tolist() == [1, 0, 0, 1]
    assert got.size.tolist() == [1, 1, 1, 1]


def test_the_last_bin_holds_certainty_and_a_lower_edge_its_bin() -> None:
    p = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2]], dtype=torch.float64)
    assert confidence_bins(p, torch.tensor([0, 1, 0])).size.tolist() == [2, 2, 1]


def test_of_tied_choices_the_first_is_the_answer() -> None:
    p = torch.full((2, 4), 0.25)
    assert confidence_bins(p, torch.tensor([0, 3])).right.tolist() == [1, 1]


def test_a_sum_rounded_above_one_is_certainty() -> None:
    p = torch.tensor([[1 + 1e-7, 0.0]], dtype=torch.float64)
    assert confidence_bins(p, torch.tensor([0])).right.tolist() == [1]


@given(questions())
def test_by_class_the_frequency_is_that_of_the_bin(drawn: Questions) -> None:
    p, target = drawn
    got = classwise_bins(p, target)
    for c in range(p.shape[1]):
        index = [oracle.bin_of(q, 10) for q in p[:, c].tolist()]
        for i, own in enumerate(index):
            members = [j for j, k in enumerate(index) if k == own]
            assert got.right[i, c].item() == sum(int(target[j]) == c for j in members)
            assert got.size[i, c].item() == len(members)


def test_by_class_a_choice_counts_among_the_questions_that_have_it() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.25, 0.25]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    got = classwise_bins(p, torch.tensor([0, 2]), valid=valid)
    assert got.size[:, 2].tolist() == [0, 1]
    assert got.right[:, 2].tolist() == [0, 1]
    assert got.right[:, 0].tolist() == [1, 1]


@pytest.mark.parametrize("step", [confidence_bins, classwise_bins])
@pytest.mark.parametrize(
    ("p", "target", "error", "message"),
    [
        (torch.zeros(0, 4), torch.zeros(0).long(), ValueError, "question"),
        (torch.rand(2, 1), torch.zeros(2).long(), ValueError, "two choices"),
        (torch.rand(2, 4), torch.zeros(3).long(), ValueError, "shape"),
        (torch.rand(2, 4), torch.tensor([0, 4]), ValueError, "question 1"),
        (torch.rand(2, 4), torch.tensor([-100, 0]), ValueError, "question 0"),
        (torch.rand(2, 4), torch.zeros(2), TypeError, "integers"),
        (torch.full((2, 4), torch.nan), torch.zeros(2).long(), ValueError, "nan"),
    ],
)
def test_unusable_questions_are_refused(step, p, target, error, message) -> None:
    with pytest.raises(error, match=message):
        step(p, target)


def test_an_answer_that_a_question_does_not_have_is_refused() -> None:
    valid = torch.tensor([[True, True, False]])
    with pytest.raises(ValueError, match="no such choice"):
        confidence_bins(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([2]), valid=valid)
