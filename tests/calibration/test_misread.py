"""What could be read as something else is refused in words, or read as it is meant."""

import math
import re

import numpy as np
import pytest
import torch

from levelhead.calibration import (
    ReliabilityTable,
    abstention,
    auroc,
    brier_score,
    calibration_error,
    classwise_calibration_error,
    compare,
    fit_temperature,
    head_capacity,
    risk_coverage,
    summarise,
)
from levelhead.calibration.capacity import head_geometry, hidden_norms, smoothed_margin

SCORE, CORRECT = [0.9, 0.8, 0.3, 0.1], [1, 0, 1, 0]
T = torch.tensor(SCORE)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (T.to("meta"), "is a meta tensor; pass a dense one that holds its values"),
        (T.to_sparse(), "is a sparse tensor"),
        (torch.nested.nested_tensor([T], layout=torch.jagged), "is a nested tensor"),
        (T.to(torch.complex64), "must hold real numbers, got torch.complex64"),
        (np.ma.array(SCORE, mask=[0, 1, 0, 0]), "is a masked array; leave out what is masked"),
    ],
    ids=["meta", "sparse", "nested", "complex", "masked"],
)
def test_tensors_and_arrays_whose_values_cannot_be_read(values, text):
    with pytest.raises(TypeError, match=re.escape(f"confidence {text}")):
        brier_score(values, CORRECT)
    with pytest.raises(TypeError, match=re.escape(f"correct {text}")):
        brier_score(SCORE, values)
    with pytest.raises(TypeError, match=re.escape(f"bins {text}")):
        calibration_error(SCORE, CORRECT, bins=values)
    with pytest.raises(TypeError, match=re.escape(f"target {text}")):
        classwise_calibration_error([[0.5, 0.5]] * 4, values)
    with pytest.raises(TypeError, match=re.escape(f"logits {text}")):
        fit_temperature(values, CORRECT)
    with pytest.raises(TypeError, match=re.escape(f"cluster {text}")):
        summarise(SCORE, CORRECT, cluster=values)


def capacity_of_four(norm=1.0, **options):
    return head_capacity(torch.eye(4), hidden_norm=norm, **options)


TAKE_NUMBERS = [
    ("wrong", lambda x: abstention(SCORE, CORRECT, wrong=x)),
    ("wrong", lambda x: abstention(SCORE, CORRECT, threshold=0.5, wrong=x)),
    ("threshold", lambda x: abstention(SCORE, CORRECT, threshold=x)),
    ("confidence_level", lambda x: summarise(SCORE, CORRECT, resamples=5, confidence_level=x)),
    ("confidence_level", lambda x: compare((SCORE, CORRECT), (SCORE, CORRECT), confidence_level=x)),
    ("hidden_norm", capacity_of_four),
    ("logit_scale", lambda x: capacity_of_four(logit_scale=x)),
    ("softcap", lambda x: capacity_of_four(softcap=x)),
    ("label_smoothing", lambda x: capacity_of_four(label_smoothing=x)),
    ("label_smoothing", lambda x: smoothed_margin(10, x)),
]


@pytest.mark.parametrize(("name", "call"), TAKE_NUMBERS)
@pytest.mark.parametrize("value", ["0.5", [0.5], 0.5j, torch.tensor([0.5, 0.6])], ids=repr)
def test_options_that_are_no_numbers(name, call, value):
    with pytest.raises(TypeError, match=re.escape(f"{name} must be a number, got {value!r}")):
        call(value)


@pytest.mark.parametrize(("name", "call"), TAKE_NUMBERS)
def test_an_option_that_nobody_could_train(name, call):
    with pytest.raises(TypeError, match=f"{name} is a constant here, and requires a gradient"):
        call(torch.tensor(0.5, requires_grad=True))


