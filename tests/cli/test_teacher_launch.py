"""`levelhead sft --teacher` in two processes: the same student as in one."""

import json

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("peft")

from safetensors.torch import load_file
from tests.cli.test_sft_launch import OPTIONS, ROWS, in_two_processes

from levelhead.cli import main


def test_two_processes_distil_the_student_of_one_with_twice_the_batch(tmp_path):
    data, store = tmp_path / "data.jsonl", str(tmp_path / "store")
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(["teacher", "tiny", str(data), "-o", store]) == 0
    # Another seed than the teacher's weights, or its gradients would be nothing but rounding.
    run = ["sft", "tiny", str(data), "--teacher", store, "--seed", "1", *OPTIONS]
    codes, _, err = in_two_processes(*run, str(tmp_path / "two"), "--batch-size", "2")
    assert codes == (0, 0), err
    assert main([*run, str(tmp_path / "one"), "--batch-size", "4"]) == 0
    got, want = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, value in want.items():
        # float32 sums in another order, divided by their own size in the first steps of AdamW
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5)
