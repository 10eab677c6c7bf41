"""The operators as citizens of torch.library: schema, fake, autograd, FLOP formula, autocast, meta tensors."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from tests.ops.test_error_budget import RUNS
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import levelhead

N, D, V, K = 7, 4, 13, 2


def _tensors(
    dtype: torch.dtype, grad: bool = True, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (V,))
    x, weight, bias = (torch.randn(*s, generator=random).to(device, dtype) for s in shapes)
    return x.requires_grad_(grad), weight.requires_grad_(grad), bias.requires_grad_(grad)


@pytest.mark.parametrize(("impl", "device"), RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
class TestOpcheck:
    """All four checks of torch.library.opcheck."""

    def test_statistics(self, dtype: torch.dtype, impl: str, device: str) -> None:
        x, weight, bias = _tensors(dtype, device=device)
        picks = torch.randint(-1, V + 1, (N, K), device=device)
        args = (x, weight, picks, bias, 3.0, 0.5, impl)
        opcheck(torch.ops.levelhead.linear_logit_stats.default, args)

    def test_their_backward(self, dtype: torch.dtype, impl: str, device: str) -> None:
        x, weight, bias = _tensors(dtype, grad=False, device=device)
        picks = torch.randint(-1, V + 1, (N, K), device=device)
        token = torch.rand(N, device=device)
        for mask in ([True, True, True], [False, True, False]):
            args = (token, token[:, None].expand(N, K), None, token, x, weight, picks, bias,
                    token, token, token, None, 0.5, mask, impl)  # fmt: skip
            opcheck(torch.ops.levelhead.linear_logit_stats_backward.default, args)

    def test_loss_with_gradients(self, dtype: torch.dtype, impl: str, device: str) -> None:
        x, weight, bias = _tensors(dtype, device=device)
        target = torch.randint(0, V, (N,), device=device)
        token = torch.rand(N, device=device)
        for mask in ([True, True, True], [True, False, False]):
            leaves = [t if m else t.detach() for t, m in zip((x, weight, bias), mask, strict=True)]
            args = (
                leaves[0],
                leaves[1],
                target,
                leaves[2],
                token,
                token,
                1e-3,
                3.0,
                0.5,
                mask,
                impl,
            )
            opcheck(torch.ops.levelhead.linear_cross_entropy.default, args)


@pytest.mark.parametrize("import_first", ["levelhead", "torch.utils.flop_counter"])
def test_flops_are_counted_whichever_is_imported_first(import_first: str) -> None:
    code = f"""
import {import_first}, levelhead, torch
from torch.utils.flop_counter import FlopCounterMode
x, weight = torch.randn({N}, {D}, requires_grad=True), torch.randn({V}, {D}, requires_grad=True)
with FlopCounterMode(display=False) as counter:
    levelhead.linear_cross_entropy(x, weight, torch.zeros({N}, dtype=torch.int64)).backward()
print(counter.get_total_flops())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == 6 * N * V * D


def test_flops_of_statistics_and_backward() -> None:
    x, weight, _ = _tensors(torch.float32)
    with FlopCounterMode(display=False) as counter:
        levelhead.linear_logit_stats(
            x, weight, torch.zeros(N, dtype=torch.int64)
        ).mean.sum().backward()
    assert counter.get_total_flops() == (2 + 6) * N * V * D


