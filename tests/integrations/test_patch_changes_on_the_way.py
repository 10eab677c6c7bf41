"""What changes labels, logits or options on the way to the loss is served or refused, never overlooked."""

import pytest
import torch
import torch.nn.functional as F
from tests.integrations.tiny_models import (
    assert_same_training,
    batch,
    dense_loss,
    next_tokens,
    tiny,
    transformers,
)
from torch import nn

from levelhead.integrations import patch_model, unpatch_model


def _llama(forward, layers=2, **attributes):
    model = tiny(num_hidden_layers=layers)
    model.__class__ = type(
        "OtherForCausalLM", (transformers.LlamaForCausalLM,), {"forward": forward}
    )
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def _llama_with_labels(change, layers=2):
    def forward(self, input_ids=None, labels=None, how=None, **kwargs):
        if how is not None:
            labels = change(labels)
        own = transformers.LlamaForCausalLM.forward
        return own(self, input_ids, labels=labels, **kwargs)

    return _llama(forward, layers)


def _edit_in_place(labels):
    labels[:, 3] = -100
    return labels


def _edit_past_torch(labels):
    labels.numpy()[:, 3] = -100
    return labels


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y.masked_fill(y == 66, -100), r"labels at \[0, 4\] from 66 to -100"),
        (lambda y: y.roll(1, 1), "changed the labels at"),
        (lambda y: y.clamp(max=60), "changed the labels at"),
        (_edit_in_place, r"changed the labels at \[1, 3\]"),
        (_edit_past_torch, r"changed the labels at \[1, 3\]"),
        (lambda y: y[:, :4], r"changed the labels from shape \(2, 9\) to \(2, 4\)"),
    ],
)
def test_labels_that_the_model_changes_are_refused(change, reason):
    inputs = batch()
    inputs["labels"][0, 4] = 66
    model = patch_model(_llama_with_labels(change))
    model(**inputs)
    with pytest.raises(RuntimeError, match=reason):
        model(**inputs, how="change")


def test_labels_that_are_only_copied_are_served():
    model = patch_model(_llama_with_labels(lambda y: y.clone().contiguous()))
    assert torch.equal(model(**batch(), how="change").loss, model(**batch()).loss)


@pytest.mark.parametrize("shift_labels", [True, False])
def test_ignore_index_is_served(shift_labels):
    plain, patched, inputs = tiny(), patch_model(tiny()), batch()
    ids = inputs["input_ids"]
    other = int(ids[0, 4])
    labels = {"labels": ids} | ({"shift_labels": ids.roll(-1, 1)} if shift_labels else {})
    loss = patched(ids, **labels, ignore_index=other).loss
    target = ids.roll(-1, 1) if shift_labels else next_tokens(ids)
    want = dense_loss(plain, ids, target=target.masked_fill(target == other, -100))
    assert_same_training(patched, loss, plain, want)


def test_options_that_a_loss_of_the_users_may_honour_are_refused():
    def loss(logits, labels, num_items_in_batch=None, weight=None, **_):
        total = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight, reduction="sum"
        )
        return total / (
            (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        )

    model = tiny()
    model.loss_function = loss
    patch_model(model)(**batch())
    for option in ("weight", "unheard_of", "cu_seq_lens_q"):
        with pytest.raises(RuntimeError, match=f"called with {option}, which may change the loss"):
            model(**batch(), **{option: torch.ones(67)})


def test_options_that_the_loss_of_transformers_does_not_know_are_left_to_it():
    model = patch_model(tiny())
    loss = model(**batch(), max_length_q=9, unheard_of=3).loss
    assert torch.equal(loss, model(**batch()).loss)


@pytest.mark.parametrize("entry", [2, 17, 66])
def test_a_loss_that_weighs_one_entry_of_the_vocabulary_is_refused(entry):
    weight = torch.ones(67)
    weight[entry] = 2.0
    model = tiny()
    model.loss_function = lambda logits, labels, **_: F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight.to(logits.dtype)
    )
    with pytest.raises(ValueError, match="where the cross-entropy is"):
        patch_model(model)


def _own_loss(weight=None, penalty=0.0):
    def forward(self, input_ids=None, labels=None, weights=None, **kwargs):
        output = transformers.LlamaForCausalLM.forward(self, input_ids, **kwargs)
        if labels is not None:
            z, y = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            loss = F.cross_entropy(z, y, weight, reduction="none")
            w = (y != -100) * (1 if weights is None else weights[:, 1:].flatten())
            output.loss = (loss * w).sum() / w.sum() + penalty * z.square().mean()
        return output

    return _llama(forward)


