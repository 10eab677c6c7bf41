"""What a teacher may leave out, and what no teacher says: padding counts nowhere, and nonsense has no loss."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from levelhead.objectives import Distillation, distillation_loss

NORMALISATIONS = ["renormalised", "full", "other"]
INF, NAN = torch.inf, torch.nan


def problem(k: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, generator=random, dtype=torch.float64)
    weight = torch.randn(11, 5, generator=random, dtype=torch.float64)
    top = torch.randn(4, 11, generator=random, dtype=torch.float64).log_softmax(-1).topk(k)
    return x.requires_grad_(), weight.requires_grad_(), top.indices, top.values


def loss_and_gradients(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    loss = distillation_loss(*tensors, **options)
    return loss, *torch.autograd.grad(loss.sum(), tensors[:2])


@given(
    st.integers(1, 4),
    st.lists(st.sampled_from([0, 10, 11, 99, -1]), min_size=1, max_size=4),
    st.sampled_from(NORMALISATIONS),
    st.randoms(use_true_random=False),
)
def test_padding_changes_nothing(
    k: int, padding: list[int], normalisation: Any, random: Any
) -> None:
    """Neither where it stands nor which id it holds: of the vocabulary or not, of another candidate, twice."""
    x, weight, ids, log_probs = problem(k)
    want = loss_and_gradients(x, weight, ids, log_probs, normalisation=normalisation)
    wide = torch.cat([ids, torch.tensor(padding).expand(4, -1)], -1)
    padded = torch.cat([log_probs, torch.full((4, len(padding)), -INF).double()], -1)
    order = random.sample(range(wide.shape[1]), wide.shape[1])
    got = loss_and_gradients(
        x, weight, wide[:, order], padded[:, order], normalisation=normalisation
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_an_ignored_token_may_hold_anything(normalisation: Any) -> None:
    x, weight, ids, log_probs = problem()
    want = loss_and_gradients(x[1:], weight, ids[1:], log_probs[1:], normalisation=normalisation)
    ids[0] = torch.tensor([-100, 99, 99])
    log_probs[0] = torch.tensor([NAN, INF, 7.0])
    got = loss_and_gradients(x, weight, ids, log_probs, normalisation=normalisation)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[2], want[2])
    assert (got[1][0] == 0).all()


def test_so_may_one_whose_label_is_ignored() -> None:
    x, weight, ids, log_probs = problem()
    want = distillation_loss(x[1:], weight, ids[1:], log_probs[1:], reduction="none")
    ids[0], log_probs[0] = 99, NAN
    target = torch.tensor([-100, 1, 2, 3])
    head = {"linear_bias": None, "softcap": None, "logit_scale": 1.0}
    got = Distillation()(
        x,
        weight,
        target,
        teacher_ids=ids,
        teacher_log_probs=log_probs.float().view(torch.int32),
        **head,
    )
    torch.testing.assert_close(got, torch.cat([torch.zeros(1).double(), want]))


WRONG = [
    (
        (1, 2),
        "ids",
        11,
        IndexError,
        "teacher_ids[1, 2] is 11, outside [0, 11); give each candidate once, pad",
    ),
    ((1, 0), "ids", -1, IndexError, "teacher_ids[1, 0] is -1, outside [0, 11)"),
    ((1, 2), "ids", -100, IndexError, "teacher_ids[1, 2] is -100, outside [0, 11)"),
    (1, "ids", 4, ValueError, "teacher_ids[1] hold 4 twice; give each candidate once"),
    ((1, 2), "log_probs", NAN, ValueError, "the log-probabilities of token [1] hold NaN"),
    (
        (1, 2),
        "log_probs",
        INF,
        ValueError,
        "the log-probabilities of token [1] are of probabilities that sum to inf",
    ),
    (
        (1, 2),
        "log_probs",
        0.5,
        ValueError,
        "token [1] are of probabilities that sum to 2",
    ),
    (
        1,
        "log_probs",
        -INF,
        ValueError,
        "token [1] has no candidate, all its log-probabilities are -inf",
    ),
]


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize(("at", "column", "value", "error", "text"), WRONG)
def test_what_no_teacher_says_is_refused(
    normalisation: Any, at: Any, column: str, value: float, error: Any, text: str
) -> None:
    x, weight, ids, log_probs = problem()
    {"ids": ids, "log_probs": log_probs}[column][at] = value
    with pytest.raises(error, match=re.escape(text)):
        distillation_loss(x, weight, ids, log_probs, normalisation=normalisation)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_where_nobody_looks_it_makes_nan_of_the_token(normalisation: Any) -> None:
    """In a compiled graph, as on an accelerator: of its loss and its gradient, and of no other token's."""
    x, weight, ids, log_probs = problem()
    want, compiled = (
        wrap(lambda *args: distillation_loss(*args, normalisation=normalisation, reduction="none"))
        for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))
    )
    clean = want(x, weight, ids, log_probs)
    for at, column, value, _, _ in WRONG:
        columns = {"ids": ids.clone(), "log_probs": log_probs.clone()}
        columns[column][at] = value
        losses = compiled(x, weight, *columns.values())
        assert losses[1].isnan(), (column, value)
        torch.testing.assert_close(losses[[0, 2, 3]], clean[[0, 2, 3]])
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        if value != -INF:  # without a candidate the loss depends on no logit
            assert gradient[1].isnan().all(), (column, value)
        assert gradient[[0, 2, 3]].isfinite().all()


