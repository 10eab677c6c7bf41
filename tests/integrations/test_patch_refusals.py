"""What the patch cannot serve it refuses, in words, and leaves as it was."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tests.integrations.tiny_models import batch, tiny, transformers
from torch import nn

from levelhead.integrations import patch_model


class _Scaled(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def _quantised():
    model = tiny()
    model.lm_head = _Scaled(16, 67, bias=False)
    return model


def _integer_weight():
    model = tiny()
    model.lm_head.weight = nn.Parameter(torch.ones(67, 16, dtype=torch.int8), requires_grad=False)
    return model


class _WeightOfItsOwn(torch.Tensor):
    """Stands for the tensor subclasses that quantisation puts into a plain Linear."""


def _weight_subclass():
    model = tiny()
    weight = model.lm_head.weight.detach().as_subclass(_WeightOfItsOwn)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    return model


def _outer_without_head():
    """A model whose language model is inside, and whose loss is its own."""
    model = tiny().model
    model.language_model = tiny()
    return model


def _head_hook():
    model = tiny()
    model.lm_head.forward = lambda hidden: nn.Linear.forward(model.lm_head, hidden)
    return model


def _model_hook():
    model = tiny()
    model.forward = lambda **kwargs: type(model).forward(model, **kwargs)
    return model


def _bart(change):
    """BART, which computes its loss by itself, with another loss."""
    sizes = {"vocab_size": 67, "d_model": 16, "decoder_ffn_dim": 24, "decoder_layers": 1}
    heads = {"decoder_attention_heads": 2, "pad_token_id": 0, "is_encoder_decoder": False}
    model = transformers.BartForCausalLM(transformers.BartConfig(**sizes, **heads))
    original = type(model)

    def forward(self, **inputs):
        output = original.forward(self, **inputs)
        output.loss = change(output.loss)
        return output

    model.__class__ = type("OtherForCausalLM", (original,), {"forward": forward})
    return model


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
        (lambda: nn.Linear(3, 4), "has no loss_function", "Pass a Hugging Face language model"),
        (lambda: tiny().model, "LlamaModel: it has no output embeddings", "owns the head"),
        (_outer_without_head, "LlamaModel: it has no output embeddings", "owns the head"),
        (_quantised, f"lm_head is of class {__name__}._Scaled, not a plain", "out of quantisation"),
        (_integer_weight, "Parameter and dtype torch.int8, not plain floating", "modules_to_not"),
        (_weight_subclass, f"{__name__}._WeightOfItsOwn and dtype torch.f", "out of quantisation"),
        (_head_hook, "the lm_head forward was replaced on the instance", "Patch before"),
        (_model_hook, "the LlamaForCausalLM forward was replaced on the instance", "accelerate"),
        (lambda: _bart(lambda loss: 0.9 * loss), "where the cross-entropy is", "without the patch"),
        (lambda: _bart(lambda _: None), "its output has no loss", "without the patch"),
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


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("gpt2", "got 'gpt2'; load one first, as AutoModelForCausalLM.from_pretrained(name) does"),
        (Path("gpt2"), "got 'gpt2'; load one first"),
        (None, "got NoneType; load one first"),
        (transformers.LlamaForCausalLM, "got the class LlamaForCausalLM; load one first"),
        (tiny().config, "got LlamaConfig; load one first"),
        (tiny().state_dict(), "got OrderedDict; load one first"),
        (SimpleNamespace(model=nn.Linear(3, 4)), "got the SimpleNamespace of one; pass its .model"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_model_is_a_type_error_that_says_how_to_get_one(given, shown):
    with pytest.raises(TypeError, match=re.escape(f"a language model is needed, {shown}")):
        patch_model(given)


def test_a_refused_model_still_trains():
    model = _own_loss()
    with pytest.raises(ValueError, match="cross-entropy"):
        patch_model(model)
    model(**batch()).loss.backward()
    assert model.lm_head.weight.grad is not None
