"""Forwards of every signature and every kind of output are served, or refused in words."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tests.integrations.tiny_models import (
    assert_same_training,
    batch,
    dense_loss,
    tiny,
    transformers,
)
from transformers.utils import ModelOutput

from levelhead.integrations import patch_model

Llama = transformers.LlamaForCausalLM


class _Named(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


@dataclass
class _Plain:
    loss: torch.Tensor
    logits: torch.Tensor


@dataclass
class _LogitsRequired(ModelOutput):
    logits: torch.Tensor
    loss: torch.Tensor | None = None


@dataclass
class _LossRequired(ModelOutput):
    loss: torch.Tensor
    logits: torch.Tensor | None = None


def _llama(forward):
    model = tiny()
    model.__class__ = type("OtherForCausalLM", (Llama,), {"forward": forward})
    return model


def _returning(make):
    def forward(self, input_ids=None, labels=None):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, 67)
        return make(loss, logits)

    return forward


OUTPUTS = {
    "tuple": lambda loss, logits: (loss, logits),
    "dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "named tuple": _Named,
    "dataclass": _Plain,
    "logits required": lambda loss, logits: _LogitsRequired(logits=logits, loss=loss),
    "loss required": lambda loss, logits: _LossRequired(loss=loss, logits=logits),
}


def _loss_of(output):
    if isinstance(output, dict):
        return output["loss"]
    return output[0] if type(output) is tuple else output.loss


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_of_any_kind_from_a_forward_without_further_arguments(kind):
    patched, plain = patch_model(_llama(_returning(OUTPUTS[kind]))), tiny()
    output = patched(**batch())
    assert isinstance(output, type(OUTPUTS[kind](torch.ones(()), torch.ones(()))))
    assert_same_training(patched, _loss_of(output), plain, dense_loss(plain, **batch()))
    kept = patched(**batch(), skip_logits=False)
    logits = kept["logits"] if kind == "dict" else kept[1] if kind == "tuple" else kept.logits
    assert torch.equal(logits, plain(batch()["input_ids"]).logits)
    with torch.no_grad():
        assert _loss_of(patched.eval()(**batch())).isfinite()


def test_a_tuple_without_logits_keeps_what_else_is_in_it():
    def forward(self, input_ids=None, labels=None):
        hidden = self.model(input_ids).last_hidden_state
        return self.loss_function(self.lm_head(hidden), labels, 67), hidden, hidden.mean()

    plain, (loss, hidden, mean) = tiny(), patch_model(_llama(forward))(**batch())
    torch.testing.assert_close(loss, dense_loss(plain, **batch()))
    assert torch.equal(hidden, plain.model(batch()["input_ids"]).last_hidden_state)
    assert torch.equal(mean, hidden.mean())


def test_a_tuple_in_another_order_is_refused_by_its_order():
    with pytest.raises(
        ValueError, match=r"the loss does not come first in its tuple. Return \(loss"
    ):
        patch_model(_llama(_returning(lambda loss, logits: (logits, loss))))


def test_a_call_that_asks_for_no_loss_gets_none():
    def forward(self, input_ids=None, labels=None, return_loss=True):
        output = Llama.forward(self, input_ids, labels=labels)
        if not return_loss:
            output.loss = None
        return output

    model = patch_model(_llama(forward))
    assert model(**batch(), return_loss=False).loss is None
    assert model(**batch()).loss.isfinite()


@dataclass
class _LooksAtLogits(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def __post_init__(self):
        self.tokens = self.logits.shape[1]
        super().__post_init__()


def test_an_output_class_that_looks_at_its_logits_names_the_cure():
    model = patch_model(_llama(_returning(lambda loss, z: _LooksAtLogits(loss=loss, logits=z))))
    with pytest.raises(RuntimeError, match=r"after its head .* skip_logits=False"):
        model(**batch())
    assert model(**batch(), skip_logits=False).tokens == 9


@pytest.mark.parametrize("positional", [0, 1, 6])
def test_a_forward_that_hands_all_its_arguments_on(positional):
    def forward(self, *args, **kwargs):
        return Llama.forward(self, *args, **kwargs)

    plain, patched, inputs = tiny(), patch_model(_llama(forward)), batch()
    ids, labels = inputs["input_ids"], inputs["labels"]
    if positional == 0:
        output = patched(input_ids=ids, labels=labels)
    elif positional == 1:
        output = patched(ids, labels=labels)
    else:  # labels are the sixth of Llama's arguments
        output = patched(ids, None, None, None, None, labels)
    assert "logits" not in output
    assert_same_training(patched, output.loss, plain, dense_loss(plain, **inputs))


def _over(use):
    """A forward that calls its head as `use(self, hidden)` does."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = use(self, self.model(input_ids).last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, 67, **kwargs)
        return {"loss": loss, "logits": logits}

    return forward