def test_what_cannot_be_seen_is_not_asked_for() -> None:
    tensors = [tensor.to("meta") for tensor in problem()]
    assert distillation_loss(*tensors, reduction="none").shape == (4,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_log_probabilities_of_the_whole_vocabulary_are_no_sum_above_one(dtype: Any) -> None:
    x, weight, ids, _ = problem(11)
    for scale in (0.0, 1.0, 3.0):
        log_probs = (scale * torch.randn(4, 11)).log_softmax(-1).to(dtype)
        for normalisation in NORMALISATIONS:
            loss = distillation_loss(x, weight, ids, log_probs, normalisation=normalisation)
            assert loss.isfinite()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"teacher_ids": [[0, 1, 2]] * 4}, TypeError, "teacher_ids must be a torch.Tensor, got ["),
        (
            {"teacher_log_probs": None},
            TypeError,
            "teacher_log_probs must be a torch.Tensor, got None",
        ),
        ({"linear_weight": [[0.0]]}, TypeError, "linear_weight must be a torch.Tensor, got ["),
        (
            {"teacher_ids": torch.ones(4, 3).bool()},
            TypeError,
            "must hold integer ids, got torch.bool",
        ),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got 0.5"),
        (
            {"teacher_log_probs": torch.zeros(1, 3)},
            ValueError,
            "must have the shape of teacher_ids (4, 3), got (1, 3)",
        ),
        (
            {"teacher_log_probs": torch.zeros(4, 3, device="meta")},
            ValueError,
            "teacher_log_probs is on meta but input is on cpu",
        ),
    ],
)
def test_what_is_no_column_is_refused(change: dict[str, Any], error: Any, text: str) -> None:
    names = ("input", "linear_weight", "teacher_ids", "teacher_log_probs")
    with pytest.raises(error, match=re.escape(text)):
        distillation_loss(**(dict(zip(names, problem(), strict=True)) | change))


def test_a_batch_needs_a_dimension_for_its_mean() -> None:
    x, weight, ids, log_probs = problem()
    one = distillation_loss(x[0], weight, ids[0], log_probs[0], reduction="sum")
    torch.testing.assert_close(one, distillation_loss(x[:1], weight, ids[:1], log_probs[:1]))
    with pytest.raises(
        ValueError, match=r"'batchmean' needs a first dimension of tokens, and input"
    ):
        distillation_loss(x[0], weight, ids[0], log_probs[0], reduction="batchmean")


def test_a_column_of_one_row_is_not_that_of_all() -> None:
    x, weight, ids, log_probs = problem()
    with pytest.raises(ValueError, match=re.escape("teacher_ids must have shape (4,)")):
        Distillation()(
            x,
            weight,
            torch.arange(4),
            linear_bias=None,
            softcap=None,
            logit_scale=1.0,
            teacher_ids=ids[:1],
            teacher_log_probs=log_probs,
        )
