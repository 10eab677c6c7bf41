"""A training call returns what the model returns, except logits."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from tests.integrations.tiny_models import VOCAB_SIZE, batch, tiny, transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers.utils import ModelOutput

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


@dataclass
class _Required(ModelOutput):
    logits: torch.Tensor
    loss: torch.Tensor | None = None


def _returning(output):
    def forward(self, input_ids=None, labels=None):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return output(loss=self.loss_function(logits, labels, VOCAB_SIZE), logits=logits)

    model = tiny()
    cls = transformers.LlamaForCausalLM
    model.__class__ = type("OtherForCausalLM", (cls,), {"forward": forward})
    return model


COPIES = {
    "copy": copy.copy,
    "deepcopy": lambda output: copy.deepcopy(tree_map(torch.Tensor.detach, output)),
    "pickle": lambda output: pickle.loads(pickle.dumps(tree_map(torch.Tensor.detach, output))),
    "tree": lambda output: tree_map(lambda tensor: tensor, output),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_an_output_whose_class_requires_logits_has_none_either(how):
    output = patch_model(_returning(_Required))(**batch())
    again = COPIES[how](output)
    assert list(again) == ["loss"]
    with pytest.raises(RuntimeError, match="skip_logits=False"):
        again.logits.argmax(-1)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_a_copy_keeps_what_was_put_into_an_output(how):
    output = patch_model(tiny())(**batch(), use_cache=False)
    output.logits, output.note = torch.ones(3), "seen"
    again = COPIES[how](output) if how == "copy" else pickle.loads(pickle.dumps(_detached(output)))
    assert list(again) == ["loss", "logits"]
    assert torch.equal(again.logits, torch.ones(3))
    assert again.note == "seen"


def _detached(output):
    output.loss = output.loss.detach()
    return output


def test_nothing_else_takes_the_place_of_the_logits():
    output = patch_model(tiny())(**batch(), use_cache=True)
    loss, logits = output[:2]
    assert loss is output.loss
    for absent in (logits, output[1], output.get("logits")):
        with pytest.raises(RuntimeError, match="skip_logits=False"):
            absent.argmax(-1)
    assert output[2] is output.past_key_values
    assert output.get("attentions", "none") == "none"


@dataclass
class _Penalised(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def __post_init__(self):
        self.loss += 1.0
        super().__post_init__()


@dataclass
class _PlainPenalised:
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def __post_init__(self):
        self.loss = self.loss + 1.0


@pytest.mark.parametrize("output", [_Penalised, _PlainPenalised])
@pytest.mark.parametrize("skip_logits", [True, False])
def test_an_output_class_that_adds_to_its_loss_does_so_once(output, skip_logits):
    got = patch_model(_returning(output))(**batch(), skip_logits=skip_logits).loss
    torch.testing.assert_close(got, patch_model(tiny())(**batch()).loss + 1)
