"""A patched model trains on what its unpatched twin trains on with dense label smoothing."""

import pytest
import torch
from tests.integrations.tiny_models import FAMILIES, assert_same_training, batch, dense_loss, tiny

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
