"""The probe finds scale, cap and cut of any forward, and refuses what is none of these."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.integrations.tiny_models import (
    assert_same_training,
    batch,
    dense_loss,
    tiny,
    transformers,
)
from torch import nn

from levelhead.integrations import patch_model
from levelhead.integrations.patch.probe import HeadTransform, probe_head


@pytest.mark.parametrize(
    ("family", "options", "transform"),
    [
        ("llama", {}, HeadTransform()),
        ("gpt2", {}, HeadTransform()),
        ("phi", {}, HeadTransform()),
        ("gemma2", {"final_logit_softcapping": 30.0}, HeadTransform(softcap=30.0)),
        ("gemma2", {"final_logit_softcapping": 0.7}, HeadTransform(softcap=0.7)),
        ("granite", {"logits_scaling": 8.0}, HeadTransform(logit_scale=0.125)),
        ("granite", {"logits_scaling": 0.3}, HeadTransform(logit_scale=1 / 0.3)),
        ("granite", {"logits_scaling": 1.0}, HeadTransform()),
        ("cohere", {"logit_scale": 0.0625}, HeadTransform(logit_scale=0.0625)),
        ("cohere", {"logit_scale": 3.7}, HeadTransform(logit_scale=3.7)),
    ],
)
def test_the_numbers_of_the_config_are_recovered_exactly(family, options, transform):
    assert probe_head(tiny(family, **options)) == transform


@given(
    scale=st.floats(1e-2, 1e2),
    softcap=st.none() | st.floats(1e-1, 1e3),
    vocab_size=st.none() | st.integers(1, 66),
)
def test_any_transform_is_found(scale, softcap, vocab_size):
    model = _llama_with(lambda _, z: HeadTransform(scale, softcap, vocab_size)(z))
    found = probe_head(model)
    assert found.vocab_size == vocab_size
    assert found.logit_scale == pytest.approx(scale, rel=1e-14)
    assert found.softcap == (softcap and pytest.approx(softcap, rel=1e-14))


def test_weights_are_neither_needed_nor_changed():
    with torch.device("meta"):
        model = tiny("gemma2")
        assert probe_head(model) == HeadTransform(softcap=0.5)
    model = tiny("gemma2").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probe_head(model)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class _LlamaWith(transformers.LlamaForCausalLM):
    """Llama with `change` between head and loss."""

    def change(self, logits):
        return logits

    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        logits = self.change(self.lm_head(hidden))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, logits.shape[-1], **kwargs)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def _llama_with(change, **attributes):
    model = tiny()
    model.__class__ = type("_LlamaWith", (_LlamaWith,), {"change": change})
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("change", "transform"),
    [
        (lambda _, z: 2 * (z / 3).tanh() * 1.5, HeadTransform(1.0, 3.0)),
        (lambda _, z: (0.2 * z[..., :60] / 3).tanh().mul(3), HeadTransform(0.2, 3.0, 60)),
        (lambda _, z: z.float()[..., :60] / 6, HeadTransform(1 / 6, None, 60)),
        (lambda _, z: 30 * torch.tanh(z.float() / 30), HeadTransform(1.0, 30.0)),
        (lambda _, z: z.div_(3), HeadTransform(1 / 3)),
    ],
)
def test_scale_cap_and_cut_in_any_form(change, transform):
    model, plain, inputs = _llama_with(change), _llama_with(change), batch()
    assert probe_head(model) == transform
    inputs["labels"].clamp_(max=59)  # below the cut
    loss = patch_model(model)(**inputs).loss
    want = dense_loss(plain, **inputs).to(loss.dtype)
    # Two of these models take their loss, of order 4, in float32.
    assert_same_training(model, loss, plain, want, atol=2e-6)


def test_a_cut_cuts_the_bias_of_the_head_too():
    model, plain = (_llama_with(lambda _, z: z[..., :66]) for _ in range(2))
    for each in (model, plain):
        each.lm_head = nn.Linear(16, 67, dtype=torch.float64)
        each.lm_head.load_state_dict(tiny("phi").lm_head.state_dict())
    inputs = batch()
    inputs["labels"].clamp_(max=65)
    loss = patch_model(model)(**inputs).loss
    assert_same_training(model, loss, plain, dense_loss(plain, **inputs))


def test_the_forward_of_training_counts_whatever_the_mode_at_patch_time():
    model = _llama_with(lambda self, z: z * 2 if self.training else z.softmax(-1))
    assert probe_head(model.eval()) == HeadTransform(2.0)


def test_a_forward_that_reaches_into_its_backbone():
    """OPT calls `self.model.decoder`; on the meta device, running it would fail."""
    config = transformers.OPTConfig(vocab_size=67, hidden_size=16, num_attention_heads=2)
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(config)
    assert probe_head(model) == HeadTransform()


def _mask_entry(_, z):
    return z.masked_fill(torch.arange(z.shape[-1]) == 5, -1e9)


def _mask_entry_out(_, z):
    return z.masked_fill(torch.arange(z.shape[-1]) == 5, torch.finfo(z.dtype).min)


class _Halving(nn.Module):
    def forward(self, z):
        return z / 2


def test_a_module_without_parameters_after_the_head_is_run():
    assert probe_head(
        _llama_with(lambda self, z: self.halve(z), halve=_Halving())
    ) == HeadTransform(0.5)


def _mask_position(_, z):
    return torch.cat([z[:, :4], z[:, 4:] * 0.5], 1)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (_mask_entry, "vocabulary entry 5"),
        (_mask_entry_out, "masks vocabulary entry 5 out before its loss"),
        (_mask_position, "which no scale"),
        (lambda _, z: z + 1, "which no scale and softcap common to all entries explain"),
        (lambda _, z: -z, "which no scale"),
        (lambda _, z: 0 * z, "which no scale"),
        (lambda _, z: z.clamp(-100, 100), "which no scale"),
        (lambda _, z: z.relu(), "which no scale"),
        (lambda _, z: z.log_softmax(-1), "which no scale"),
        (lambda _, z: z.roll(1, -1), "which no scale"),
        (lambda _, z: z.flip(0), "which no scale"),
        (lambda _, z: z * float("nan"), "which no scale"),
        (lambda _, z: z[:, 1:], r"of shape \(2, 64, 67\) reaches its loss as \(2, 63, 67\)"),
        (lambda _, z: torch.cat([z, z], -1), "has 67 entries, of which 134 reach a loss over 134"),
        (lambda _, z: z.bfloat16(), "rounded to torch.bfloat16 before the loss"),
        (
            lambda self, z: z * self.factor,
            "a trainable parameter acts between its head and its loss",
        ),
        (
            lambda self, z: z * self.frozen,
            "a trainable parameter acts between its head and its loss",
        ),
        (lambda _, z: 2 * z - z.detach(), "the gradient of its logits does not reach the output"),
        (lambda _, z: z.detach(), "the gradient of its logits does not reach the output"),
        (lambda _, z: z @ z, r"failed when patch_model ran it .* \(RuntimeError: "),
    ],
)
def test_anything_else_is_refused(change, seen):
    factor, frozen = (nn.Parameter(torch.tensor(1.0), requires_grad=on) for on in (True, False))
    model = _llama_with(change, factor=factor, frozen=frozen)
    with pytest.raises(ValueError, match=seen) as error:
        probe_head(model)
    assert "_LlamaWith" in str(error.value)


def test_a_loss_over_another_vocabulary_size_is_refused():
    model = tiny()
    model.config.vocab_size = 201
    with pytest.raises(ValueError, match="of which 67 reach a loss over 201"):
        probe_head(model)


@pytest.mark.parametrize(
    "option",
    [{"shift_labels": torch.zeros(2, 3).long()}, {"ignore_index": 0}, {"ignore_index": -1}],
)
def test_a_model_that_tells_its_loss_how_to_count_is_refused(option):
    class Other(_LlamaWith):
        def forward(self, input_ids=None, labels=None, **_):
            hidden = self.model(input_ids)[0]
            return self.loss_function(self.lm_head(hidden), labels, 67, **option)

    model = tiny()
    model.__class__ = Other
    with pytest.raises(ValueError, match=r"where the cross-entropy is|failed on a probe"):
        probe_head(model)


def test_a_model_that_changes_its_labels_is_refused():
    class Other(_LlamaWith):
        def forward(self, input_ids=None, labels=None, **_):
            labels = labels.masked_fill(labels == 1, -100)
            return self.loss_function(self.lm_head(self.model(input_ids)[0]), labels, 67)

    model = tiny()
    model.__class__ = Other
    with pytest.raises(ValueError, match="labels do not reach its loss_function unchanged"):
        probe_head(model)
