"""The example of the Trainer runs, and learns."""

import runpy
from pathlib import Path

import pytest
from tests.integrations.tiny_models import transformers

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # where there is no GPU
def test_the_example_of_the_trainer(tmp_path):
    main = runpy.run_path(str(EXAMPLES / "trainer.py"))["main"]
    before = main(["--output", str(tmp_path / "a"), "--steps", "1"])["eval_loss"]
    after = main(["--output", str(tmp_path / "b"), "--steps", "30"])["eval_loss"]
    assert after < before - 0.1
    again = main(["--model", str(tmp_path / "b"), "--output", str(tmp_path / "c"), "--steps", "1"])
    assert again["eval_loss"] == pytest.approx(after, abs=0.1)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert type(loaded) is transformers.LlamaForCausalLM
