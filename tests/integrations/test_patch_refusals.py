"""What the patch cannot serve it refuses, in words, and leaves as it was."""

import re

import pytest
import torch
import torch.nn.functional as F
from tests.integrations.tiny_models import SIZES, batch, tiny, transformers
from torch import nn

from levelhead.integrations import patch_model


class _Scaled(nn.Linear):
    pass


def _quantised():
    model = tiny()
    model.lm_head = _Scaled(16, 67, bias=False)
    return model


def _wrapped():
    return torch.compile(tiny(), backend="eager")


def _head_hook():
    model = tiny()
    model.lm_head.forward = model.lm_head.forward
    return model


def _model_hook():
    model = tiny()
    model.forward = model.forward
    return model


def _bert():
    return transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=True))


def _bart():
    sizes = {"vocab_size": 67, "d_model": 16, "decoder_ffn_dim": 24, "decoder_layers": 1}
    heads = {"decoder_attention_heads": 2, "pad_token_id": 0, "is_encoder_decoder": False}
    return transformers.BartForCausalLM(transformers.BartConfig(**sizes, **heads))


def _masked_lm():
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**SIZES))


def _own_loss():
    model = tiny()
    model.loss_function = lambda logits, labels, **_: F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1
    )
    return model


def _no_normaliser():
    """A custom loss that is right until gradients are accumulated."""
    model = tiny()
    own = model.loss_function
    model.loss_function = lambda logits, labels, vocab_size, **_: own(logits, labels, vocab_size)
    return model


@pytest.mark.parametrize(
    ("build", "reason", "remedy"),
    [
        (lambda: nn.Linear(3, 4), "has no output embeddings", "Hugging Face causal language model"),
        (lambda: tiny().model, "LlamaModel: it has no output embeddings", "causal language model"),
        (_quantised, "its head lm_head is a _Scaled, not a plain", "out of quantisation"),
        (_wrapped, "its head _orig_mod.lm_head is not a direct child", "before wrapping"),
        (
            lambda: torch.compile(patch_model(tiny())),
            "its head _orig_mod.lm_head is not a direct child",
            "before wrapping",
        ),
        (_bert, "its head cls.predictions.decoder is not a direct child", "Patch the module that"),
        (_head_hook, "the lm_head forward was replaced on the instance", "accelerate.prepare"),
        (_model_hook, "its forward was replaced on the instance", "accelerate.prepare"),
        (_bart, "its loss does not go through loss_function", "to self.loss_function"),
        (_masked_lm, "where the cross-entropy is", "train it without the patch"),
        (_own_loss, "where the cross-entropy is", "train it without the patch"),
        (_no_normaliser, "where the cross-entropy is", "train it without the patch"),
    ],
)
def test_refused_with_a_reason_and_a_remedy(build, reason, remedy):
    model = build()
    cls, attributes = type(model), dict(vars(model))
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        patch_model(model)
    assert remedy in str(error.value)
    assert str(error.value).startswith(f"patch_model cannot serve {cls.__name__}: ")
    assert type(model) is cls
    assert vars(model) == attributes


def test_a_refused_model_still_trains():
    model = _own_loss()
    with pytest.raises(ValueError, match="cross-entropy"):
        patch_model(model)
    model(**batch()).loss.backward()
    assert model.lm_head.weight.grad is not None
