"""The LoRA example checks itself, learns, and leaves an adapter that loads without levelhead."""

import runpy
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")

EXAMPLE = Path(__file__).parents[2] / "examples" / "lora.py"


# Transformers 5.23 renames the property that PEFT 0.21 reads.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_example_of_lora(tmp_path, capsys):
    example = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(0)
    base = example["load"](None)
    base.save_pretrained(tmp_path / "base")
    arguments = ["--model", str(tmp_path / "base"), "--output", str(tmp_path / "adapter")]
    loss = example["main"]([*arguments, "--steps", "40"])
    assert "check_patch: ok. The patched LlamaForCausalLM trains as" in capsys.readouterr().out

    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    batch = example["counting"](16)
    with torch.no_grad():
        after = adapted(**batch).loss.item()
        with adapted.disable_adapter():
            before = adapted(**batch).loss.item()
    assert after < before - 0.2
    assert loss == pytest.approx(after, abs=0.3)  # of another batch, and smoothed
    assert example["main"](["--output", str(tmp_path / "tiny"), "--steps", "1"]) < 6
