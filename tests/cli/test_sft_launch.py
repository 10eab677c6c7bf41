"""`levelhead sft` in two processes: the same model as in one, said once."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("peft")

from safetensors.torch import load_file
from tests.distributed.launch import outcome, ranks

from levelhead.cli import main

ROWS = [{"prompt": f"box {i}:", "completion": f" {'plum' * (1 + i % 3)}"} for i in range(16)]
OPTIONS = ["--max-steps", "4", "--save-steps", "2", "--learning-rate", "1e-3", "--output"]


def in_two_processes(*arguments):
    """Exit codes of the command in two ranks, and what both of them said."""
    with ranks("tests.cli.command_worker", env={"ACCELERATE_USE_CPU": "true"}) as started:
        codes, out, err = zip(*outcome(started, "command", *arguments), strict=True)
    return codes, "".join(out), "".join(err)


def launch(*arguments):
    """Runs the command in two processes on the CPU, as `accelerate launch` would on two GPUs."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    return subprocess.run(
        [*launcher, "--num_processes=2", "--main_process_port=0", "-m", "levelhead", *arguments],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.mark.slow
def test_two_processes_train_the_model_of_one_with_twice_the_batch(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = ["sft", "tiny", str(data), *OPTIONS]
    done = launch(*run, str(tmp_path / "two"), "--batch-size", "2", "--eval", str(data))
    assert done.returncode == 0, done.stderr
    for text in ("Training: 16 rows", "step      4  loss", "4 steps, 1 epochs", "Model: "):
        assert done.stdout.count(text) == 1
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["processes"] == 2
    assert sorted(path.name for path in tmp_path.glob("two/checkpoint-*/whole")) == ["whole"] * 2
    assert not list(tmp_path.glob("two/tokens-*"))

    assert main([*run, str(tmp_path / "one"), "--batch-size", "4"]) == 0
    assert (
        json.loads((tmp_path / "one" / "summary.json").read_text())["tokens"] == summary["tokens"]
    )
    got, want = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, value in want.items():
        # float32 sums in another order, divided by their own size in the first steps of AdamW
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5)


def test_two_processes_report_bad_data_once(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    codes, _, err = in_two_processes("sft", "tiny", str(data), "--output", str(tmp_path / "run"))
    assert codes == (2, 2)
    assert err.count("levelhead sft: error: ") == 1
    assert err.count('line 1: neither "messages" nor "prompt" and "completion"') == 1
    assert not (tmp_path / "run").exists()