def test_a_loss_of_the_models_own_is_served_without_its_weights_and_refused_with_them():
    patched = patch_model(_own_loss())
    torch.testing.assert_close(patched(**batch()).loss, dense_loss(tiny(), **batch()))
    with pytest.raises(RuntimeError, match="computes its loss itself, and weights may change it"):
        patched(**batch(), weights=torch.ones(2, 9))
    with pytest.raises(RuntimeError, match="shift_labels may change it"):
        patched(**batch(), shift_labels=next_tokens(batch()["labels"]))


@pytest.mark.parametrize("entry", [2, 41, 66])
def test_a_loss_of_the_models_own_with_class_weights_is_refused(entry):
    weight = torch.ones(67, dtype=torch.float64)
    weight[entry] = 0.5
    with pytest.raises(ValueError, match="where the cross-entropy is"):
        patch_model(_own_loss(weight))


def test_a_loss_of_the_models_own_with_a_penalty_is_refused():
    with pytest.raises(ValueError, match="where the cross-entropy is"):
        patch_model(_own_loss(penalty=0.01))


def _scaled(self, input_ids=None, labels=None, scale=1.0, **kwargs):
    hidden = self.model(input_ids).last_hidden_state
    logits = self.lm_head(hidden) * scale * self.scale
    loss = None if labels is None else self.loss_function(logits, labels, 67, **kwargs)
    return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


CHANGES = {
    "scale": lambda z: 0.9 * z,
    "bias of one entry": lambda z: z + F.one_hot(torch.tensor(5), 67),
    "cut": lambda z: z[..., :60],
    "mask": lambda z: z.masked_fill(torch.arange(67) > 60, -1e9),
    "clamp": lambda z: z.clamp(-15, 15),
    "cap": lambda z: 250 * torch.tanh(z / 250),
    "order": lambda z: torch.where(z >= z.amax(-1, keepdim=True) - 2, z, z - 3),
    "in place": lambda z: z.mul_(0.5),
    "half": lambda z: torch.cat([z[..., :40], z[..., 40:] - 5], -1),
}


