"""A model may be patched inside what has been wrapped around it, or around its head."""

import pytest
import torch
from tests.integrations.tiny_models import assert_same_training, batch, dense_loss, tiny
from torch import nn

from levelhead.integrations import patch_model, unpatch_model


class _Engine(nn.Module):
    """Holds a model and forwards calls and attributes to it, as training engines do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


@pytest.mark.parametrize(
    "wrap",
    [_Engine, lambda model: torch.compile(model, backend="eager")],
    ids=["engine", "compile"],
)
def test_the_model_inside_a_wrapper_is_patched_and_the_wrapper_returned(wrap):
    plain, inner = tiny(), tiny()
    wrapper = wrap(inner)
    assert patch_model(wrapper) is wrapper
    assert_same_training(inner, wrapper(**batch()).loss, plain, dense_loss(plain, **batch()))
    assert patch_model(wrapper, 0.3) is wrapper
    assert "logits" in unpatch_model(wrapper)(**batch())


def test_a_head_inside_a_wrapper():
    plain, patched = tiny(), tiny()
    patched.lm_head = torch.compile(patched.lm_head, backend="eager")
    loss = patch_model(patched)(**batch()).loss
    torch.testing.assert_close(loss, dense_loss(plain, **batch()), rtol=0, atol=1e-12)


def test_a_head_whose_class_was_extended_as_fsdp2_does():
    plain, patched = tiny(), tiny()
    extended = type("FSDPLinear", (nn.Linear,), {"extra": 1})
    patched.lm_head.__class__ = extended
    loss = patch_model(patched)(**batch()).loss
    assert patched.lm_head.extra == 1
    assert_same_training(patched, loss, plain, dense_loss(plain, **batch()))
    assert type(unpatch_model(patched).lm_head) is extended
