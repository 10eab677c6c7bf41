"""Patched models do not see each other's calls."""

import pytest
import torch
from tests.integrations.tiny_models import batch, dense_loss, tiny

from levelhead.integrations import patch_model


def test_two_patched_models_interleaved():
    llama, gemma = patch_model(tiny("llama"), 0.1), patch_model(tiny("gemma2"), 0.3)
    losses = llama(**batch()).loss, gemma(**batch()).loss
    want = (
        dense_loss(tiny("llama"), **batch()),
        dense_loss(tiny("gemma2"), **batch(), smoothing=0.3),
    )
    torch.testing.assert_close(losses, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inner_trains", [True, False])
def test_a_patched_model_called_inside_the_forward_of_another(inner_trains):
    outer, inner = patch_model(tiny("llama")), patch_model(tiny("gemma2")).train(inner_trains)
    seen = []

    def call_inner(*_):
        with torch.set_grad_enabled(inner_trains):
            seen.append(inner(**batch()))

    outer.model.register_forward_hook(call_inner)
    want = dense_loss(tiny("llama"), **batch())
    torch.testing.assert_close(outer(**batch()).loss, want, rtol=0, atol=1e-12)
    assert ("logits" in seen[0]) != inner_trains


def test_a_failed_forward_leaves_no_trace():
    model = patch_model(tiny())
    with pytest.raises(ValueError, match="do not fit"):
        model(batch()["input_ids"], labels=batch()["labels"][:, :3])
    with torch.no_grad():
        logits = model.lm_head(torch.zeros(1, 1, 16, dtype=torch.float64))
    assert logits.shape == (1, 1, 67)
