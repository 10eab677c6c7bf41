"""Models that compute their loss by themselves, unshifted: the patch withholds their labels."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tests.integrations.tiny_models import (
    VOCAB_SIZE,
    assert_same_training,
    batch,
    dense_loss,
    tiny,
    transformers,
)

from levelhead.integrations import patch_model

_BART = {
    "d_model": 16,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "dropout": 0.0,
    "decoder_start_token_id": 2,
}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
_MODELS = {
    "bart decoder": ("BartForCausalLM", _BART | {"is_encoder_decoder": False}),
    "bart": ("BartForConditionalGeneration", _BART),
    "t5": ("T5ForConditionalGeneration", _T5 | {"decoder_start_token_id": 0}),
}


def _tiny(name):
    torch.manual_seed(0)
    cls, options = _MODELS[name]
    cls = getattr(transformers, cls)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "forced_eos_token_id": None}
    config = cls.config_class(vocab_size=VOCAB_SIZE, **ids, **options)
    return cls(config).double().train()


def _dense_loss(model, labels, num_items=None, **inputs):
    logits = model(**inputs, labels=labels).logits
    total = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1, reduction="sum"
    )
    return total / (num_items or (labels != -100).sum())


@pytest.mark.parametrize("num_items", [None, 40])
@pytest.mark.parametrize("name", _MODELS)
def test_loss_and_every_gradient_equal_dense_label_smoothing(name, num_items):
    plain, patched = _tiny(name), patch_model(_tiny(name))
    output = patched(**batch(), num_items_in_batch=num_items)
    assert "logits" not in output
    assert "past_key_values" not in output
    assert_same_training(
        patched, output.loss, plain, _dense_loss(plain, **batch(), num_items=num_items)
    )


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_decoder_inputs_of_the_users_own(name):
    plain, patched = _tiny(name), patch_model(_tiny(name))
    inputs = batch() | {"decoder_input_ids": batch()["input_ids"].flip(1)}
    assert_same_training(patched, patched(**inputs).loss, plain, _dense_loss(plain, **inputs))


@pytest.mark.parametrize("name", _MODELS)
@torch.no_grad()
def test_eval_is_what_it_was(name):
    plain, patched = _tiny(name).eval(), patch_model(_tiny(name)).eval()
    want, got = plain(**batch()), patched(**batch())
    assert list(got) == list(want)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)


@pytest.mark.parametrize("name", _MODELS)
def test_a_tuple_starts_with_the_loss(name):
    patched = patch_model(_tiny(name))
    loss = patched(**batch()).loss
    assert torch.equal(patched(**batch(), return_dict=False)[0], loss)


def test_a_bias_on_the_logits_is_refused_unless_it_is_zero():
    model = _tiny("bart")
    model.final_logits_bias += 1
    with pytest.raises(ValueError, match="which no scale and softcap common to all entries"):
        patch_model(model)


def test_router_losses_that_are_lost_with_the_labels_are_refused():
    model = patch_model(_tiny("t5"))
    with pytest.raises(RuntimeError, match="adds its router losses where it computes its loss"):
        model(**batch(), output_router_logits=True)


def test_a_model_that_makes_more_of_its_labels_is_refused():
    model = _tiny("t5")
    original = type(model)

    def forward(self, attention_mask=None, labels=None, **inputs):
        if labels is not None:
            inputs["decoder_attention_mask"] = (labels != -100).long()
        return original.forward(self, attention_mask=attention_mask, labels=labels, **inputs)

    model.__class__ = type("OtherForConditionalGeneration", (original,), {"forward": forward})
    with pytest.raises(ValueError, match="more than its decoder_input_ids depends on the labels"):
        patch_model(model)


def _own(returned, returned_without=None):
    def forward(self, input_ids=None, labels=None, **_):
        hidden = self.model(input_ids).last_hidden_state
        z = self.lm_head(hidden)
        if labels is None:
            return (returned_without or returned)(None, z, hidden)
        loss = F.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return returned(loss, z, hidden)

    model = tiny()
    cls = transformers.LlamaForCausalLM
    model.__class__ = type("OtherForCausalLM", (cls,), {"forward": forward})
    return model


def test_a_tuple_with_none_for_its_loss_without_labels_is_served():
    plain, patched = tiny(), patch_model(_own(lambda loss, z, _hidden: (loss, z)))
    torch.testing.assert_close(patched(**batch())[0], dense_loss(plain, **batch()))


_ELSEWHERE = "without labels its logits are not where they are with them"


@pytest.mark.parametrize(
    ("returned", "returned_without", "reason"),
    [
        (lambda loss, z, _: (loss, z), lambda _, z, __: (z,), _ELSEWHERE),
        (lambda loss, z, _: (loss, z), lambda _, z, __: z, _ELSEWHERE),
        (lambda loss, z, h: (loss, z, h), lambda _, z, h: (z, h), _ELSEWHERE),
        (lambda loss, z, _: [loss, z], None, "its forward returns a list"),
        (
            lambda loss, z, _: SimpleNamespace(loss=loss, logits=z),
            None,
            "returns a SimpleNamespace",
        ),
        (lambda loss, z, h: (loss if loss is None else loss + h.mean(), z), None, "its loss is "),
    ],
)
def test_what_it_returns_is_refused_when_patched(returned, returned_without, reason):
    with pytest.raises(ValueError, match=reason):
        patch_model(_own(returned, returned_without))
