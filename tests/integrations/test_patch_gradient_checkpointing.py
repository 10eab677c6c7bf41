"""Gradient checkpointing changes nothing."""

import pytest
from tests.integrations.tiny_models import batch, tiny, transformers
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_around_the_head_alone_is_refused(use_reentrant):
    around_head = []

    class Other(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None):
            hidden = self.model(input_ids).last_hidden_state
            if around_head:
                logits = checkpoint(self.lm_head, hidden, use_reentrant=use_reentrant)
            else:
                logits = self.lm_head(hidden)
            return self.loss_function(logits, labels, 67), logits

    model = tiny()
    model.__class__ = Other
    patch_model(model)
    checkpoint(model, **batch(), use_reentrant=False)[0].backward()
    around_head.append(True)
    with pytest.raises(RuntimeError, match=r"the head runs in torch.utils.checkpoint.* out of it"):
        model(**batch())
