"""A tensor of a kind that the objectives do not compute with is refused, with what makes another of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from levelhead.objectives import distillation_loss
from levelhead.objectives.calibration_aware import (
    choice_probabilities,
    confidence_bins,
    ece_loss,
    rank_preserving_target,
)
from levelhead.objectives.recalibration import scale_probabilities, smooth_probabilities

P = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
X, W, IDS = torch.randn(2, 4), torch.randn(9, 4), torch.tensor([[0, 1, 2]] * 2)
RIGHT, SIZE = torch.tensor([1, 1]), torch.tensor([2, 2])

KINDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (Tensor.to_sparse, "must be dense, got torch.sparse_coo; use "),
    "mkldnn": (Tensor.to_mkldnn, "must be dense, got torch._mkldnn; use "),
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), "got a nested tensor; give"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "got torch.float8_e4m3fn"),
    "complex": (lambda t: t + 0j, "got torch.complex64"),
}
CALLS: dict[str, Callable[[Any], Any]] = {
    "teacher_log_probs": lambda t: distillation_loss(X, W, IDS, t),
    "teacher_ids": lambda t: distillation_loss(X, W, t, P.log()),
    "scale_probabilities": lambda t: scale_probabilities(t, 0.3),
    "smooth_probabilities": lambda t: smooth_probabilities(t, 0.3),
    "choice_probabilities": lambda t: choice_probabilities(t, IDS),
    "confidence_bins": lambda t: confidence_bins(t, RIGHT),
    "ece_loss": lambda t: ece_loss(t, RIGHT, SIZE),
    "bins": lambda t: ece_loss(P, RIGHT, t),
    "rank_preserving_target": lambda t: rank_preserving_target(t, P[:, 0]),
    "valid": lambda t: rank_preserving_target(P, P[:, 0], valid=t),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_it_is_refused(call: str, kind: str) -> None:
    make, text = KINDS[kind]
    with pytest.raises(TypeError, match=text):
        CALLS[call](make(P))
