"""Gradient checkpointing changes nothing."""

import pytest
from tests.integrations.tiny_models import batch, tiny

from levelhead.integrations import patch_model


# Transformers 5.23 renames the method; the oldest release that is supported has this name only.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_with_checkpointing_are_those_without(use_reentrant):
    plain, checkpointed = patch_model(tiny()), patch_model(tiny())
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    got, want = checkpointed(**batch()).loss, plain(**batch()).loss
    got.backward()
    want.backward()
    for (name, parameter), twin in zip(
        checkpointed.named_parameters(), plain.parameters(), strict=True
    ):
        assert (parameter.grad - twin.grad).abs().max() <= 1e-12, name
