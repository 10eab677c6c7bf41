"""Calls that do not train are what they were, bit for bit."""

import pytest
import torch
from tests.integrations.tiny_models import FAMILIES, LENGTH, batch, tiny

from levelhead.integrations import patch_model


@pytest.mark.parametrize("family", FAMILIES)
def test_eval_with_labels(family):
    plain, patched = tiny(family).eval(), patch_model(tiny(family)).eval()
    want, got = plain(**batch()), patched(**batch())
    assert list(got) == list(want)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)


def test_a_training_call_without_labels():
    plain, patched, inputs = tiny(), patch_model(tiny()), {"input_ids": batch()["input_ids"]}
    got = patched(**inputs)
    assert torch.equal(got.logits, plain(**inputs).logits)
    assert got.loss is None


@pytest.mark.parametrize("wish", [{"skip_logits": False}, {"logits_to_keep": LENGTH}])
def test_a_training_call_that_wants_logits(wish):
    plain, patched = tiny(), patch_model(tiny())
    want, got = plain(**batch()), patched(**batch(), **wish)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)


def test_generate():
    plain, patched = tiny().eval(), patch_model(tiny()).eval()
    prompt = batch()["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(patched.generate(prompt, **options), plain.generate(prompt, **options))


def test_a_loss_function_set_by_the_user_still_serves_eval():
    model = patch_model(tiny()).eval()
    model.loss_function = lambda logits, **_: logits.new_tensor(42.0)
    assert model(**batch()).loss.item() == 42
    assert model.train()(**batch()).loss.item() != 42
