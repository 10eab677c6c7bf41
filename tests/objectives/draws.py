"""Multiple-choice questions as hypothesis draws them."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor


class Questions(NamedTuple):
    """N questions of C choices, float64."""

    probabilities: Tensor  # (N, C)
    target: Tensor  # (N,)


@st.composite
def questions(draw: st.DrawFn, choices: tuple[int, int] = (2, 6)) -> Questions:
    """Any number of questions from one on, certain and uncertain ones, with ties."""
    n, c = draw(st.integers(1, 40)), draw(st.integers(*choices))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 0.3, 2.0, 30.0, 1000.0]))
    logits = scale * torch.randn(n, c, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        logits = logits.round()  # ties
    return Questions(logits.softmax(-1), torch.randint(c, (n,), generator=generator))


accuracies = st.one_of(st.sampled_from([0.0, 1.0, 0.25, 0.5]), st.floats(0, 1))
