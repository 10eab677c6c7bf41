"""Narrow types: errors within twice those of the dense path, and tiny gradients that survive it."""

import contextlib

import pytest
import torch
from tests.integrations.tiny_models import batch, dense_loss, gradients, next_tokens, tiny
from torch import nn

from levelhead.integrations import patch_model
from levelhead.measure.gate import error_budget

HALVES = [torch.bfloat16, torch.float16]
# The dtype of the weights, and that of autocast.
PRECISIONS = [
    (torch.float32, None),
    *((dtype, None) for dtype in HALVES),
    *((torch.float32, dtype) for dtype in HALVES),
]


def _autocast(dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def _scale(dtype, autocast):
    """The loss scale under which float16 is trained: without it the gradients of logits vanish."""
    return 2.0**12 if torch.float16 in (dtype, autocast) else 1.0


def _step(model, loss_of, scale=1.0):
    """Loss and gradients of a step; the gradients without the scale, as an optimiser sees them."""
    loss = loss_of(model)
    return loss, {
        name: None if gradient is None else gradient.double() / scale
        for name, gradient in gradients(loss * scale, model).items()
    }


def _dense(model):
    return dense_loss(model, **batch())


def _patched(model):
    return model(**batch()).loss


@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "cohere", "phi", "gpt2"])
def test_errors_are_at_most_twice_those_of_the_dense_path(family, dtype, autocast):
    plain, patched = tiny(family, dtype), patch_model(tiny(family, dtype))
    exact = tiny(family, dtype).double()  # the truth: the same, rounded, weights in float64
    scale = _scale(dtype, autocast)
    with _autocast(autocast):
        got_loss, got = _step(patched, _patched, scale)
        dense, yardstick = _step(plain, _dense, scale)
    want_loss, want = _step(exact, _dense)

    narrow = autocast or dtype
    assert got_loss.dtype == torch.float32
    eps = torch.finfo(narrow).eps
    error, dense_error = (abs(loss.item() - want_loss.item()) for loss in (got_loss, dense))
    assert error <= error_budget(dense_error, want_loss.item(), eps)

    # Errors are taken over all gradients of the model, where the largest one sets the rounding:
    # single parameters are off by a few roundings by chance, either way.
    largest = max(gradient.abs().max().item() for gradient in want.values())
    error, dense_error = (
        max((found[name] - want[name]).abs().max().item() for name in want)
        for found in (got, yardstick)
    )
    assert error <= error_budget(dense_error, largest, eps)


@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
def test_gradients_have_the_dtype_of_their_parameters(dtype, autocast):
    model = patch_model(tiny("phi", dtype))
    with _autocast(autocast):
        model(**batch()).loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {dtype}


