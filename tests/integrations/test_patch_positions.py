"""Training on some positions, or with labels that are shifted already."""

import pytest
import torch
import torch.nn.functional as F
from tests.integrations.tiny_models import (
    LENGTH,
    assert_same_training,
    batch,
    dense_loss,
    next_tokens,
    tiny,
)

from levelhead.integrations import check_patch, patch_model


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("keep", [5, LENGTH, torch.tensor([1, 2, 5, 7])], ids=["5", "all", "some"])
def test_logits_to_keep_with_the_labels_of_those_positions(family, keep):
    plain, patched, inputs = tiny(family), patch_model(tiny(family)), batch()
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    inputs["labels"] = inputs["labels"][:, kept]
    logits = plain(inputs["input_ids"]).logits[:, kept]
    want = F.cross_entropy(
        logits.flatten(0, 1), next_tokens(inputs["labels"]).flatten(), label_smoothing=0.1
    )
    output = patched(**inputs, logits_to_keep=keep)
    assert "logits" not in output
    assert_same_training(patched, output.loss, plain, want)
    assert check_patch(tiny(family), inputs | {"logits_to_keep": keep}).ok


def test_logits_to_keep_with_the_labels_of_all_positions_is_an_error():
    with pytest.raises(ValueError, match=r"labels of shape \(2, 9\) do not fit .*\(2, 5, 16\)"):
        patch_model(tiny())(**batch(), logits_to_keep=5)


@torch.no_grad()
@pytest.mark.parametrize("eval_logits", [True, False])
def test_an_evaluation_with_shifted_labels_alone_has_a_loss(eval_logits):
    model = patch_model(tiny(), eval_logits=eval_logits).eval()
    ids = batch()["input_ids"]
    output = model(ids, shift_labels=next_tokens(batch()["labels"]))
    want = dense_loss(tiny(), **batch(), smoothing=0.0)
    torch.testing.assert_close(output.loss, want, rtol=0, atol=1e-12)
    assert ("logits" in output) == eval_logits