def test_options_in_tensors_and_arrays_of_one():
    assert abstention(
        SCORE, CORRECT, threshold=torch.tensor(0.5), wrong=np.float32(2)
    ) == abstention(SCORE, CORRECT, threshold=0.5, wrong=2.0)
    capacity = capacity_of_four(torch.tensor(2.0), softcap=torch.tensor(4.0))
    assert capacity == capacity_of_four(2.0, softcap=4.0)
    assert type(capacity.margin) is float


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: capacity_of_four(-1.0), "hidden_norm must be a finite number from 0 on, got -1"),
        (
            lambda: capacity_of_four(math.nan),
            "hidden_norm must be a finite number from 0 on, got nan",
        ),
        (lambda: hidden_norms(torch.tensor([-1.0, 2.0])), "a norm is at least 0, got -1"),
        (
            lambda: summarise(SCORE, CORRECT, cluster=[1, 1, 2, math.nan]),
            "cluster holds NaN in 1 of 4 rows; number all clusters",
        ),
    ],
)
def test_numbers_out_of_range(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: risk_coverage(SCORE, CORRECT, points=1.5), "points must be an int, got 1.5"),
        (lambda: risk_coverage(SCORE, CORRECT, points=math.nan), "points must be an int, got nan"),
        (lambda: risk_coverage(SCORE, CORRECT, points=True), "points must be an int, got True"),
        (lambda: summarise(SCORE, CORRECT, seed=1.5), "seed must be an int, got 1.5"),
        (lambda: summarise(SCORE, CORRECT, seed=None), "seed must be an int, got None"),
        (
            lambda: summarise(SCORE, CORRECT, metrics="ece"),
            "metrics must be a list of names, got 'ece'",
        ),
        (
            lambda: summarise(SCORE, CORRECT, metrics=iter(["ece"])),
            "metrics must be a list of names",
        ),
        (
            lambda: summarise(SCORE, CORRECT, metrics=None),
            "metrics must be a list of names, got None",
        ),
        (
            lambda: ReliabilityTable.empty().merge(3),
            "a table merges with a ReliabilityTable, got int",
        ),
        (lambda: head_geometry([[1.0]]), "linear_weight must be a tensor, got list"),
        (lambda: head_geometry(torch.eye(3), [0.0] * 3), "linear_bias must be a tensor, got list"),
        (lambda: head_geometry(torch.eye(3).to("meta")), "linear_weight is a meta tensor"),
        (lambda: head_geometry(torch.eye(3).to_sparse()), "linear_weight is a sparse tensor"),
        (
            lambda: head_geometry(torch.eye(3), gain=np.ones(3)),
            "gain must be a tensor, got ndarray",
        ),
        (lambda: hidden_norms([1.0]), "norms must be a tensor, got list"),
        (lambda: hidden_norms(torch.ones(1).to(torch.complex64)), "norms must hold real numbers"),
    ],
)
def test_what_has_another_type(call, text):
    with pytest.raises(TypeError, match=re.escape(text)):
        call()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int64])
def test_logits_of_two_classes_in_integers_keep_their_sign(dtype):
    """An unsigned integer has no negative, and the least one of int8 none of its dtype."""
    if dtype in (torch.uint8, torch.uint16):
        logits, target = [3, 7, 1, 2, 100, 0], [1, 0, 1, 1, 1, 0]
    else:
        logits, target = [3, -7, 1, 2, -128, 0], [1, 0, 0, 1, 0, 1]
    assert fit_temperature(torch.tensor(logits).to(dtype), target) == pytest.approx(
        fit_temperature([float(x) for x in logits], target)
    )


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.float16]
)
def test_classes_of_any_dtype(dtype):
    p, target = [[0.9, 0.1], [0.6, 0.4]], torch.tensor([0, 1])
    want = classwise_calibration_error(p, target)
    assert classwise_calibration_error(p, target.to(dtype)) == want
    with pytest.raises(ValueError, match="target holds 2 at position 1"):
        classwise_calibration_error(p, torch.tensor([0, 2]).to(dtype))


def test_a_table_of_nothing_has_no_terms():
    assert all(map(math.isnan, ReliabilityTable.empty().brier_decomposition()))


def test_a_complex_score_is_no_order():
    with pytest.raises(TypeError, match="score must hold real numbers"):
        auroc([0.5j, 1], [0, 1])
