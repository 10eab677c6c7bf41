"""A label outside the vocabulary is refused by its own position, which is not that of its target."""

import pytest
import torch
from tests.integrations.tiny_models import VOCAB_SIZE, batch, dense_loss, next_tokens, tiny

from levelhead.integrations import patch_model


@pytest.mark.parametrize(("at", "label"), [((1, 5), 999), ((0, 8), VOCAB_SIZE), ((1, 1), -5)])
def test_a_label_is_named_by_its_position(at, label):
    inputs = batch()
    inputs["labels"][at] = label
    with pytest.raises(IndexError) as error:
        patch_model(tiny())(**inputs)
    assert str(error.value) == (
        f"labels{list(at)} is {label}, outside the vocabulary [0, {VOCAB_SIZE}) and not -100 for "
        "none; 1 of 18 are. Make tokenizer and model agree, for example by "
        "model.resize_token_embeddings(len(tokenizer))"
    )


def test_a_shifted_label_is_named_by_its_position():
    inputs = batch()
    shifted = next_tokens(inputs.pop("labels"))
    shifted[1, 4] = 999
    with pytest.raises(IndexError, match=r"^shift_labels\[1, 4\] is 999, outside the vocabulary"):
        patch_model(tiny())(**inputs, shift_labels=shifted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_are_integers(dtype):
    inputs = batch()
    inputs["labels"] = inputs["labels"].to(dtype)
    with pytest.raises(TypeError, match=r"labels must hold integer ids, got .*; use labels\.long"):
        patch_model(tiny())(**inputs)


def test_the_first_label_predicts_nothing_and_may_be_anything():
    inputs = batch()
    inputs["labels"][:, 0] = 999
    want = dense_loss(tiny(), **inputs)
    torch.testing.assert_close(patch_model(tiny())(**inputs).loss, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("labels", [[[1, 2, 3]], batch()["labels"].numpy()], ids=["list", "NumPy"])
def test_labels_are_tensors(labels):
    with pytest.raises(TypeError, match=r"^labels must be a tensor of ids, got (list|ndarray)"):
        patch_model(tiny())(batch()["input_ids"], labels=labels)


def test_ignore_index_is_an_int():
    with pytest.raises(TypeError, match=r"^ignore_index must be an int, got None; -100"):
        patch_model(tiny())(**batch(), ignore_index=None)