@pytest.mark.parametrize(
    "use",
    [
        lambda self, h: self.lm_head(h.flatten(0, 1)).view(*h.shape[:2], -1),
        lambda self, h: self.lm_head(torch.cat([h[:, :4], h], 1))[:, 4:],
    ],
)
def test_a_head_that_is_not_given_each_token_in_its_place_is_refused(use):
    with pytest.raises(ValueError, match="its head is called with hidden states of shape"):
        patch_model(_llama(_over(use)))


def test_a_soft_prompt_of_the_users_is_served():
    def forward(self, input_ids=None, labels=None, **kwargs):
        prompt = self.model.embed_tokens.weight[:4].expand(len(input_ids), -1, -1)
        embeds = torch.cat([prompt, self.model.embed_tokens(input_ids)], 1)
        hidden = self.model(inputs_embeds=embeds).last_hidden_state[:, 4:]
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, 67, **kwargs)
        return _Plain(loss, logits)

    plain, patched = _llama(forward), patch_model(_llama(forward))
    target = F.pad(batch()["labels"][:, 1:], (0, 1), value=-100)
    logits = plain(batch()["input_ids"]).logits
    want = F.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=0.1)
    assert_same_training(patched, patched(**batch()).loss, plain, want)


@pytest.mark.parametrize("before", [True, False])
def test_the_loss_of_another_head_is_kept(before):
    def more(self, hidden, labels):
        return F.cross_entropy(self.second(hidden)[:, :-2].mT, labels[:, 2:])

    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden, term = self.model(input_ids).last_hidden_state, 0.0
        if before and labels is not None:
            term = more(self, hidden, labels)
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, 67, **kwargs) + term
        if labels is not None and not before:
            loss = loss + more(self, hidden, labels)
        return {"loss": loss, "logits": logits}

    plain, patched = _llama(forward), _llama(forward)
    for model in (plain, patched):
        torch.manual_seed(0)
        model.second = torch.nn.Linear(16, 67, dtype=torch.float64)
    loss = patch_model(patched)(**batch())["loss"]
    hidden = plain.model(batch()["input_ids"]).last_hidden_state
    want = dense_loss(tiny(), **batch()) + more(plain, hidden, batch()["labels"])
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-12)


def test_a_forward_that_is_compiled_in_its_class_is_served():
    def forward(self, input_ids=None, labels=None, **kwargs):
        return Llama.forward(self, input_ids, labels=labels, **kwargs)

    torch.compiler.reset()
    patched = _llama(torch.compile(forward, backend="eager"))
    patched.config.use_cache = False
    loss = patch_model(patched)(**batch()).loss
    torch.testing.assert_close(loss, dense_loss(tiny(), **batch()), rtol=0, atol=1e-12)
    torch.compiler.reset()


def test_a_module_set_as_the_loss_function_is_none_as_torch_has_it():
    plain, patched = tiny(), tiny()
    for model in (plain, patched):
        model.loss_function = torch.nn.CrossEntropyLoss()  # a child, beside the property
    loss = patch_model(patched)(**batch()).loss
    assert_same_training(patched, loss, plain, dense_loss(plain, **batch()))


def test_a_forward_that_takes_no_labels_by_name_is_refused():
    def forward(self, batch=None):
        return Llama.forward(self, **batch)

    with pytest.raises(ValueError, match="failed when patch_model ran it on text alone"):
        patch_model(_llama(forward))


def test_labels_by_another_name_are_refused_in_training():
    def forward(self, input_ids=None, labels=None, targets=None, **kwargs):
        return Llama.forward(
            self, input_ids, labels=labels if targets is None else targets, **kwargs
        )

    model, inputs = patch_model(_llama(forward)), batch()
    with (
        pytest.warns(UserWarning, match="in training mode without labels"),
        pytest.raises(RuntimeError, match=r"given no labels by that name.* Pass them as labels="),
    ):
        model(inputs["input_ids"], targets=inputs["labels"])
