"""A training call returns what the model returns, except logits."""

import pytest
import torch
from tests.integrations.tiny_models import VOCAB_SIZE, batch, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from levelhead.integrations import patch_model


def test_the_output_class_and_the_other_fields_stay():
    plain, patched = tiny("mixtral"), patch_model(tiny("mixtral"))
    want, got = plain(**batch(), use_cache=False), patched(**batch(), use_cache=False)
    assert isinstance(got, type(want))
    assert type(got).__name__ == type(want).__name__
    assert list(got) == [field for field in want if field != "logits"]
    assert torch.equal(got.aux_loss, want.aux_loss)


def test_return_dict_false_gives_a_tuple_with_the_loss_first():
    model = patch_model(tiny())
    output = model(**batch(), use_cache=False, return_dict=False)
    assert isinstance(output, tuple)
    assert len(output) == 1
    assert torch.equal(output[0], model(**batch()).loss)


class _LargestOutput(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **kwargs or {})
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return output


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize(("patched", "forms_logits"), [(True, False), (False, True)])
def test_no_operator_of_a_training_step_returns_the_logits(family, patched, forms_logits):
    model = patch_model(tiny(family)) if patched else tiny(family)
    with _LargestOutput() as largest:
        model(**batch()).loss.backward()
    assert (largest.elements >= batch()["labels"].numel() * VOCAB_SIZE) == forms_logits


def test_the_backward_pass_goes_through_the_output_of_the_head():
    """FSDP and ZeRO gather the head's weight in hooks on that tensor."""
    model, seen = patch_model(tiny("gemma2")), []

    def watch(_head, _inputs, output):
        output.register_hook(seen.append)

    model.lm_head.register_forward_hook(watch)
    model(**batch()).loss.backward()
    (gradient,) = seen
    assert gradient.shape == (1, 1, VOCAB_SIZE)
    assert not gradient.any()
