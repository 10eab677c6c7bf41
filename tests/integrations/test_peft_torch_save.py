"""A patched model with an adapter goes through torch.save into another process as it is."""

import subprocess
import sys

import pytest
import torch
from tests.integrations.tiny_models import batch, tiny

from levelhead.integrations import patch_model, unpatch_model

peft = pytest.importorskip("peft")

# Transformers 5.23 renames the property that PEFT 0.21 reads.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def _lora():
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )


BUILDS = {
    "no adapter": lambda: patch_model(tiny()),
    "patch first": lambda: peft.get_peft_model(patch_model(tiny()), _lora()),
    "adapter first": lambda: patch_model(peft.get_peft_model(tiny(), _lora())),
}

# It names neither levelhead nor peft: the file does.
OTHER_PROCESS = """
import sys, torch
model, inputs = torch.load(sys.argv[1], weights_only=False)
output = model(**inputs)
output.loss.backward()
gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
torch.save((list(output), output.loss.detach(), gradients), sys.argv[2])
"""


@pytest.mark.parametrize(
    "build", [pytest.param("no adapter", marks=pytest.mark.slow), "adapter first"]
)
def test_another_process_trains_on_with_what_torch_save_wrote(build, tmp_path):
    model = BUILDS[build]()
    sent, came = tmp_path / "sent.pt", tmp_path / "came.pt"
    torch.save((model, batch()), sent)
    command = [sys.executable, "-c", OTHER_PROCESS, str(sent), str(came)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    fields, loss, gradients = torch.load(came)

    output = model(**batch())
    output.loss.backward()
    assert fields == list(output)
    assert "logits" not in fields
    # float64: another process may split its sums otherwise
    torch.testing.assert_close(loss, output.loss.detach(), rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            gradients.get(name), parameter.grad, rtol=0, atol=1e-12, msg=name
        )


@pytest.mark.parametrize("build", BUILDS)
def test_what_was_loaded_can_be_unpatched(build, tmp_path):
    model = BUILDS[build]()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert "logits" in unpatch_model(loaded)(**batch())
    assert [type(m) for m in loaded.modules()] == [type(m) for m in unpatch_model(model).modules()]
