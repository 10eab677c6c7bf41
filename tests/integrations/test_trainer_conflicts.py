"""Arguments of Trainer that take the loss away from a patched model are seen, and named."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from tests.integrations.test_trainer import assert_same_parameters, train
from tests.integrations.tiny_models import next_tokens, tiny

from levelhead.integrations import patch_model


def _cross_entropy(output, labels, num_items_in_batch):
    logits, target = output.logits.flatten(0, 1), next_tokens(labels).flatten()
    return F.cross_entropy(logits, target, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing_factor": 0.1}, {"trainer": {"compute_loss_func": _cross_entropy}}],
    ids=["label_smoothing_factor", "compute_loss_func"],
)
def test_what_takes_the_labels_away_is_warned_of_once_and_takes_effect(options, tmp_path):
    want, want_losses = train(tiny(dtype=torch.float32), tmp_path, **options)
    model = patch_model(tiny(dtype=torch.float32), smoothing=0.3)
    with pytest.warns(UserWarning, match="label_smoothing_factor or compute_loss_func") as warned:
        got, got_losses = train(model, tmp_path, **options)
    assert len(warned) == 1
    assert got_losses == want_losses
    assert_same_parameters(got, want, atol=0.0)


def _two_runs_under_liger(folder):
    """Liger's kernels have no CPU, so they stay off: what is tested is who owns the forward."""
    model, kernels = patch_model(tiny(dtype=torch.float32)), {}
    kernels |= {"rope": False, "rms_norm": False, "swiglu": False}
    with pytest.raises(RuntimeError, match=r'liger_kernel_config={"fused_linear_cross_entropy": F'):
        train(model, folder, use_liger_kernel=True, liger_kernel_config=kernels)

    kernels |= {"fused_linear_cross_entropy": False}
    got, got_losses = train(model, folder, use_liger_kernel=True, liger_kernel_config=kernels)
    want, want_losses = train(tiny(dtype=torch.float32), folder, label_smoothing_factor=0.1)
    assert_same_parameters(got, want)
    assert got_losses == pytest.approx(want_losses, abs=1e-5)


@pytest.mark.slow
def test_liger_must_leave_the_forward_alone(tmp_path):
    pytest.importorskip("liger_kernel")
    # In a process of its own: Liger changes the classes of transformers for all that follows.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        child.submit(_two_runs_under_liger, tmp_path).result()
