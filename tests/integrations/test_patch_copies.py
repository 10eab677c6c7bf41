"""A copy of a patched model is a patched model of its own."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from tests.integrations.tiny_models import batch, tiny

from levelhead.integrations import patch_model, unpatch_model


def _through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def _through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS = [copy.deepcopy, _through_pickle, _through_torch_save]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("duplicate", COPIERS)
def test_a_copy_trains_like_the_original(duplicate, family):
    model = patch_model(tiny(family), smoothing=0.2)
    twin = duplicate(model)
    assert type(twin) is type(model)
    got, want = twin(**batch()), model(**batch())
    assert "logits" not in got
    assert torch.equal(got.loss, want.loss)


@pytest.mark.parametrize("duplicate", COPIERS)
def test_a_copy_shares_nothing_with_the_original(duplicate):
    model = patch_model(tiny())
    want = model(**batch()).loss
    twin = patch_model(duplicate(model), smoothing=0.7)
    twin(**batch()).loss.backward()
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    unpatch_model(twin)
    assert torch.equal(model(**batch()).loss, want)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "logits" in twin(**batch())


def test_a_copy_keeps_tied_weights_tied():
    twin = copy.deepcopy(patch_model(tiny("gpt2")))
    assert twin.lm_head.weight is twin.transformer.wte.weight


@pytest.mark.parametrize("duplicate", [copy.copy, *COPIERS])
def test_a_number_that_changes_in_a_copy_counts(duplicate):
    model = patch_model(tiny("cohere"))
    model(**batch()), model(**batch())
    twin, same = duplicate(model), tiny("cohere")
    twin.logit_scale = same.logit_scale = 0.5
    torch.testing.assert_close(twin(**batch()).loss, patch_model(same)(**batch()).loss)


def test_a_patched_model_is_freed_with_its_last_reference():
    model = patch_model(tiny())
    model(**batch()), model(**batch())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
