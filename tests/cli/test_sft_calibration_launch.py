"""`levelhead sft --calibration-aware rcft` in two processes: bins of all questions, not of a rank's."""

import json

import pytest
import torch
from tests.cli.test_sft_calibration import run, write_questions
from tests.cli.test_sft_launch import in_two_processes

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("peft")

from safetensors.torch import load_file


def test_two_processes_train_the_model_of_one_with_twice_the_batch(tmp_path):
    data = write_questions(tmp_path / "questions.jsonl", n=13)  # ranks see one of them twice
    options = [
        "--calibration-aware",
        "rcft",
        "--ece-weight",
        "3",
        "--max-steps",
        "3",
        "--save-steps",
        "3",
    ]
    two, one = tmp_path / "two", tmp_path / "one"
    arguments = ["--learning-rate", "1e-2", "--batch-size", "2", "--output", str(two)]
    codes, _, err = in_two_processes("sft", "tiny", data, *arguments, *options)
    assert codes == (0, 0), err
    assert run(data, one, *options) == 0

    found = [
        load_file(folder / "checkpoint-3" / "expectation.safetensors") for folder in (two, one)
    ]
    for name in ("right", "size"):
        assert torch.equal(found[0][name], found[1][name])
    assert found[0]["size"].max() <= 13
    filled = (1 / found[0]["size"].double()).sum().item()
    assert filled == pytest.approx(round(filled))  # each bin counts one: n_k is of the whole set
    got, want = (load_file(folder / "model.safetensors") for folder in (two, one))
    for name, value in want.items():
        # float32 sums in another order, divided by their own size in the first steps of AdamW
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-4)
    regimes = [
        json.loads((folder / "summary.json").read_text())["regimes"] for folder in (two, one)
    ]
    assert regimes[0].keys() == regimes[1].keys()
    assert regimes[0]["training questions, before"]["questions"] == 13
