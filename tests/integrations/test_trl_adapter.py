"""What levelhead answers where TRL asks its fused head."""

import copy

import pytest
import torch
from tests.integrations.test_trainer import assert_same_parameters
from tests.integrations.tiny_models import VOCAB_SIZE, batch, tiny

from levelhead.integrations import patch_model, unpatch_model
from levelhead.integrations.trl import patch_trainer

trl = pytest.importorskip("trl")
pytest.importorskip("datasets")

from tests.integrations.test_trl import new_trainer, train  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

FIELDS = ("log_probs", "entropy", "is_top1")


def fused(model, **inputs):
    """What the model answers to TRL; `inputs` beside a batch with a prompt and a gap."""
    found = batch() | {"attention_mask": torch.ones_like(batch()["input_ids"])} | inputs
    with torch.set_grad_enabled(model.training):
        return model(fused_lm_head=True, **found)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "mixtral"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("inputs", [{}, {"num_items_in_batch": 5}, "shift_labels"], ids=str)
def test_without_smoothing_it_is_the_answer_of_trl(family, training, inputs, tmp_path):
    if inputs == "shift_labels":
        inputs = {"labels": None, "shift_labels": batch()["labels"].roll(-1, 1)}
    plain = tiny(family).train(training)
    add_fused_lm_head(plain, outputs=FIELDS)
    want = fused(plain, **inputs)
    got = fused(
        new_trainer(patch_model(tiny(family), 0.0), tmp_path).model.train(training), **inputs
    )
    assert type(got) is type(want)
    assert set(got) == set(want)
    for name, value in want.items():
        # float64, but TRL takes its logits in float32
        torch.testing.assert_close(got[name], value, rtol=0, atol=2e-6, check_dtype=False)


def test_log_probs_are_minus_the_smoothed_loss_of_each_token(tmp_path):
    model = tiny()
    z = model(batch()["input_ids"]).logits[:, :-1].transpose(1, 2)
    target = batch()["labels"][:, 1:]
    want = -torch.nn.functional.cross_entropy(z, target, reduction="none", label_smoothing=0.2)
    got = fused(new_trainer(patch_model(model, 0.2), tmp_path).model)
    torch.testing.assert_close(got.log_probs, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.loss, -want.sum() / (target != -100).sum(), rtol=0, atol=1e-12)


def test_a_batch_without_labels_has_loss_zero_and_zero_gradients(tmp_path):
    model = new_trainer(patch_model(tiny()), tmp_path).model
    got = fused(model, labels=torch.full_like(batch()["labels"], -100))
    assert got.loss.item() == 0
    assert not got.log_probs.any()
    gradients = torch.autograd.grad(got.log_probs.sum(), list(model.parameters()))
    assert not any(gradient.any() for gradient in gradients)


def test_the_backward_pass_enters_the_head_by_its_output(tmp_path):
    # There FSDP and ZeRO wait to gather the weight, which the gradient of the statistics needs.
    model = new_trainer(patch_model(tiny()), tmp_path).model
    order = []
    model.lm_head.register_forward_hook(
        lambda _m, _i, output: output.register_hook(lambda _: order.append("output")) and None
    )
    model.lm_head.weight.register_hook(lambda _: order.append("weight"))
    fused(model).log_probs.sum().backward()
    assert order == ["output", "weight"]


def test_a_label_outside_the_vocabulary_is_refused(tmp_path):
    model = new_trainer(patch_model(tiny()), tmp_path).model
    with pytest.raises(IndexError, match=f"{VOCAB_SIZE}"):
        fused(model, labels=torch.full_like(batch()["labels"], VOCAB_SIZE))


def test_other_calls_and_copies_are_those_of_the_patched_model(tmp_path):
    model = new_trainer(patch_model(tiny(), 0.2), tmp_path).model
    want = patch_model(tiny(), 0.2)(**batch()).loss
    assert torch.equal(model(**batch()).loss, want)
    assert model.generate(batch()["input_ids"][:1], max_new_tokens=2).shape == (1, 11)

    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert torch.equal(model(**batch()).loss, want)
    # log 67 whatever the target and the smoothing
    assert fused(twin).loss.item() == pytest.approx(4.204692619390966)
    assert fused(model).loss.item() == pytest.approx(want.item())


def test_patch_trainer_equals_patching_first_and_sets_options_anew(tmp_path):
    want, _ = train(patch_model(tiny(dtype=torch.float32), smoothing=0.3), tmp_path)
    trainer = new_trainer(tiny(dtype=torch.float32), tmp_path)
    assert patch_trainer(trainer, smoothing=0.7) is trainer
    patch_trainer(trainer, smoothing=0.3, eval_smoothing=0.2)
    trainer.train()
    assert_same_parameters(trainer.model, want, atol=0.0)
    trainer.model.double().eval()
    with torch.no_grad():
        want = patch_model(trainer.model, eval_smoothing=0.2)(**batch()).loss
    assert fused(trainer.model).loss.item() == pytest.approx(want.item())


def test_unpatched_it_is_the_model_of_trl_again(tmp_path):
    plain = new_trainer(tiny(), tmp_path).model
    trainer = patch_trainer(new_trainer(tiny(), tmp_path))
    model = unpatch_model(trainer.model)
    assert torch.equal(fused(model).log_probs, fused(plain).log_probs)
    assert torch.equal(model(**batch()).logits, plain(**batch()).logits)


def test_patch_trainer_comes_too_late_once_the_model_is_prepared(tmp_path):
    trainer = new_trainer(tiny(dtype=torch.float32), tmp_path, bf16=True)
    trainer.train()
    with pytest.raises(
        RuntimeError, match=r"too late.*between SFTTrainer\(...\) and trainer.train"
    ):
        patch_trainer(trainer)


@pytest.mark.parametrize("smoothing", [2, "0.1"])
def test_a_model_that_is_refused_stays_what_it_was(smoothing, tmp_path):
    trainer = new_trainer(tiny(), tmp_path)
    forward = trainer.model.forward
    with pytest.raises((ValueError, TypeError), match="smoothing must"):
        patch_trainer(trainer, smoothing=smoothing)
    assert trainer.model.forward == forward


def _patch_first(folder):
    return new_trainer(patch_model(tiny()), folder, loss_type="dft")


def _patch_after(folder):
    return patch_trainer(new_trainer(tiny(), folder, loss_type="dft"))


@pytest.mark.parametrize("build", [_patch_first, _patch_after])
def test_dft_is_refused(build, tmp_path):
    with pytest.raises(ValueError, match=r'loss_type="dft" weighs each token.*loss_type="nll"'):
        build(tmp_path)
