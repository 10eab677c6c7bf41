"""The k largest logits without the logits: against sorted dense ones, ties, bounds and refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.problems import Problem, assert_equal, problems
from torch import Tensor

from levelhead.ops import TopK, linear_topk
from levelhead.ops.sizes import Sizes
from levelhead.ops.topk import merge_topk


@pytest.fixture(autouse=True)
def small_tiles(change_sizes: Callable[..., Sizes]) -> None:
    change_sizes(buffer_share=0, buffer_bytes=3 * 7 * 8, tile_tokens=3, cast_bytes=5 * 6 * 4)


def dense(z: Tensor, k: int) -> TopK:
    """By Python's own sort: by value, then by id."""
    orders = [sorted(range(len(row)), key=lambda v: (-row[v], v))[:k] for row in z.tolist()]
    indices = torch.tensor(orders)
    return TopK(z.gather(1, indices), indices, (z - z.amax(1, keepdim=True)).logsumexp(1))


def fused(problem: Problem, k: int) -> TopK:
    names = ("input", "linear_weight", "linear_bias", "softcap", "logit_scale")
    return linear_topk(k=k, **{name: getattr(problem, name) for name in names})


@given(problems(), st.data())
def test_it_is_the_head_of_the_sorted_logits(problem: Problem, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(problem.linear_weight)))
    actual, expected = fused(problem, k), dense(problem.logits().detach(), k)
    assert torch.equal(actual.indices, expected.indices)
    assert_equal(tuple(actual), tuple(expected))
    assert_equal(
        actual.log_probs, problem.logits().log_softmax(1).gather(1, expected.indices).detach()
    )


levels = st.lists(st.sampled_from([-torch.inf, -1.0, 0.0, 2.0]), min_size=1, max_size=24)


def of(row: list[float], k: int) -> TopK:
    """The k largest of the logits in `row`, as the bias of a head that is all zeros."""
    bias = torch.tensor(row, dtype=torch.float64)
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    return linear_topk(nothing, torch.zeros(len(row), 1).double(), k, linear_bias=bias)


@given(levels, st.data())
def test_of_equal_logits_the_lowest_ids(row: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(row)))
    actual, expected = of(row, k), dense(torch.tensor([row], dtype=torch.float64), k)
    assert actual.indices.tolist() == expected.indices.tolist()
    assert torch.equal(actual.values, expected.values)
    if max(row) > -torch.inf:
        assert_equal(actual.logsumexp, expected.logsumexp)


def part(row: list[float], first: int, last: int, k: int) -> TopK:
    if first == last:
        none = torch.empty(1, 0, dtype=torch.float64)
        return TopK(none, none.long(), torch.full((1,), -torch.inf, dtype=torch.float64))
    top = of(row[first:last], min(k, last - first))
    return top._replace(indices=top.indices + first)


@given(levels, st.integers(1, 6), st.data())
def test_merging_is_associative_and_commutative_and_equals_the_whole(
    row: list[float], k: int, data: st.DataObject
) -> None:
    first, second = sorted(data.draw(st.integers(0, len(row))) for _ in range(2))
    a, b, c = (part(row, *ends, k) for ends in ((0, first), (first, second), (second, len(row))))
    left = merge_topk(merge_topk(a, b, k), c, k)
    others = (
        merge_topk(a, merge_topk(b, c, k), k),
        merge_topk(c, merge_topk(b, a, k), k),
        part(row, 0, len(row), k),
    )
    for other in others:
        assert torch.equal(left.indices, other.indices)
        assert torch.equal(left.values, other.values)
        assert_equal(left.logsumexp, other.logsumexp)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_operands_give_float32(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 8).to(dtype), torch.randn(40, 8).to(dtype)
    top = linear_topk(x, weight, 5)
    z = x.float() @ weight.float().T
    assert top.values.dtype == top.logsumexp.dtype == torch.float32
    assert top.values.shape == top.indices.shape == (2, 3, 5)
    torch.testing.assert_close(top.values, z.topk(5).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(top.logsumexp, z.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_no_tokens_and_nan() -> None:
    assert linear_topk(torch.zeros(0, 4), torch.zeros(9, 4), 2).indices.shape == (0, 2)
    x = torch.tensor([[1.0], [torch.nan]])
    top = linear_topk(x, torch.arange(9.0)[:, None], 2)
    assert top.indices[0].tolist() == [8, 7]
    assert top.log_probs[1].isnan().all()


def test_it_needs_no_gradient() -> None:
    top = linear_topk(torch.zeros(1, 4, requires_grad=True), torch.zeros(9, 4), 2)
    assert not top.values.requires_grad


@pytest.mark.parametrize("k", [0, 10, 2.0, None])
def test_a_k_out_of_range_is_refused(k: Any) -> None:
    with pytest.raises(ValueError, match=r"k must be a whole number from 1 to V = 9, got"):
        linear_topk(torch.zeros(1, 4), torch.zeros(9, 4), k)
