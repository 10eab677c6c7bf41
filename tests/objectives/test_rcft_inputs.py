"""RCFT refuses columns of a batch that do not fit its tokens, and options out of range."""

import math
import re
from typing import Any

import pytest
import torch
from tests.integrations.tiny_models import tiny
from torch import Tensor

from levelhead.objectives.rcft import CalibrationAware, choice_logits


def batch() -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    return {
        "input": torch.randn(2, 4, 3, generator=random),
        "linear_weight": torch.randn(9, 3, generator=random, requires_grad=True),
        "target": torch.tensor([[1, 2, 3, -100], [4, 5, -100, -100]]),
        "choices": torch.tensor([[3, 4, 5], [5, 6, -1]]),
        "answer_position": torch.tensor([2, 1]),
        "bin_right": torch.tensor([1, 0]),
        "bin_size": torch.tensor([2, 1]),
    }


def losses(objective: Any = CalibrationAware, **columns: Any) -> Tensor:
    return objective(10)(**columns, linear_bias=None, softcap=None, logit_scale=1.0)


WRONG = [
    ("target", (1, 0), 9, IndexError, "target[1, 0] is 9, outside [0, 9); -100 stands for none"),
    ("target", (1, 0), -1, IndexError, "target[1, 0] is -1, outside [0, 9)"),
    ("choices", (1, 0), 9, IndexError, "choices[1, 0] is 9, outside [0, 9); -1 stands for none"),
    ("choices", (1, 0), 6, ValueError, "choices[1] hold 6 twice; each letter is another token"),
    ("choices", (1, 0), -1, ValueError, "question [1] has 1 of the two choices"),
    ("answer_position", 1, -1, IndexError, "answer_position[1] is -1, outside [0, 4); it is where"),
    ("answer_position", 1, 4, IndexError, "answer_position[1] is 4, outside [0, 4)"),
    ("bin_right", 1, 2, ValueError, "right[1] is 2, outside [0, size]"),
    ("bin_size", 1, 0, ValueError, "size[1] is 0, below 1"),
]


@pytest.mark.parametrize(("name", "at", "value", "error", "text"), WRONG)
def test_what_does_not_fit_is_refused(
    name: str, at: Any, value: int, error: Any, text: str
) -> None:
    columns = batch()
    columns[name][at] = value
    with pytest.raises(error, match=re.escape(text)):
        losses(**columns)


def test_where_nobody_looks_the_row_has_nan() -> None:
    """In a compiled graph, as on an accelerator; the gradient of the head, which all rows share, has it too."""
    want = losses(**batch())
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for name, at, value, _, _ in WRONG:
        columns = batch()
        columns[name][at] = value
        got = compiled(**columns)
        assert got[1].isnan().any(), (name, value)
        torch.testing.assert_close(got[0], want[0])
        (gradient,) = torch.autograd.grad(got.sum(), columns["linear_weight"])
        assert gradient.isnan().any(), (name, value)


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("choices", [[3, 4]] * 2, TypeError, "choices must be a torch.Tensor, got ["),
        (
            "answer_position",
            torch.tensor([2.0, 1.0]),
            TypeError,
            "answer_position must hold integers",
        ),
        (
            "choices",
            torch.tensor([3, 4]),
            ValueError,
            "choices (B, C) and answer_position (B,), got (2, 4), (2,)",
        ),
        (
            "answer_position",
            torch.tensor([2]),
            ValueError,
            "must have shape (B, T), choices (B, C)",
        ),
        ("bin_size", torch.tensor([2.0, 1.0]), TypeError, "size must hold integers"),
    ],
)
def test_another_type_or_shape_is_refused(name: str, value: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        losses(**batch() | {name: value})


@pytest.mark.parametrize(
    "options", [{"ece_weight": math.nan}, {"ece_weight": math.inf}, {"label_smoothing": math.nan}]
)
def test_options_that_are_no_numbers_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="ece_weight finite and at least 0, label_smoothing in"):
        CalibrationAware(1, **options)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("question", -1, "question[0] is -1, outside [0, 1); number all questions"),
        ("question", 1, "question[0] is 1, outside [0, 1)"),
        ("answer_position", -1, "answer_position[0] is -1, outside [0, 4)"),
    ],
)
def test_an_e_step_refuses_numbers_out_of_range(name: str, value: int, text: str) -> None:
    """A negative one would be taken from the end."""
    rows = {
        "input_ids": torch.zeros(1, 4, dtype=torch.int64),
        "attention_mask": torch.ones(1, 4),
        "choices": torch.tensor([[3, 4]]),
        "answer_position": torch.tensor([2]),
        "question": torch.tensor([0]),
    } | {name: torch.tensor([value])}
    with pytest.raises(IndexError, match=re.escape(text)):
        choice_logits(tiny(), [rows], questions=1)