def test_the_head_multiplies_in_the_dtype_of_autocast():
    """Under autocast a head of float32 gets the rounded weight that a linear layer would use."""
    model = patch_model(tiny(dtype=torch.float32))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # large logits show their rounding
    wide = model(**batch()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = model(**batch()).loss
        unpatched = dense_loss(patch_model(model, 0.1).eval(), **batch())
    assert narrow.dtype == torch.float32
    # bfloat16 has 8 bits: logits of order 10 are off by some 0.02, and so is the loss
    assert 0 < abs(narrow.item() - wide.item()) < 0.05
    assert abs(narrow.item() - unpatched.item()) < 0.05


def _tiny_step(model, loss_of, scaler, divisor):
    """One step of SGD through GradScaler on a loss that is divided by `divisor`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = loss_of(model)
    scaler.scale(loss / divisor).backward()
    scaler.unscale_(optimizer)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    scaler.step(optimizer)
    scaler.update()
    return found


@pytest.mark.parametrize("divide", ["the loss", "by num_items_in_batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiny_gradients_survive_a_grad_scaler_as_in_the_dense_path(dtype, divide):
    """Gradients of order 1e-8 and less, which float16 rounds to zero before they are scaled."""
    plain, patched = tiny(dtype=dtype), patch_model(tiny(dtype=dtype))
    items = (next_tokens(batch()["labels"]) != -100).sum().item()
    many = 10**7 * items
    if divide == "the loss":
        divisor, losses = 10.0**7, (_dense, _patched)
    else:
        divisor = 1.0
        losses = (
            lambda model: dense_loss(model, **batch(), num_items=many),
            lambda model: model(**batch(), num_items_in_batch=many).loss,
        )
    results = []
    for model, loss_of in zip((plain, patched), losses, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        if dtype == torch.float16:  # which GradScaler refuses to unscale: scale by hand
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model) / divisor
            (loss * 2.0**24).backward()
            results.append({n: p.grad.double() / 2.0**24 for n, p in model.named_parameters()})
        else:
            results.append(_tiny_step(model, loss_of, scaler, divisor))
    dense, ours = results
    exact = _step(tiny(dtype=dtype).double(), _dense)[1]

    def lost(found):
        """How many of the entries that are not zero have become zero, as a share of all."""
        pairs = [(found[name], want) for name, want in exact.items()]
        zeros = sum(((got == 0) & (want != 0)).sum().item() for got, want in pairs)
        return zeros / sum(want.numel() for want in exact.values())

    largest = max(gradient.abs().max().item() for gradient in exact.values()) / 10**7
    assert largest < 2**-24  # float16's smallest number: unscaled, all would be zero
    # an entry in a thousand may fall to either side by chance
    assert lost(ours) <= lost(dense) + 1e-3
    for name, want in exact.items():
        error = (ours[name].double() - want / 10**7).abs().max().item()
        dense_error = (dense[name].double() - want / 10**7).abs().max().item()
        assert error <= error_budget(dense_error, largest, torch.finfo(torch.float16).eps), name


def test_a_gradient_of_a_float16_head_is_not_rounded_before_the_scale_reaches_it():
    """The same, where it would show: the head's own gradient is taken in the forward pass."""
    model = patch_model(tiny(dtype=torch.float16))
    weight = model.lm_head.weight
    loss = model(**batch(), num_items_in_batch=10**8).loss
    (scaled,) = torch.autograd.grad(loss * 2.0**24, weight)
    (unscaled,) = torch.autograd.grad(model(**batch(), num_items_in_batch=10**8).loss, weight)
    assert (unscaled == 0).all()  # float16 cannot hold it
    assert (scaled != 0).float().mean() > 0.9


def test_a_step_through_grad_scaler_moves_the_parameters_as_the_dense_one():
    plain, patched = tiny(dtype=torch.float32), patch_model(tiny(dtype=torch.float32))
    for model, loss_of in ((plain, _dense), (patched, _patched)):
        _tiny_step(model, loss_of, torch.amp.GradScaler("cpu", init_scale=2.0**10), 1.0)
    start = tiny(dtype=torch.float32)
    for name, want in plain.named_parameters():
        # learning rate 1: the difference of two float16 gradients of order 0.2
        torch.testing.assert_close(patched.get_parameter(name), want, rtol=0, atol=4e-4)
    assert (patched.lm_head.weight - start.lm_head.weight).abs().max() > 0.05


def test_an_overflow_is_left_to_the_scaler():
    """A scale that is too large gives gradients that are not finite, and the scaler skips them."""
    model = patch_model(tiny(dtype=torch.float32))
    before = model.lm_head.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    found = _tiny_step(model, _patched, scaler, 1.0)
    assert not all(gradient.isfinite().all() for gradient in found.values())
    assert torch.equal(model.lm_head.weight, before)
    assert scaler.get_scale() == 2.0**39


def test_a_float32_head_on_a_narrow_body_is_refused_in_words_outside_autocast():
    model = patch_model(tiny(dtype=torch.bfloat16))
    nn.Module.to(model.lm_head, torch.float32)
    with pytest.raises(TypeError, match="dtype"):
        model(**batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch()).loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32
