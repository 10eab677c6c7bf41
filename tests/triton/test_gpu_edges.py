"""On a GPU: ids and logits that are not what a kernel would like them to be."""

from dataclasses import replace

import pytest
import torch
from tests.problems import Problem, assert_equal
from tests.triton.problem import NARROW, RUNS, dense_statistics, make, shape, with_gradients
from torch import Tensor

import levelhead
from levelhead.ops import rows

pytestmark = pytest.mark.parametrize(("impl", "device"), RUNS)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that don't count stay and are overwritten, on a CPU too."""
    monkeypatch.setattr(rows, "_can_leave_out", lambda _: False)


# numpy says so in the interpreter.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [NARROW, torch.float32])
def test_rows_that_are_ignored_may_hold_nan(
    dtype: torch.dtype, reduction: str, impl: str, device: str
) -> None:
    problem = make(shape("uneven", device), dtype, device, reduction=reduction, impl=impl)
    ignored = ~problem.counts[:, None]
    assert ignored.any()
    clean, dirty = (
        replace(problem, input=problem.input.detach().masked_fill(ignored, fill).requires_grad_())
        for fill in (0.0, torch.nan)
    )
    expected = with_gradients({"loss": clean.fused()}, clean)
    actual = with_gradients({"loss": dirty.fused()}, dirty)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert (actual["input"][ignored[:, 0]] == 0).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_where_all_ids_are_ignored(frozen: bool, impl: str, device: str) -> None:
    problem = make(shape("uneven", device), NARROW, device, impl=impl)
    problem.target.fill_(problem.ignore_index)
    problem.linear_weight.requires_grad_(not frozen)
    for reduction in ("mean", "sum", "none"):
        loss = problem.fused(reduction=reduction)
        assert loss.isnan() if reduction == "mean" else (loss == 0).all()
        needed = [p for p in problem.parameters if p.requires_grad]
        for gradient in torch.autograd.grad(loss.sum(), needed):
            assert (gradient == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_entries_that_the_bias_masks_out_do_not_count(
    reduction: str, impl: str, device: str
) -> None:
    """Up to all entries of a tile; the truth is the problem without them."""
    options = {
        "reduction": reduction,
        "softcap": None,
        "label_smoothing": 0.0,
        "token_weight": None,
    }
    problem = make(shape("uneven", device), torch.float64, device, impl=impl, **options)
    kept = _mask(problem.linear_bias.detach())
    which = kept.nonzero()[:, 0]
    problem.target[problem.counts] = which[problem.target[problem.counts] % len(which)]
    rest = _without(problem, kept)
    actual = with_gradients({"loss": problem.fused()}, problem)
    truth = with_gradients({"loss": rest.dense()}, rest)
    _assert_equal_but_for_masked_entries(actual, truth, kept)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_statistics_of_entries_that_the_bias_masks_out(
    dtype: torch.dtype, tolerance: float, impl: str, device: str
) -> None:
    """The mean of all is -inf; the expectation is that of the others, whatever its gradient is multiplied by."""
    problem = make(shape("uneven", device), dtype, device, impl=impl, softcap=None)
    kept = _mask(problem.linear_bias.detach())
    rest, picks = _without(problem, kept), problem.target[:, None]
    stats = levelhead.linear_logit_stats(
        problem.input, problem.linear_weight, picks, linear_bias=problem.linear_bias,
        logit_scale=problem.logit_scale, impl=impl,
    )  # fmt: skip
    assert (stats.mean == -torch.inf).all()
    fields = ("logsumexp", "expected", "max")
    actual, truth = (
        with_gradients({name: 3 * getattr(s, name) for name in fields}, p)
        for s, p in ((stats, problem), (dense_statistics(rest, picks), rest))
    )
    _assert_equal_but_for_masked_entries(actual, truth, kept, tolerance)


def _without(problem: Problem, kept: Tensor) -> Problem:
    """Return the problem of those entries of the vocabulary that are kept."""
    ids = (kept.cumsum(0) - 1)[problem.target.clamp(0)]
    return replace(
        problem,
        linear_weight=problem.linear_weight.detach()[kept].requires_grad_(),
        linear_bias=problem.linear_bias.detach()[kept].requires_grad_(),
        target=ids.where(problem.counts, problem.ignore_index),
    )


def _assert_equal_but_for_masked_entries(
    actual: dict[str, Tensor], truth: dict[str, Tensor], kept: Tensor, tolerance: float = 1e-11
) -> None:
    """Compare results up to rounding, a few thousand units of float64 in the last place or a hundred of float32."""
    for name in ("linear_weight", "linear_bias"):
        assert (actual[name][~kept] == 0).all()
        actual[name] = actual[name][kept]
    assert_equal(actual, truth, tolerance)


def _mask(bias: Tensor) -> Tensor:
    """Mask out every third entry and the second half, in place, and return which are left."""
    entries = torch.arange(len(bias), device=bias.device)
    masked = (entries % 3 == 0) | (entries >= len(bias) // 2)
    bias[masked] = -torch.inf
    return ~masked


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_outside_the_vocabulary_is_refused_or_makes_the_loss_nan(
    reduction: str, impl: str, device: str
) -> None:
    """Refused where looking at it costs nothing; a GPU would have to stop."""
    problem = make(shape("uneven", device), NARROW, device, impl=impl, reduction=reduction)
    for outside in (-1, len(problem.linear_weight), 2**40):
        problem.target[2] = outside
        if device == "cpu":
            with pytest.raises(IndexError, match=rf"target\[2\] is {outside}, outside"):
                problem.fused()
        else:
            loss = problem.fused()
            assert loss.isnan().sum() == 1
            assert loss[2 if reduction == "none" else ...].isnan()
