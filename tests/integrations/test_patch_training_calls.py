"""A call with labels is smoothed if its loss can be differentiated or the model is in training mode."""

import pytest
import torch
from tests.integrations.tiny_models import assert_same_training, batch, dense_loss, tiny
from torch import nn

from levelhead.integrations import check_patch, patch_model


class _Wrapper(nn.Module):
    """Reports a mode of its own, as PEFT, DDP and DeepSpeed's engine do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:the patched .* in eval mode")
def test_what_is_smoothed(training, gradients):
    model = patch_model(tiny(), smoothing=0.3).train(training)
    with torch.set_grad_enabled(gradients):
        output = model(**batch())
    smoothed = training or gradients
    want = dense_loss(tiny(), **batch(), smoothing=0.3 if smoothed else 0.0)
    torch.testing.assert_close(output.loss, want, rtol=0, atol=1e-6, check_dtype=False)
    assert ("logits" in output) != smoothed


def test_inference_mode_evaluates():
    model = patch_model(tiny()).eval()
    with torch.inference_mode():
        loss = model(**batch()).loss
    want = dense_loss(tiny(), **batch(), smoothing=0.0).detach()
    torch.testing.assert_close(loss, want, check_dtype=False)  # transformers' own is float32


def test_a_model_in_eval_mode_trains_smoothed_and_warns_once_with_the_cure():
    plain, patched = tiny().eval(), patch_model(tiny()).eval()
    with pytest.warns(
        UserWarning, match=r"call model.train\(\) first; to evaluate, use torch.no_"
    ) as w:
        loss = [patched(**batch()).loss for _ in range(2)][1]
    assert len(w) == 1
    assert_same_training(patched, loss, plain, dense_loss(plain, **batch()))


def test_a_frozen_model_in_eval_mode_is_told_what_counts_as_training():
    model = patch_model(tiny()).eval().requires_grad_(False)
    with pytest.warns(UserWarning, match="with gradients enabled: that counts as training, so its"):
        assert not model(**batch()).loss.requires_grad


@pytest.mark.filterwarnings("ignore:the patched .* in eval mode")
def test_the_mode_that_counts_is_that_of_the_model_not_of_its_wrapper():
    inner = patch_model(tiny()).eval()
    wrapper = _Wrapper(inner)
    assert wrapper.training
    assert not inner.training
    torch.testing.assert_close(wrapper(**batch()).loss, dense_loss(tiny(), **batch()))
    assert check_patch(wrapper, batch()).ok
    assert not inner.training
