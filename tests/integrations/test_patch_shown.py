"""A patched model shows that it is patched, and how."""

import torch
from tests.integrations.tiny_models import batch, tiny
from torch import nn

from levelhead import patch_info
from levelhead.integrations import patch_model, unpatch_model


def test_print_shows_the_head_with_its_smoothing():
    plain, model = str(tiny()), patch_model(tiny(), 0.1)
    assert "(lm_head): LossHead(in_features=16, out_features=67, bias=False, smoothing=0.1)" in str(
        model
    )
    assert "smoothing=0.1" in str(nn.Sequential(model))
    patch_model(model, torch.tensor(0.25), temperature=0.5, softcap=30.0)
    assert "smoothing=tensor(0.2500), temperature=0.5, softcap=30.0)" in str(model)
    assert str(unpatch_model(model)) == plain


def test_patch_info_tells_the_options_and_what_was_found():
    model = patch_model(tiny("gemma2"), 0.2, eval_logits=False).eval()
    info = patch_info(nn.Sequential(model))
    assert (info.model, info.head, info.training) == ("Gemma2ForCausalLM", "lm_head", False)
    assert (info.smoothing, info.temperature, info.eval_logits) == (0.2, 1.0, False)
    assert (info.logit_scale, info.own_softcap, info.shift, info.own_loss) == (
        1.0,
        0.5,
        True,
        False,
    )
    assert "Gemma2ForCausalLM trains on a smoothed cross-entropy, computed at lm_head" in str(info)
    assert "It is in eval mode." in str(info)


def test_patch_info_of_a_model_without_a_patch_is_none():
    model = tiny()
    assert patch_info(model) is None
    assert patch_info(unpatch_model(patch_model(model))) is None
    assert "logits" in model(**batch())
