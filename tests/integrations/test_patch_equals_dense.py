"""A patched model trains on what its unpatched twin trains on with dense label smoothing."""

import pytest
import torch
from tests.integrations.tiny_models import FAMILIES, assert_same_training, batch, dense_loss, tiny
from torch.nn.utils.parametrizations import spectral_norm

from levelhead.integrations import patch_model


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_dense_label_smoothing(family, smoothing):
    plain, patched = tiny(family), patch_model(tiny(family), smoothing)
    loss = patched(**batch()).loss
    assert_same_training(patched, loss, plain, dense_loss(plain, **batch(), smoothing=smoothing))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_smoothing_the_loss_is_transformers_own(family):
    plain, patched = tiny(family, torch.float32), patch_model(tiny(family, torch.float32), 0.0)
    # float32: both round sums of 67 terms of order one, some 1e-7 each
    assert_same_training(patched, patched(**batch()).loss, plain, plain(**batch()).loss, atol=2e-6)


def test_the_head_bias_gets_its_gradient():
    model = patch_model(tiny("phi"))
    model(**batch()).loss.backward()
    assert model.lm_head.bias.grad.abs().sum() > 0


def test_the_softcap_of_the_gemma_case_bends_its_logits():
    capped, straight = tiny("gemma2"), tiny("gemma2", final_logit_softcapping=None)
    difference = capped(**batch()).logits - straight(**batch()).logits
    assert difference.abs().max() > 1e-3


def test_a_frozen_head_gets_no_gradient_and_the_body_the_same_one():
    plain, patched = tiny(), patch_model(tiny())
    patched.lm_head.weight.requires_grad_(False)
    patched(**batch()).loss.backward()
    dense_loss(plain, **batch()).backward()
    assert patched.lm_head.weight.grad is None
    for name, parameter in patched.model.named_parameters():
        want = plain.model.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, want, rtol=0, atol=1e-12)


def test_a_parametrised_head_is_made_once_a_call():
    """Spectral norm takes a step each time the weight is read."""
    plain, patched = tiny(), tiny()
    for model in (plain, patched):
        torch.manual_seed(0)
        spectral_norm(model.lm_head)
    patch_model(patched)
    for options in ({}, {"skip_logits": False}):
        loss = patched(**batch(), **options).loss
        assert_same_training(patched, loss, plain, dense_loss(plain, **batch()))


def test_gradients_of_each_row_by_vmap_are_those_of_the_row():
    # torch's own attention has no rule for batches.
    plain, patched = (tiny(attn_implementation="eager") for _ in range(2))
    inputs = batch()
    patch_model(patched)
    parameters = {name: p.detach() for name, p in patched.named_parameters()}

    def loss(parameters, ids, labels):
        row = {"input_ids": ids[None], "labels": labels[None]}
        return torch.func.functional_call(patched, parameters, (), row).loss

    by_row = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    got = by_row(parameters, inputs["input_ids"], inputs["labels"])
    for row in range(2):
        ids, labels = inputs["input_ids"][row : row + 1], inputs["labels"][row : row + 1]
        want = torch.autograd.grad(dense_loss(plain, ids, labels), list(plain.parameters()))
        for name, gradient in zip(parameters, want, strict=True):
            torch.testing.assert_close(got[name][row], gradient, rtol=0, atol=1e-12)
