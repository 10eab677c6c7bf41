"""What is changed in a patched model after the patch is seen at the next call."""

from types import MethodType

import pytest
import torch
from tests.integrations.tiny_models import (
    assert_same_training,
    batch,
    dense_loss,
    tiny,
    transformers,
)

from levelhead.integrations import patch_info, patch_model, unpatch_model


def _past_the_patch(model):
    own = type(model)._levelhead_original.forward
    model.forward = MethodType(lambda self, *args, **kwargs: own(self, *args, **kwargs), model)


def test_a_forward_set_on_the_model_that_goes_past_the_patch_is_refused_in_training():
    model = patch_model(tiny())
    _past_the_patch(model)
    with (
        pytest.warns(UserWarning, match="head of a patched model was called outside"),
        pytest.raises(RuntimeError, match="forward was replaced or bypassed"),
    ):
        model(**batch())
    with torch.no_grad():
        want = tiny().eval()(**batch())
        assert torch.equal(model.eval()(**batch()).loss, want.loss)


def test_a_forward_set_on_the_model_that_wraps_the_patched_one_is_served():
    plain, patched = tiny(), patch_model(tiny())
    inner, calls = patched.forward, []

    def counting(*args, **kwargs):
        calls.append(args)
        return inner(*args, **kwargs)

    patched.forward = counting
    assert_same_training(patched, patched(**batch()).loss, plain, dense_loss(plain, **batch()))
    assert len(calls) == 1


def test_the_forward_of_the_class_called_by_hand_is_refused():
    model = patch_model(tiny())
    with (
        pytest.warns(UserWarning, match="not smoothed"),
        pytest.raises(RuntimeError, match="not be smoothed"),
    ):
        transformers.LlamaForCausalLM.forward(model, **batch())


def _set(model):
    model.loss_function = lambda logits, **_: logits.sum() * 0 + 42


def _set_past_the_property(model):
    vars(model)["_loss_function"] = lambda logits, **_: logits.sum() * 0 + 42


def _set_kind(model):
    model.loss_type = "ForMaskedLM"


@pytest.mark.parametrize("change", [_set, _set_past_the_property, _set_kind])
def test_a_loss_function_set_after_the_patch_is_refused_until_it_is_looked_at(change):
    model = patch_model(tiny())
    change(model)
    with pytest.raises(RuntimeError, match=r"loss_function of the patched .* was replaced after"):
        model(**batch())
    if change is _set_kind:  # which does not shift
        assert not patch_info(patch_model(model)).shift
        model(**batch())
    else:
        with pytest.raises(ValueError, match="where the cross-entropy is"):
            patch_model(model)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("granite", "logits_scaling", 4.0),
        ("gemma2", "final_logit_softcapping", 0.7),
        ("gemma2", "final_logit_softcapping", None),
    ],
)
@pytest.mark.parametrize("again", [True, False])
def test_a_config_changed_after_the_patch_counts(family, name, value, again):
    plain, patched = tiny(family), patch_model(tiny(family))
    patched(**batch())
    for model in (plain, patched):
        setattr(model.config, name, value)
    if again:
        patch_model(patched)
    assert_same_training(patched, patched(**batch()).loss, plain, dense_loss(plain, **batch()))


def test_a_number_that_the_model_keeps_itself_counts():
    plain, patched = tiny("cohere"), patch_model(tiny("cohere"))
    plain.logit_scale = patched.logit_scale = 2.0
    assert_same_training(patched, patched(**batch()).loss, plain, dense_loss(plain, **batch()))


def test_a_list_of_the_config_changed_in_place_counts():
    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None):
            hidden = self.model(input_ids).last_hidden_state
            logits = self.lm_head(hidden) * self.config.factors[0]
            return self.loss_function(logits, labels, logits.shape[-1]), logits

    plain, model = tiny(), tiny()
    for scaled in (plain, model):
        scaled.__class__, scaled.config.factors = Scaled, [2.0, 1.0]
    patch_model(model, 0.0)
    for factor in (2.0, 3.0, 3.0):
        plain.config.factors[0] = model.config.factors[0] = factor
        got, want = model(**batch())[0], plain(**batch())[0]
        torch.testing.assert_close(got.float(), want)


def test_what_is_looked_at_again_is_refused_if_it_cannot_be_served():
    model = patch_model(tiny())
    model.config.vocab_size = 201
    with pytest.raises(ValueError, match="of which 67 reach a loss over 201"):
        model(**batch())


def test_patching_again_takes_up_a_new_head():
    model = patch_model(tiny())
    model.resize_token_embeddings(80, mean_resizing=False)
    loss = patch_model(model)(**batch()).loss
    want = dense_loss(unpatch_model(model), **batch())
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-12)


def test_several_language_models_in_a_wrapper_are_refused():
    pair = torch.nn.ModuleDict({"teacher": tiny(), "student": tiny("gemma2")})
    with pytest.raises(ValueError, match="several language models, at 'teacher' and 'student'"):
        patch_model(pair)
    patch_model(pair["student"])


class _Meter:
    def __init__(self):
        self.seen, self.tensor = 0, torch.zeros(())


def test_a_forward_that_counts_is_not_counted_by_the_probe():
    class Counting(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            self.seen += 1
            self.log.append(torch.rand(()))
            self.logs["seen"].append(1)
            self.meter.seen += 1
            self.meter.tensor += 1
            return super().forward(input_ids, labels=labels, **kwargs)

    model = tiny()
    model.__class__ = Counting
    model.register_buffer("seen", torch.zeros((), dtype=torch.long))
    model.log, model.logs, model.meter = [], {"seen": []}, _Meter()
    state = torch.random.get_rng_state()
    patch_model(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.seen
    assert not model.log
    assert not model.logs["seen"]
    assert model.meter.seen == model.meter.tensor == 0
    model(**batch())
    assert model.seen == len(model.log) == len(model.logs["seen"]) == model.meter.seen == 1


def test_a_number_that_changes_in_every_step_is_looked_at_once(monkeypatch):
    from levelhead.integrations.patch import new_call

    model, looks, probe = patch_model(tiny()), [], new_call.probe
    monkeypatch.setattr(new_call, "probe", lambda model: looks.append(1) or probe(model))
    for step in range(5):
        model.step = step
        model(**batch())
    assert len(looks) <= 2  # it appears, and it changes
