"""A rank that dies ends the job with an error, and leaves no checkpoint that is not whole."""

from pathlib import Path

import pytest
import torch
from tests.distributed.launch import ROOT, Job, run

pytest.importorskip("accelerate")

# One run of the example for all that is asked of it.
pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("killed_worker.py")
EXAMPLES = ROOT / "examples/accelerate"
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
STEPS = ("--steps", "10", "--save-every", "3", "--batch-size", "32")  # 8 steps are an epoch


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_a_rank_killed_in_a_step_is_an_error_on_the_other(kind):
    # The ranks wait 120 s for each other where nothing tells them that one is gone.
    job = run(WORKER, kind, timeout=100)
    assert job.returncode != 0
    assert "SIGKILL" in job.output
    assert job.results[1] is None
    assert job.results[0].startswith(("RuntimeError", "DistBackendError"))


def _train(output: Path, config: str) -> Job:
    """The example as a user starts it, but for the precision and the processor."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / config)]
    launcher += ["--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no"]
    job = run(EXAMPLES / "train.py", "--output", str(output), *STEPS, env=ON_CPU, launcher=launcher)
    assert job.returncode == 0, job.output
    return job


def _checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    assert "resumed" not in _train(output, "ddp.yaml").output
    return output


def test_the_example_saves_checkpoints_and_the_model(undisturbed):
    names = [*(f"step-{step:08d}" for step in (3, 6, 9, 10)), "model"]
    assert _checkpoints(undisturbed) == sorted(names)


def test_a_half_written_checkpoint_is_left_aside_and_the_run_continued(undisturbed, tmp_path):
    from safetensors.torch import load_file

    killed = run(WORKER, "--output", str(tmp_path), *STEPS, env=ON_CPU, timeout=100)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.output
    assert _checkpoints(tmp_path) == ["step-00000003", "unfinished"]

    assert "resumed after step 3" in _train(tmp_path, "fsdp2.yaml").output
    assert _checkpoints(tmp_path) == _checkpoints(undisturbed)
    got = load_file(tmp_path / "model/model.safetensors")
    want = load_file(undisturbed / "model/model.safetensors")
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name
