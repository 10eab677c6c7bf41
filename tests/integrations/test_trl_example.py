"""The example of TRL's SFTTrainer runs, and learns."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("trl")

EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_sft.py"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # where there is no GPU
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # a default of TRL's
def test_the_example_of_the_sft_trainer(tmp_path):
    main = runpy.run_path(str(EXAMPLE))["main"]
    first = main(["--output", str(tmp_path / "a"), "--steps", "10"])
    last = main(["--output", str(tmp_path / "b"), "--steps", "30"])
    assert last["loss"] < first["loss"] - 0.2
    again = main(["--model", str(tmp_path / "b"), "--output", str(tmp_path / "c"), "--steps", "10"])
    assert again["loss"] == pytest.approx(last["loss"], abs=0.2)
