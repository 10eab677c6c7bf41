"""Through the offloading hooks of Accelerate a patched model trains as the unpatched one does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.integrations.tiny_models import batch, next_tokens, tiny
from torch import nn

from levelhead.integrations import patch_model, unpatch_model

accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")


def _cpu(model, _folder):
    return accelerate.cpu_offload(model, execution_device=CPU)


def _disk(model, folder):
    return accelerate.disk_offload(model, str(folder), execution_device=CPU)


def _whole(model, _folder):
    return accelerate.cpu_offload_with_hook(model, execution_device=CPU)[0]


def _head(model, folder):
    """The head alone comes from disk; the rest stays and can be trained."""
    places = {"model": "cpu", "lm_head": "disk"}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


OFFLOADS = [_cpu, _disk, _whole, _head]


def _train(model, loss_of):
    """Loss, and gradients of what goes in and of every parameter that is there to have one."""
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(2, 9, 16, dtype=torch.float64, generator=generator)
    embeddings.requires_grad_()
    loss = loss_of(model, embeddings)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), gradients | {"embeddings": embeddings.grad}


def _dense(model, embeddings):
    logits = model(inputs_embeds=embeddings).logits
    target = next_tokens(batch()["labels"]).flatten()
    return F.cross_entropy(logits.flatten(0, 1), target, label_smoothing=0.1)


def _patched(model, embeddings):
    output = model(inputs_embeds=embeddings, labels=batch()["labels"])
    assert "logits" not in output
    return output.loss


def _assert_same_training(patched, plain):
    (got_loss, got), (want_loss, want) = _train(patched, _patched), _train(plain, _dense)
    # float64: what sums of a few hundred terms of order one lose
    torch.testing.assert_close(got_loss, want_loss, rtol=0, atol=1e-12)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-12, msg=name)
    return want


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_patched_and_then_offloaded(offload, family, tmp_path):
    plain = offload(tiny(family), tmp_path / "plain")
    patched = offload(patch_model(tiny(family)), tmp_path / "patched")
    want = _assert_same_training(patched, plain)
    assert want["embeddings"].abs().max() > 1e-4
    if offload in (_cpu, _disk):
        assert all(parameter.is_meta for parameter in patched.parameters())
    else:
        assert want["model.layers.0.mlp.up_proj.weight"] is not None


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_offloaded_and_then_patched(offload, family, tmp_path):
    """As with device_map: there the hooks are on before there is anything to patch."""
    plain = offload(tiny(family), tmp_path / "plain")
    patched = patch_model(offload(tiny(family), tmp_path / "patched"))
    _assert_same_training(patched, plain)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("patched_first", [True, False])
def test_unpatched_with_hooks_on_or_off(offload, removed, patched_first, tmp_path):
    model = patch_model(tiny()) if patched_first else tiny()
    model = offload(model, tmp_path)
    model = model if patched_first else patch_model(model)
    if removed:
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
    got = unpatch_model(model)(**batch())
    assert torch.equal(got.logits, tiny()(**batch()).logits)
    assert type(model.lm_head) is nn.Linear
    patch_model(model, 0.2)
    assert "logits" not in model(**batch())


@pytest.mark.parametrize("offload", OFFLOADS)
def test_patched_after_the_hooks_came_off(offload, tmp_path):
    model = offload(tiny(), tmp_path)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    _assert_same_training(patch_model(model), tiny())


def test_another_forward_under_the_hooks_is_refused():
    model = tiny()
    model.lm_head.forward = lambda hidden: 2 * F.linear(hidden, model.lm_head.weight)
    with pytest.raises(ValueError, match="the lm_head forward was replaced on the instance"):
        patch_model(_cpu(model, None))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_the_hooks_come_off_and_the_model_trains_on(offload, tmp_path):
    patched = offload(patch_model(tiny()), tmp_path)
    accelerate.hooks.remove_hook_from_module(patched, recurse=True)
    _assert_same_training(patched, tiny())


@pytest.mark.parametrize("offload", OFFLOADS)
@torch.no_grad()
def test_evaluation_is_what_it_was(offload, tmp_path):
    patched = offload(patch_model(tiny()), tmp_path).eval()
    assert torch.equal(patched(**batch()).logits, tiny().eval()(**batch()).logits)


def test_a_copy_of_an_offloaded_model():
    model = _cpu(patch_model(tiny()), None)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch()).loss, model(**batch()).loss)
    assert "logits" not in twin(**batch())


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_head_without_its_weight_is_an_error(offload, tmp_path):
    """Weights on the meta device have no numbers: nothing that could be taken for a loss."""
    model = offload(patch_model(tiny()), tmp_path)
    accelerate.hooks.remove_hook_from_module(model.lm_head)
    model.lm_head.to("meta")
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        model(**batch()).loss.item()
