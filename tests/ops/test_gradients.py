"""When gradients are taken, what they cost, and what a second backward or a loss scale finds."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import levelhead
from levelhead.ops import library

N, D, V = 7, 4, 13


def _tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(rows, D, generator=random).to(dtype).requires_grad_() for rows in (N, V)
    )
    bias = torch.randn(V, generator=random).to(dtype).requires_grad_()
    return x, weight, torch.randint(0, V, (N,), generator=random), bias


def _flops(loss: Any) -> tuple[int, int]:
    """Floating-point operations of the forward and the backward, in units of NVD."""
    with FlopCounterMode(display=False) as forward:
        value = loss()
    with FlopCounterMode(display=False) as backward:
        if value.requires_grad:
            value.sum().backward()
    return forward.get_total_flops() // (N * V * D), backward.get_total_flops() // (N * V * D)


@pytest.mark.parametrize(
    ("reduction", "frozen", "expected"),
    [
        ("mean", (), (6, 0)),
        ("sum", (), (6, 0)),
        ("none", (), (2, 6)),
        ("mean", ("weight",), (4, 0)),
        ("mean", ("input",), (4, 0)),
        ("none", ("weight",), (2, 4)),
        ("mean", ("input", "weight"), (2, 0)),
    ],
)
def test_work_follows_from_what_is_needed(reduction: Any, frozen: Any, expected: Any) -> None:
    x, weight, target, bias = _tensors()
    x.requires_grad_("input" not in frozen)
    weight.requires_grad_("weight" not in frozen)
    bias.requires_grad_(not frozen)
    run = lambda: levelhead.linear_cross_entropy(  # noqa: E731
        x, weight, target, linear_bias=bias, reduction=reduction
    )
    assert _flops(run) == expected


def test_without_grad_nothing_of_the_gradient_is_computed() -> None:
    x, weight, target, _ = _tensors()
    with torch.no_grad():
        assert _flops(lambda: levelhead.linear_cross_entropy(x, weight, target)) == (2, 0)


def test_frozen_tensors_get_no_gradient_and_change_nothing_for_the_others() -> None:
    x, weight, target, bias = _tensors(torch.float64)
    loss = levelhead.linear_cross_entropy(x, weight, target, linear_bias=bias)
    expected = dict(zip("xwb", torch.autograd.grad(loss, (x, weight, bias)), strict=True))
    for keep in "xwb":
        leaves = {
            name: tensor.detach().requires_grad_(name == keep)
            for name, tensor in zip("xwb", (x, weight, bias), strict=True)
        }
        levelhead.linear_cross_entropy(
            leaves["x"], leaves["w"], target, linear_bias=leaves["b"]
        ).backward()
        for name, leaf in leaves.items():
            if name == keep:
                torch.testing.assert_close(leaf.grad, expected[name])
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_second_backward_is_right(dtype: torch.dtype) -> None:
    x, weight, target, bias = _tensors(dtype)
    loss = levelhead.linear_cross_entropy(
        x, weight, target, linear_bias=bias, label_smoothing=0.1, z_loss=1e-3
    )
    leaves = (x, weight, bias)
    first = torch.autograd.grad(loss * 3, leaves, retain_graph=True)
    for factor in (3, 0.5):
        again = torch.autograd.grad(loss * factor, leaves, retain_graph=True)
        expected = [g * (factor / 3) for g in first]
        tolerance = 4 * torch.finfo(dtype).eps  # one rounding each, twice over
        torch.testing.assert_close(list(again), expected, rtol=tolerance, atol=tolerance)


def test_hooks_that_hand_out_the_same_memory_in_new_tensors_get_it_scaled_once() -> None:
    x, weight, target, _ = _tensors(torch.float64)
    expected = torch.autograd.grad(levelhead.linear_cross_entropy(x, weight, target), (x, weight))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: saved.detach().numpy(), torch.from_numpy
    ):
        loss = levelhead.linear_cross_entropy(x, weight, target)
    for factor in (2.0, 3.0):
        upstream = torch.tensor(factor, dtype=torch.float64)
        found = torch.autograd.grad(loss, (x, weight), upstream, retain_graph=True)
        torch.testing.assert_close(list(found), [factor * g for g in expected])


def test_the_first_backward_consumes_the_stored_gradient_in_place() -> None:
    x, weight, target, _ = _tensors()
    loss = levelhead.linear_cross_entropy(x, weight, target)
    node = loss.grad_fn.next_functions[0][0]
    stored = node.saved_tensors[-2].data_ptr()  # of input, weight and bias
    loss.backward(torch.tensor(3.0), retain_graph=True)
    assert weight.grad is not None
    assert weight.grad.data_ptr() == stored
    first = weight.grad.clone()
    loss.backward(torch.tensor(3.0))  # what was handed out is no longer read
    torch.testing.assert_close(weight.grad, 2 * first)


def test_backward_passes_of_one_graph_may_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, target, _ = _tensors(torch.float64)
    loss = levelhead.linear_cross_entropy(x, weight, target)
    expected = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    loss = levelhead.linear_cross_entropy(x, weight, target)
    both, claim = threading.Barrier(2), library._claim
    answers: list[bool] = []

    def at_once(*arguments: Any) -> bool:
        both.wait(timeout=60)
        answers.append(claim(*arguments))
        return answers[-1]

    monkeypatch.setattr(library, "_claim", at_once)

    def backward(factor: float) -> Any:
        upstream = torch.tensor(factor, dtype=torch.float64)
        return torch.autograd.grad(loss, (x, weight), upstream, retain_graph=True)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(backward, (2.0, 3.0)))
    assert sorted(answers) == [False, True]  # one takes what is stored, the other computes it
    for factor, gradients in zip((2.0, 3.0), found, strict=True):
        torch.testing.assert_close(list(gradients), [factor * g for g in expected])


def test_an_upstream_gradient_is_not_rounded_to_a_narrow_dtype() -> None:
    """1/3 in bfloat16 is off by 2e-3: every gradient would be."""
    x, weight, target, _ = _tensors(torch.bfloat16)
    loss = levelhead.linear_cross_entropy(x, weight, target)
    (one,) = torch.autograd.grad(loss, weight, retain_graph=True)
    loss = levelhead.linear_cross_entropy(x, weight, target)
    (third,) = torch.autograd.grad(loss, weight, torch.tensor(1 / 3))
    torch.testing.assert_close(third, (one.float() / 3).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_tiny_float16_gradients_survive_until_the_loss_scale(reduction: Any) -> None:
    """A float16 gradient below 6e-8 is zero; the dense path multiplies by the loss scale first. So must we."""
    scale = 2.0**15
    x, weight, target, _ = _tensors(torch.float16)
    token_weight = torch.full((N,), 1e-6)
    logits = F.linear(x, weight).float()
    dense = F.cross_entropy(logits, target, reduction="none") * token_weight
    dense = {
        "mean": dense.sum() / token_weight.sum() * 1e-6,
        "sum": dense.sum(),
        "none": dense.sum(),
    }
    fused = levelhead.linear_cross_entropy(
        x, weight, target, token_weight=token_weight, reduction=reduction
    ).sum()
    fused = fused * 1e-6 if reduction == "mean" else fused
    expected = torch.autograd.grad(dense[reduction] * scale, (x, weight))
    actual = torch.autograd.grad(fused * scale, (x, weight))
    for got, want in zip(actual, expected, strict=True):
        assert (want != 0).float().mean() > 0.9
        # The dense path rounds logits and their gradient to float16, 1e-3 each; lost gradients would be off by 1.
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-3 * want.abs().max().item())


def test_a_loss_that_takes_no_part_in_the_backward_gives_no_gradient() -> None:
    x, weight, target, _ = _tensors()
    stats = levelhead.linear_logit_stats(x, weight, target)
    stats.mean.sum().backward()
    torch.testing.assert_close(x.grad, weight.mean(0).expand(N, D))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_of_nothing_is_what_torch_makes_of_it(reduction: Any) -> None:
    for n in (0, 3):
        x = torch.randn(n, D, requires_grad=True)
        weight = torch.randn(V, D, requires_grad=True)
        target = torch.full((n,), -100)
        expected = F.cross_entropy(x @ weight.T, target, reduction=reduction)
        actual = levelhead.linear_cross_entropy(x, weight, target, reduction=reduction)
        torch.testing.assert_close(actual, expected, equal_nan=True)
        for gradient in torch.autograd.grad(actual.sum(), (x, weight)):
            assert (gradient == 0).all()