# In NVD, a multiply-add being two operations: the logits, and what the gradients of input and weight add.
@pytest.mark.parametrize(
    ("reduction", "needed", "forward", "backward"),
    [
        ("mean", (True, True, True), 6, 0),
        ("sum", (True, True, False), 6, 0),
        ("mean", (True, False, False), 4, 0),  # a frozen head
        ("mean", (False, True, False), 4, 0),  # a frozen body
        ("mean", (False, False, True), 2, 0),  # of the bias there is no product
        ("mean", (False, False, False), 2, None),
        ("none", (True, True, True), 2, 6),
        ("none", (True, False, False), 2, 4),
        ("none", (False, True, False), 2, 4),
        ("none", (False, False, False), 2, None),
    ],
)
def test_flops_forward_and_backward(
    reduction: Any, needed: tuple[bool, ...], forward: int, backward: int | None
) -> None:
    tensors = _tensors(torch.float32)
    x, weight, bias = (t.requires_grad_(n) for t, n in zip(tensors, needed, strict=True))
    with FlopCounterMode(display=False) as counter:
        loss = levelhead.linear_cross_entropy(
            x, weight, torch.zeros(N).long(), linear_bias=bias, reduction=reduction
        )
    assert counter.get_total_flops() == forward * N * V * D
    assert loss.requires_grad == (backward is not None)
    if backward is not None:
        with FlopCounterMode(display=False) as counter:
            loss.sum().backward()
        assert counter.get_total_flops() == backward * N * V * D


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_flops_without_grad(reduction: Any) -> None:
    x, weight, _ = _tensors(torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        levelhead.linear_cross_entropy(x, weight, torch.zeros(N).long(), reduction=reduction)
    assert counter.get_total_flops() == 2 * N * V * D


def test_flops_of_a_second_backward_are_those_of_statistics_and_their_backward() -> None:
    x, weight, _ = _tensors(torch.float32)
    loss = levelhead.linear_cross_entropy(x, weight, torch.zeros(N).long())
    loss.backward(retain_graph=True)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == (2 + 6) * N * V * D


def test_shapes_follow_on_the_meta_device() -> None:
    x, weight, target = torch.empty(2, 3, D), torch.empty(V, D), torch.empty(2, 3).long()
    meta = [t.to("meta").requires_grad_(t.is_floating_point()) for t in (x, weight, target)]
    for reduction, shape in (("mean", ()), ("none", (2, 3))):
        options: Any = {"reduction": reduction}
        loss = levelhead.linear_cross_entropy(*meta, **options)
        assert loss.shape == shape
        loss.sum().backward()
        assert meta[1].grad is not None
        assert meta[1].grad.shape == weight.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_statistics_are_float32_whatever_the_input_unless_float64(dtype: torch.dtype) -> None:
    x, weight, bias = _tensors(dtype)
    stats = levelhead.linear_logit_stats(x, weight, torch.zeros(N, K).long(), linear_bias=bias)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {f.dtype for f in stats[:5]} == {expected}
    assert stats.argmax.dtype == torch.int64


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_leading_shape_and_any_strides(reduction: Any) -> None:
    base = torch.randn(D, 3, 2).double()
    x = base.permute(2, 1, 0)[:, :-1].requires_grad_()
    weight = torch.randn(D, V).double().T.requires_grad_()
    target = torch.randint(0, V, (2, 2))
    loss = levelhead.linear_cross_entropy(x, weight, target, reduction=reduction)
    flat = [t.detach().contiguous().requires_grad_() for t in (x.reshape(-1, D), weight)]
    expected = levelhead.linear_cross_entropy(*flat, target.flatten(), reduction=reduction)
    torch.testing.assert_close(loss, expected.view_as(loss))
    gradient, weight_gradient = torch.autograd.grad(loss.sum(), (x, weight))
    flat_gradients = torch.autograd.grad(expected.sum(), flat)
    torch.testing.assert_close(gradient, flat_gradients[0].view_as(x))
    torch.testing.assert_close(weight_gradient, flat_gradients[1])


def test_one_token_needs_no_batch_dimension() -> None:
    x, weight, _ = _tensors(torch.float64, grad=False)
    loss = levelhead.linear_cross_entropy(x[0], weight, torch.tensor(3), reduction="none")
    assert loss.shape == ()
    assert levelhead.linear_logit_stats(x[0], weight, torch.tensor([3, 4])).picked.shape == (2,)


def test_narrow_integers_do_as_targets() -> None:
    x, weight, _ = _tensors(torch.float64, grad=False)
    target = torch.randint(0, V, (N,))
    expected = levelhead.linear_cross_entropy(x, weight, target)
    assert levelhead.linear_cross_entropy(x, weight, target.int()) == expected


def test_the_module_is_the_function_on_its_own_layer() -> None:
    options: Any = {"label_smoothing": 0.1, "softcap": 5.0, "logit_scale": 0.5, "z_loss": 1e-3}
    module = levelhead.LinearCrossEntropyLoss(
        D, V, bias=True, dtype=torch.float64, reduction="sum", ignore_index=2, **options
    )
    x, target, weight = torch.randn(N, D).double(), torch.randint(0, V, (N,)), torch.rand(N)
    expected = levelhead.linear_cross_entropy(
        x, module.linear.weight, target, linear_bias=module.linear.bias,
        token_weight=weight, reduction="sum", ignore_index=2, **options,
    )  # fmt: skip
    assert module(x, target, weight) == expected
    assert "label_smoothing=0.1" in repr(module)


def test_inference_mode() -> None:
    x, weight, _ = _tensors(torch.float64)
    target = torch.randint(0, V, (N,))
    expected = levelhead.linear_cross_entropy(x, weight, target).item()
    with torch.inference_mode():
        assert levelhead.linear_cross_entropy(x, weight, target).item() == pytest.approx(expected)


def test_hidden_size_zero_and_vocabulary_of_one() -> None:
    x, weight = torch.randn(3, 0, requires_grad=True), torch.randn(5, 0, requires_grad=True)
    loss = levelhead.linear_cross_entropy(x, weight, torch.tensor([0, 1, 4]))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(5.0).log())
    none = torch.zeros(0, 4, 2).long()
    assert levelhead.linear_logit_stats(
        torch.randn(0, 4, D), weight.new_ones(5, D), none
    ).mean.shape == (0, 4)
    one = torch.randn(1, D)
    assert levelhead.linear_cross_entropy(torch.randn(3, D), one, torch.zeros(3).long()) == 0
