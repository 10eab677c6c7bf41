"""Patching twice is patching once; unpatching is exact."""

import inspect

import pytest
import torch
from tests.integrations.tiny_models import batch, dense_loss, tiny

from levelhead.integrations import patch_model, unpatch_model


def test_patch_model_returns_the_same_object():
    model = tiny()
    assert patch_model(model) is model
    assert unpatch_model(model) is model


def test_patching_again_only_sets_the_smoothing():
    model = patch_model(tiny(), 0.1)
    before = type(model), dict(vars(model))
    assert patch_model(model, 0.3) is model
    assert type(model) is before[0]
    assert {name for name, value in vars(model).items() if value is not before[1][name]} == {
        "_levelhead"
    }
    want = dense_loss(tiny(), **batch(), smoothing=0.3)
    torch.testing.assert_close(model(**batch()).loss, want, rtol=0, atol=1e-12)


def test_unpatching_restores_classes_attributes_and_outputs():
    plain, model = tiny(), unpatch_model(patch_model(tiny()))
    assert type(model) is type(plain)
    assert type(model.lm_head) is torch.nn.Linear
    assert vars(model).keys() == vars(plain).keys()
    want, got = plain(**batch()), model(**batch())
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.logits, want.logits)


def test_unpatching_an_unpatched_model_does_nothing():
    model = tiny()
    before = dict(vars(model))
    assert unpatch_model(model) is model
    assert vars(model) == before


def test_unpatching_reaches_into_a_wrapper():
    model = patch_model(tiny())
    wrapper = torch.compile(model, backend="eager")
    assert unpatch_model(wrapper) is wrapper
    assert type(model) is type(tiny())


def test_a_patch_under_a_class_given_later_cannot_be_undone():
    model = patch_model(tiny())
    model.__class__ = type("FSDPLlamaForCausalLM", (type(model),), {})
    assert "logits" not in model(**batch())
    with pytest.raises(ValueError, match=r"LlamaForCausalLM under FSDPLlama.*before fully_shard"):
        unpatch_model(model)
    assert "logits" not in model(**batch())


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_smoothing_outside_0_and_1_is_refused_and_changes_nothing(smoothing):
    model = tiny()
    with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\], got"):
        patch_model(model, smoothing)
    assert type(model) is type(tiny())


def test_the_signature_stays_and_nothing_can_unwrap_the_patch():
    plain, model = tiny(), patch_model(tiny())
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert not hasattr(model.forward, "__wrapped__")
