"""Calls that do not train are what they were, bit for bit."""

import pytest
import torch
from tests.integrations.tiny_models import FAMILIES, batch, tiny

from levelhead.integrations import patch_model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_eval_with_labels(family):
    plain, patched = tiny(family).eval(), patch_model(tiny(family)).eval()
    want, got = plain(**batch()), patched(**batch())
    assert list(got) == list(want)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)


def test_a_training_call_without_labels_but_with_one_warning():
    plain, patched, inputs = tiny(), patch_model(tiny()), {"input_ids": batch()["input_ids"]}
    with pytest.warns(UserWarning, match="label_smoothing_factor.* leave those out") as warned:
        got, _ = patched(**inputs), patched(**inputs)
    assert len(warned) == 1
    assert torch.equal(got.logits, plain(**inputs).logits)
    assert got.loss is None


def test_a_training_call_without_labels_or_gradients_does_not_warn():
    with torch.no_grad():
        assert patch_model(tiny())(batch()["input_ids"]).loss is None


def test_generate():
    plain, patched = tiny().eval(), patch_model(tiny()).eval()
    prompt = batch()["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(patched.generate(prompt, **options), plain.generate(prompt, **options))


def test_a_loss_function_set_by_the_user_still_serves_eval():
    model = patch_model(tiny()).eval()
    model.loss_function = lambda logits, **_: logits.new_tensor(42.0)
    with torch.no_grad():
        assert model(**batch()).loss.item() == 42
