"""Checkpoints of a patched model are those of the model."""

import json

import torch
from tests.integrations.tiny_models import batch, tiny

from levelhead.integrations import patch_model


def test_the_patch_adds_no_parameter_buffer_or_key():
    plain, patched = tiny(), patch_model(tiny())
    assert list(patched.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in patched.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    assert len(list(patched.buffers())) == len(list(plain.buffers()))


def test_save_pretrained_and_from_pretrained(tmp_path):
    patched = patch_model(tiny(dtype=torch.float32))
    patched.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    loaded = type(tiny()).from_pretrained(tmp_path)
    assert type(loaded) is type(tiny())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch()).logits, patched.eval()(**batch()).logits)


def test_from_pretrained_of_a_patched_models_class_gives_an_unpatched_model(tmp_path):
    patched = patch_model(tiny(dtype=torch.float32))
    patched.save_pretrained(tmp_path)
    loaded = type(patched).from_pretrained(tmp_path).train()
    assert "logits" in loaded(**batch())
    assert "logits" not in patch_model(loaded)(**batch())


def test_a_patched_model_goes_by_the_name_of_its_class():
    plain, patched = tiny(), patch_model(tiny())
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(patched), attribute) == getattr(type(plain), attribute)
    assert isinstance(patched, type(plain))
    assert isinstance(patched.lm_head, torch.nn.Linear)
