"""Labels may come in every way that transformers accepts."""

import pytest
import torch
from tests.integrations.tiny_models import (
    assert_same_training,
    batch,
    dense_loss,
    gradients,
    next_tokens,
    tiny,
)
from torch.func import functional_call, grad, vmap

from levelhead.integrations import patch_model


@pytest.mark.parametrize("with_labels", [True, False])
def test_shift_labels_are_used_as_they_are(with_labels):
    plain, patched, inputs = tiny(), patch_model(tiny()), batch()
    target = next_tokens(inputs["labels"]).roll(1, 0)  # not what shifting the labels would give
    labels = inputs["labels"] if with_labels else None
    loss = patched(inputs["input_ids"], labels=labels, shift_labels=target).loss
    want = dense_loss(plain, inputs["input_ids"], target=target)
    assert_same_training(patched, loss, plain, want)


def test_positional_labels():
    patched, inputs = patch_model(tiny()), batch()
    position = 5  # of Llama's labels, after input_ids, mask, positions, cache and embeddings
    arguments = [inputs["input_ids"], *[None] * (position - 1), inputs["labels"]]
    output = patched(*arguments)
    assert "logits" not in output
    assert torch.equal(output.loss, patched(**inputs).loss)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own, of attention
@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_gradients_of_each_sample_by_vmap(family):
    plain, patched, inputs = tiny(family), patch_model(tiny(family)), batch()
    parameters = {name: p.detach() for name, p in patched.named_parameters()}

    def loss(parameters, ids, labels):
        rows = {"input_ids": ids[None], "labels": labels[None]}
        return functional_call(patched, parameters, (), rows).loss

    each = vmap(grad(loss), (None, 0, 0))(parameters, inputs["input_ids"], inputs["labels"])
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        want = gradients(dense_loss(plain, **one), plain)
        for name, gradient in want.items():
            torch.testing.assert_close(each[name][row], gradient, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own, of attention
def test_labels_that_are_changed_under_vmap_make_the_loss_nan():
    model = tiny()
    original = type(model)

    def forward(self, input_ids=None, labels=None, edit=False, **kwargs):
        labels = labels.roll(1, -1) if edit else labels
        return original.forward(self, input_ids, labels=labels, **kwargs)

    model.__class__ = type("OtherForCausalLM", (original,), {"forward": forward})
    patch_model(model)
    losses = vmap(lambda ids, y: model(input_ids=ids[None], labels=y[None], edit=True).loss)
    assert losses(*batch().values()).isnan().all()


def test_an_argument_given_twice_is_pythons_own_error():
    inputs = batch()
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        patch_model(tiny())(inputs["input_ids"], **inputs)


def test_a_batch_without_valid_labels_gives_zero_loss_and_zero_gradients():
    model, inputs = patch_model(tiny()), batch()
    loss = model(inputs["input_ids"], labels=torch.full_like(inputs["labels"], -100)).loss
    assert loss.item() == 0
    for name, gradient in gradients(loss, model).items():
        assert gradient is not None, name  # connected to the graph, so that no rank waits for it
        assert not gradient.any(), name


def test_labels_that_do_not_fit_the_hidden_states_are_an_error():
    model, inputs = patch_model(tiny()), batch()
    with pytest.raises(ValueError, match=r"labels of shape \(2, 7\) do not fit .*\(2, 9, 16\)"):
        model(inputs["input_ids"], labels=inputs["labels"][:, :7])