def _changing(change):
    def forward(self, input_ids=None, labels=None, changed=False, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        logits = CHANGES[change](logits) if changed else logits
        loss = self.loss_function(logits, labels, 67, **kwargs)
        return {"loss": loss, "logits": logits}

    return patch_model(_llama(forward))


@pytest.mark.parametrize("change", CHANGES)
def test_logits_that_an_argument_changes_are_refused(change):
    model = _changing(change)
    model(**batch())
    with pytest.raises(RuntimeError, match=r"reach(es)? the loss|is over 67 vocabulary entries"):
        model(**batch(), changed=True)


@pytest.mark.parametrize("change", ["scale", "bias of one entry", "cut", "mask"])
def test_logits_that_are_kept_are_looked_at_too(change):
    model = _changing(change)
    model(**batch(), skip_logits=False)
    with pytest.raises(RuntimeError, match=r"reach(es)? the loss|is over 67 vocabulary entries"):
        model(**batch(), changed=True, skip_logits=False)


def _bans_in_place(z, start):
    z[:, start:, 7] = -1e9
    return z


POSITIONS = {
    "in place": _bans_in_place,
    "scaled in place": lambda z, start: z[:, start:].mul_(2) if start < 0 else z[1:].mul_(2),
    "copied": lambda z, start: _bans_in_place(z.clone(), start),
    "parts": lambda z, start: torch.cat([z[:, :start], 2 * z[:, start:]], 1),
    "mask": lambda z, start: torch.where(torch.arange(9)[None, :, None] < start, z, 2 * z),
}


@pytest.mark.parametrize("start", [0, 1, 4, -1])
@pytest.mark.parametrize("change", POSITIONS)
def test_a_change_of_the_logits_of_some_positions_is_refused(change, start):
    def forward(self, input_ids=None, labels=None, start=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        if start is not None:
            logits = POSITIONS[change](logits, start)
        return {"loss": self.loss_function(logits, labels, 67, **kwargs), "logits": logits}

    model = patch_model(_llama(forward))
    model(**batch())
    refused = r"reach(es)? the loss|acts on some tokens apart from the others"
    with pytest.raises(RuntimeError, match=refused):
        model(**batch(), start=start)
    if change in ("in place", "copied"):
        with pytest.raises(RuntimeError, match=refused):
            model(**batch(), start=start, skip_logits=False)


@pytest.mark.parametrize("given", [40, torch.tensor(40), None])
@pytest.mark.parametrize("arrives", [None, 80, torch.tensor([41.0])])
def test_another_num_items_in_batch_at_the_loss_is_refused(arrives, given):
    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, changed=False):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        items = arrives if changed else num_items_in_batch
        return {"loss": self.loss_function(logits, labels, 67, num_items_in_batch=items)}

    model = patch_model(_llama(forward))
    model(**batch(), num_items_in_batch=given)
    if arrives is not given:
        with pytest.raises(
            RuntimeError, match=r"given num_items_in_batch=.* hand its \*\*kwargs on"
        ):
            model(**batch(), num_items_in_batch=given, changed=True)


def test_the_same_num_items_in_batch_in_another_form_is_served():
    def forward(self, input_ids=None, labels=None, num_items_in_batch=None):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        items = num_items_in_batch
        if items is not None:
            items = items[None].double()
        return {"loss": self.loss_function(logits, labels, 67, num_items_in_batch=items)}

    loss = patch_model(_llama(forward))(**batch(), num_items_in_batch=torch.tensor(40))["loss"]
    torch.testing.assert_close(loss, dense_loss(tiny(), **batch(), num_items=40))


def test_an_attribute_that_scales_the_logits_counts():
    model = patch_model(_llama(_scaled, scale=1))
    model.scale = 2
    loss = model(**batch()).loss
    torch.testing.assert_close(loss, dense_loss(unpatch_model(model), **batch()))


def test_logits_on_which_the_hidden_states_act_are_refused():
    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        logits = self.lm_head(hidden) * (1 + hidden.square().mean(-1, keepdim=True))
        return self.loss_function(logits, labels, 67, **kwargs)

    with pytest.raises(
        ValueError, match=r"which no scale|depend on more than the output of its head"
    ):
        patch_model(_llama(forward))


def test_logits_that_hidden_states_move_a_little_are_refused():
    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        logits = self.lm_head(hidden) + 1e-3 * hidden[..., :1]
        return self.loss_function(logits, labels, 67, **kwargs)

    with pytest.raises(
        ValueError, match=r"which no scale|depend on more than the output of its head"
    ):
        patch_model(_llama(forward))


def test_a_buffer_added_to_the_logits_that_is_filled_later_is_refused():
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 1}
    sizes |= {"decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(vocab_size=67, decoder_start_token_id=2, **sizes)
    model = patch_model(transformers.BartForConditionalGeneration(config).train())
    model(**batch())
    nn.init.normal_(model.final_logits_bias)
    with pytest.raises(RuntimeError, match="reaches the loss as"):
        model(**batch())


def test_where_looking_would_wait_the_loss_is_nan():
    """In compiled code, as on an accelerator."""
    model = patch_model(_llama_with_labels(lambda y: y.masked_fill(y == y[0, 5], -100), 1))
    model.config.use_cache = False
    compiled = torch.compile(model, backend="aot_eager")
    assert compiled(**batch()).loss.isfinite()
    loss = compiled(**batch(), how="change").loss
    assert loss.isnan()
    scaled = torch.compile(patch_model(_llama(_scaled, layers=1, scale=1)), backend="aot_eager")
    assert scaled(**batch()).loss.isfinite()
    assert scaled(**batch(), scale=0.5).loss.isnan()


def test_a_hook_that_changes_what_the_head_returns_is_refused():
    model = patch_model(tiny())
    hook = model.lm_head.register_forward_hook(lambda _head, _inputs, output: 2 * output)
    with pytest.raises(RuntimeError, match="reaches the loss as"):
        model(**batch())
    hook.remove()
    model.lm_head.register_forward_hook(lambda _head, _inputs, output: output.clone())
    torch.testing.assert_close(model(**batch()).loss, dense_loss(tiny(), **batch()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1 / 1.05, 1.05, 1.02])
def test_a_factor_on_all_logits_shows_in_a_narrow_dtype(dtype, scale):
    """Each logit may be rounded by more than that."""
    model = patch_model(_llama(_scaled, scale=1.0).to(dtype))
    assert model(**batch()).loss.isfinite()
    with pytest.raises(RuntimeError, match=r"reaches the loss"):
        model(**batch(), scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_a_scale_and_a_cap_in_a_narrow_dtype_are_no_change(family, dtype):
    assert patch_model(tiny(family).to(dtype))(**batch()).loss.isfinite()


MOVED = {
    "detached": lambda z: z.detach(),
    "rolled": lambda z: z.roll(1, 1),
    "flipped": lambda z: z.flip(1),
    "sorted": lambda z: z.sort(1).values,
    "cumulated": lambda z: z.cumsum(1),
}


@pytest.mark.parametrize("change", MOVED)
def test_logits_that_an_argument_moves_or_detaches_are_refused(change):
    def forward(self, input_ids=None, labels=None, moved=False, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        logits = MOVED[change](logits) if moved else logits
        return {"loss": self.loss_function(logits, labels, 67, **kwargs), "logits": logits}

    model = patch_model(_llama(forward))
    model(**batch())
    with pytest.raises(RuntimeError, match=r"detaches them|acts on some tokens apart"):
        model(**batch(), moved=True)
