"""A term that a model makes of its logits after its loss is refused; one that is not of them is served."""

import pytest
import torch
from tests.integrations.tiny_models import (
    SIZES,
    assert_same_training,
    batch,
    dense_loss,
    tiny,
    transformers,
)

from levelhead.integrations import patch_model


def _llama(after, **attributes):
    """A Llama that does `after(self, output)` with what it returns for labels."""

    class Other(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
            if labels is not None:
                after(self, output)
            return output

    model = tiny()
    model.__class__ = Other
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def _z_loss(_, output):
    output.loss = output.loss + 0.01 * output.logits.logsumexp(-1).pow(2).mean()


def _z_loss_in_place(_, output):
    output.loss += 0.01 * output.logits.logsumexp(-1).pow(2).mean()


def _penalty(_, output):
    p = output.logits.softmax(-1)
    output.loss = output.loss + (p * p.log()).sum(-1).mean()


def _detached(_, output):
    output.loss = output.loss + output.logits.detach().amax()


def _weighted(_, output):
    output.loss = output.loss * output.logits[..., 0].sigmoid().mean()


def _half(_, output):
    output.loss = 0.5 * output.loss


def _none(_, output):
    output.loss = None


def _another(_, output):
    output.loss = output.logits.square().mean()


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (_z_loss, "its loss depends on them"),
        (_z_loss_in_place, "its loss depends on them"),
        (_penalty, "its loss depends on them"),
        (_detached, "its loss depends on them"),
        (_weighted, "it multiplies its loss by 0"),
        (_half, "it multiplies its loss by 0.5"),
        (_none, "does not return what its loss_function gives"),
        (_another, "it multiplies its loss by 0"),
    ],
)
def test_refused_when_patched(after, reason):
    with pytest.raises(ValueError, match=reason):
        patch_model(_llama(after))


def test_a_metric_made_of_the_logits_is_refused():
    def accuracy(self, output):
        output.hidden_states = (
            (output.logits[:, :-1].argmax(-1) == self.labels[:, 1:]).float().mean()
        )

    with pytest.raises(ValueError, match="its hidden_states depends on them, and in training"):
        patch_model(_llama(accuracy, labels=torch.tensor([[1, -100, 0], [-100, 0, 1]])))


def test_what_the_model_keeps_of_its_logits_is_refused():
    def entropy(self, output):
        self.last = torch.distributions.Categorical(logits=output.logits).entropy()

    with pytest.raises(ValueError, match="its last depends on them, and in training"):
        patch_model(_llama(entropy, last=None))


def test_a_term_of_the_weights_is_served():
    def decay(self, output):
        output.loss = output.loss + 0.1 * self.lm_head.weight.square().sum()

    plain, patched = _llama(decay), patch_model(_llama(decay))
    want = dense_loss(plain, **batch()) + 0.1 * plain.lm_head.weight.square().sum()
    assert_same_training(patched, patched(**batch()).loss, plain, want)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("term", [False, True])
def test_a_term_that_comes_later_is_refused_at_the_call(in_place, term):
    coefficients = []

    def after(self, output):
        if term:
            output.loss = output.loss + self.lm_head.weight.sum()
        if coefficients:
            (_z_loss_in_place if in_place else _z_loss)(self, output)

    model = patch_model(_llama(after))
    model(**batch())
    coefficients.append(1)
    with pytest.raises(RuntimeError, match=r"changed its loss after loss_function.* skip_logits=F"):
        model(**batch())
    model(**batch(), skip_logits=False)


@pytest.mark.parametrize("value", [1, 0.1, True, torch.ones(())])
def test_a_coefficient_that_the_model_keeps_is_looked_at_again(value):
    def after(self, output):
        if self.coefficient is not None:
            _z_loss(self, output)

    model = patch_model(_llama(after, coefficient=None))
    model(**batch())
    model.coefficient = value
    with pytest.raises(ValueError, match="its loss depends on them"):
        model(**batch())


def _bamba(**options):
    sizes = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]}
    options = SIZES | sizes | {"mamba_n_groups": 1, "mamba_chunk_size": 8} | options
    torch.manual_seed(0)
    return transformers.BambaForCausalLM(transformers.BambaConfig(**options)).train()


def test_the_z_loss_of_bamba_is_refused_when_patched_and_when_raised_later():
    with pytest.raises(
        ValueError,
        match=r"its loss depends on them.*set the coefficient of a term of the loss to 0",
    ):
        patch_model(_bamba(z_loss_coefficient=0.1))
    model = patch_model(_bamba())
    model(**batch())
    model.z_loss_coefficient = 0.1
    with pytest.raises(ValueError, match="its loss depends on them"):
        model(**batch())


def test_logits_used_inside_the_forward_name_the_cure():
    seen = []

    def look(_, output):
        if output.logits.shape[1] != 3:  # the probe has three tokens
            seen.append(output.logits[:, 3].argmax(-1))

    model = patch_model(_llama(look))
    with pytest.raises(
        RuntimeError, match=r"failed after its head \(IndexError.* skip_logits=False"
    ):
        model(**batch())
    model(**batch(), skip_logits=False)
    assert seen[0].shape == (2,)


@pytest.mark.parametrize(
    "use",
    [
        lambda logits: logits[:, -1],
        lambda logits: logits.argmax(-1),
        lambda logits: torch.softmax(logits, -1),
        lambda logits: logits + 1,
        len,
        list,
    ],
)
def test_logits_used_by_the_caller_name_the_cure(use):
    output = patch_model(tiny())(**batch())
    with pytest.raises(RuntimeError, match="skip_logits=False"):
        use(output.logits)
    assert "skip_logits=False" in repr(output.logits)
