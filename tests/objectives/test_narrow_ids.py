"""Ids in a dtype as narrow as they are: beside one, torch wraps a number around before it compares."""

from typing import Any, get_args

import pytest
import torch

import levelhead
from levelhead.calibration import classwise_calibration_error
from levelhead.objectives import distillation_loss
from levelhead.objectives.distillation import Normalisation


@pytest.mark.parametrize(
    ("dtype", "entries"),
    [(torch.uint8, 256), (torch.int8, 128), (torch.int8, 200), (torch.int16, 50257)],
)
def test_a_loss_is_that_of_the_same_ids_in_int64(dtype: torch.dtype, entries: int) -> None:
    x, weight = torch.randn(3, 4), torch.randn(entries, 4)
    target = torch.tensor([3, 120, 50])
    loss = levelhead.linear_cross_entropy(x, weight, target.to(dtype))
    torch.testing.assert_close(loss, levelhead.linear_cross_entropy(x, weight, target))


@pytest.mark.parametrize("normalisation", get_args(Normalisation))
def test_no_candidate_is_taken_for_none(normalisation: Any) -> None:
    x, weight = torch.randn(3, 4), torch.randn(256, 4)
    ids = torch.tensor([[156, 2], [3, 4], [5, 6]])  # -100 as uint8 is 156
    log_probs = torch.tensor([[0.7, 0.2]] * 3).log()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return distillation_loss(x, weight, ids, log_probs, normalisation=normalisation)

    torch.testing.assert_close(loss(ids.to(torch.uint8)), loss(ids))


def test_a_calibration_error_is_that_of_the_same_classes_in_int64() -> None:
    probs = torch.rand(3, 300).softmax(1)
    target = torch.tensor([3, 120, 50])
    found = (classwise_calibration_error(probs, t) for t in (target.to(torch.uint8), target))
    torch.testing.assert_close(*found)
