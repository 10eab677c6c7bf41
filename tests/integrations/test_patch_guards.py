"""A training call that the patch cannot serve raises; it never returns another loss."""

import pytest
import torch
from tests.integrations.tiny_models import batch, tiny
from torch import nn

from levelhead.integrations import patch_model, unpatch_model


class _Adapter(nn.Module):
    """A head wrapped as LoRA wraps it: the head's output plus something as large as the logits."""

    def __init__(self, head):
        super().__init__()
        self.head = head
        self.delta = nn.Linear(16, 67, bias=False, dtype=torch.float64)

    def forward(self, hidden):
        return self.head(hidden) + self.delta(hidden)


def _subclass(forward):
    """A patched Llama whose class has another forward."""
    model = tiny()
    original = type(model)
    cls = type("OtherForCausalLM", (original,), {"forward": forward(original.forward)})
    model.__class__ = cls
    return patch_model(model)


def test_a_head_wrapped_after_the_patch():
    model = patch_model(tiny())
    model.lm_head = _Adapter(model.lm_head)
    with pytest.raises(RuntimeError, match="replaced or wrapped after patch_model"):
        model(**batch())


def test_a_head_replaced_after_the_patch_and_the_way_out():
    model = patch_model(tiny())
    model.resize_token_embeddings(80, mean_resizing=False)
    with pytest.raises(RuntimeError, match="or call patch_model again"):
        model(**batch())
    patch_model(unpatch_model(model))
    assert "logits" not in model(**batch())


def test_a_head_called_twice():
    def forward(original):
        def twice(self, input_ids=None, labels=None, look=False, **kwargs):
            if look:
                self.lm_head(torch.zeros(1, 9, 16, dtype=torch.float64).expand(2, 9, 16))
            return original(self, input_ids, labels=labels, **kwargs)

        return twice

    model = _subclass(forward)
    model(**batch())
    with pytest.raises(RuntimeError, match="the head was called twice"):
        model(**batch(), look=True)


def test_a_forward_that_does_not_ask_for_its_loss():
    def forward(original):
        def lazy(self, input_ids=None, labels=None, lazy=False, **kwargs):
            return original(self, input_ids, labels=None if lazy else labels, **kwargs)

        return lazy

    model = _subclass(forward)
    with pytest.raises(RuntimeError, match="OtherForCausalLM did not ask loss_function"):
        model(**batch(), lazy=True)


def test_a_forward_that_changes_its_labels():
    def forward(original):
        def cut(self, input_ids=None, labels=None, cut=None, **kwargs):
            return original(self, input_ids, labels=labels[:, :cut], **kwargs)

        return cut

    model = _subclass(forward)
    with pytest.raises(RuntimeError, match=r"changed the labels from shape \(2, 9\) to \(2, 5\)"):
        model(**batch(), cut=5)


def test_data_parallel_replicas_are_refused_in_training_only():
    replica = patch_model(tiny())._replicate_for_data_parallel()
    # What nn.DataParallel does next: plain tensors in place of parameters.
    replica.model, replica.lm_head = (
        patch_model(tiny()).get_submodule(n) for n in ("model", "lm_head")
    )
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(**batch())
    with torch.no_grad():
        assert "logits" in replica.eval()(**batch())
