"""Probabilities of choices, from the logits of their letters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from levelhead import linear_logit_stats
from levelhead.objectives.calibration_aware import choice_probabilities


@given(st.integers(0, 2**31), st.integers(2, 6), st.sampled_from([None, 4.0]))
def test_they_are_the_softmax_of_dense_logits_over_the_letters(
    seed: int, choices: int, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(32, 8, generator=generator, dtype=torch.float64)
    letters = torch.randperm(32, generator=generator)[:choices].expand(3, -1)
    picked = linear_logit_stats(hidden, weight, letters, softcap=softcap).picked
    z = hidden @ weight.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    want = z.softmax(-1).gather(1, letters)
    want = want / want.sum(-1, keepdim=True)
    torch.testing.assert_close(choice_probabilities(picked, letters), want)


def test_a_missing_choice_has_nothing_and_no_gradient() -> None:
    picked = torch.zeros(1, 3, requires_grad=True)
    p = choice_probabilities(picked, torch.tensor([[5, 6, -1]]))
    assert p.tolist() == [[0.5, 0.5, 0]]
    p[0, 0].backward()
    assert picked.grad.tolist() == [[0.25, -0.25, 0]]


def test_shapes_must_go_together() -> None:
    with pytest.raises(ValueError, match="same shape"):
        choice_probabilities(torch.rand(2, 4), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match="two choices"):
        choice_probabilities(torch.rand(2, 1), torch.zeros(2, 1).long())
