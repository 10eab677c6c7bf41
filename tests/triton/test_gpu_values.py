"""On a GPU: losses, statistics and gradients against float64 on the CPU, within the budget, for every way through."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.triton.problem import (
    NARROW,
    PRECISIONS,
    RUNS,
    SHAPES,
    assert_loss_within_budget,
    assert_statistics_within_budget,
    make,
    precision,
    shape,
)
from torch import Tensor

from levelhead.ops.sizes import Sizes

pytestmark = pytest.mark.parametrize(("impl", "device"), RUNS)
PLAIN = {"linear_bias": None, "softcap": None, "logit_scale": 1.0, "token_weight": None}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("sizes", SHAPES)
def test_every_size_in_every_precision(
    sizes: str, name: str, reduction: str, impl: str, device: str
) -> None:
    with precision(name) as dtype:
        problem = make(shape(sizes, device), dtype, device, reduction=reduction, impl=impl)
        # A single number says nothing of an error as large as the yardstick's: either may be small by chance.
        single = name == "tf32" and problem.fused().numel() == 1
        assert_loss_within_budget(problem, of_loss=not single)


@pytest.mark.parametrize("option", ["linear_bias", "softcap", "token_weight", "z_loss", "sum"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_every_option_alone(option: str, name: str, impl: str, device: str) -> None:
    options = {**PLAIN, "z_loss": 0.0, "label_smoothing": 0.0, "reduction": "mean"}
    options.pop(option, None)
    if option == "sum":
        options["reduction"] = "sum"
    with precision(name) as dtype:
        problem = make(shape("uneven", device), dtype, device, impl=impl, **options)
        # The loss here is one number: see above.
        assert_loss_within_budget(problem, of_loss=name != "tf32")


@pytest.mark.parametrize("picks_per_token", [0, 1, 5])
@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("name", PRECISIONS)
def test_statistics_and_their_gradients(
    name: str, softcap: float | None, picks_per_token: int, impl: str, device: str
) -> None:
    with precision(name) as dtype:
        problem = make(shape("uneven", device), dtype, device, impl=impl, softcap=softcap)
        tokens, vocabulary = len(problem.input), len(problem.linear_weight)
        picks = torch.randint(-1, vocabulary + 1, (tokens, picks_per_token), device=device)
        if picks_per_token:
            picks[:2, 0] = torch.tensor([-1, vocabulary], device=device)[:tokens]  # outside
        assert_statistics_within_budget(problem, picks)


@pytest.mark.parametrize("sizes", SHAPES)
def test_statistics_of_every_size(sizes: str, impl: str, device: str) -> None:
    problem = make(shape(sizes, device), NARROW, device, impl=impl)
    assert_statistics_within_budget(problem, problem.target[:, None])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "frozen", [["linear_weight"], ["input"], ["linear_weight", "linear_bias"], ["input", "linear_weight"]]
)  # fmt: skip
def test_what_is_frozen_needs_no_gradient(
    frozen: list[str], reduction: str, impl: str, device: str
) -> None:
    problem = make(shape("even", device), NARROW, device, reduction=reduction, impl=impl)
    for name in frozen:
        getattr(problem, name).requires_grad_(False)
    assert_loss_within_budget(problem)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [NARROW, torch.float32])
def test_several_chunks_and_slabs(
    dtype: torch.dtype, frozen: bool, reduction: str, impl: str, device: str,
    change_sizes: Callable[..., Sizes],
) -> None:  # fmt: skip
    problem = make(shape("even", device), dtype, device, reduction=reduction, impl=impl)
    problem.linear_weight.requires_grad_(not frozen)
    _make_small(change_sizes, len(problem.linear_weight))
    assert_loss_within_budget(problem)


def test_statistics_under_autocast_of_a_weight_narrowed_slab_by_slab(
    impl: str, device: str, change_sizes: Callable[..., Sizes]
) -> None:
    problem = make(shape("uneven", device), torch.float32, device, impl=impl)
    change_sizes(slab_bytes=problem.linear_weight.nbytes // 7)
    picks = problem.target[:, None].expand(-1, 2)
    with torch.autocast(device, dtype=NARROW):
        assert_statistics_within_budget(problem, picks)


def _make_small(change_sizes: Callable[..., Sizes], vocabulary: int) -> None:
    """Let four chunks of tokens, and several slabs of the vocabulary, make up what one does otherwise."""
    change_sizes(
        sum_rows=vocabulary // 5,
        buffer_share=0,
        buffer_bytes=4 * vocabulary * 8,
        gradient_share=0,
        gradient_entries=vocabulary // 3,
        entry_alignment=8,  # 16 bytes, or one slab holds a small vocabulary
        logits_tokens=3,
        gradient_tokens=5,
    )


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T


def _with_gaps(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], 2)[:, :, 0]


def _rows_apart(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]


def _expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", [_transposed, _with_gaps, _rows_apart, _expanded])
@pytest.mark.parametrize("name", ["input", "linear_weight"])
def test_any_strides(
    name: str, layout: Callable[[Tensor], Tensor], reduction: str, impl: str, device: str
) -> None:
    problem = make(shape("uneven", device), NARROW, device, reduction=reduction, impl=impl)
    tensor = layout(getattr(problem, name).detach()).requires_grad_()
    assert tensor.stride() != getattr(problem, name).stride()
    assert_loss_within_budget(replace(problem, **{name: tensor}))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bias_and_targets_apart_in_memory(reduction: str, impl: str, device: str) -> None:
    problem = make(shape("uneven", device), NARROW, device, reduction=reduction, impl=impl)
    bias = torch.stack([problem.linear_bias.detach()] * 2, 1)[:, 0].requires_grad_()
    target = torch.stack([problem.target] * 2, 1)[:, 0]
    weight = torch.stack([problem.token_weight] * 2, 1)[:, 0]
    smoothing = torch.tensor(0.1, device=device)
    apart = replace(problem, linear_bias=bias, target=target, token_weight=weight)
    torch.testing.assert_close(
        apart.fused(label_smoothing=smoothing), problem.fused(), rtol=0, atol=0
    )
    assert_loss_within_budget(apart)
