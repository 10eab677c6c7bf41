"""`levelhead sft --calibration-aware`: what is trained, when E-steps happen, and what is said."""

import json
import random
import shutil

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("peft")

from safetensors.torch import load_file

from levelhead.cli import main
from levelhead.cli.sft import calibration


def write_questions(path, n=12):
    """Questions of two to four choices."""
    draw = random.Random(0)
    rows = []
    for number in range(n):
        choices = [f"{number}{'abcd'[i]}" for i in range(draw.choice([2, 3, 4]))]
        answer = draw.randrange(len(choices))
        rows.append({"question": f"Frage {number}: größer?", "choices": choices, "answer": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(data, output, *options):
    shared = ["--learning-rate", "1e-2", "--batch-size", "4", "--output", str(output)]
    return main(["sft", "tiny", data, *shared, *options])


@pytest.fixture
def data(tmp_path):
    return write_questions(tmp_path / "questions.jsonl")


@pytest.fixture
def estimates(monkeypatch):
    """Global steps before which there was an E-step."""
    steps = []
    original = calibration.Expectation._estimate

    def watched(self, trainer, model):
        steps.append(trainer.state.global_step)
        original(self, trainer, model)

    monkeypatch.setattr(calibration.Expectation, "_estimate", watched)
    return steps


@pytest.mark.parametrize(("refresh", "steps"), [("once", [0]), ("epoch", [0, 3]), ("2", [0, 2, 4])])
def test_e_steps_happen_when_they_are_due(data, tmp_path, estimates, refresh, steps):
    assert (
        run(
            data,
            tmp_path / "out",
            "--calibration-aware",
            "rcft",
            "--em-refresh",
            refresh,
            "--epochs",
            "2",
        )
        == 0
    )
    assert estimates == steps


def test_cft_learns_the_letters_alone_and_says_how_calibrated_it_is(data, tmp_path, capsys):
    options = ["--calibration-aware", "cft", "--epochs", "1", "--critical-accuracy", "0.999"]
    assert run(data, tmp_path / "out", *options, "--eval", data) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rows"]["data"]["supervised"] == 2 * 12
    assert summary["settings"]["smoothing"] == 0
    names = ["training questions, before", "training questions, after", "held-out questions, after"]
    assert list(summary["regimes"]) == names
    assert summary["regimes"][names[1]] == summary["regimes"][names[2]]
    printed = capsys.readouterr().out
    for name in names:
        assert f"{name}: accuracy {summary['regimes'][name]['accuracy']:.3f}" in printed
    assert "the paper uses CFT" in printed


def test_rcft_that_is_resumed_is_the_same_run(data, tmp_path):
    options = [
        "--calibration-aware",
        "rcft",
        "--ece-weight",
        "3",
        "--epochs",
        "2",
        "--save-steps",
        "2",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(data, whole, *options) == 0
    shutil.copytree(whole, cut)
    for last in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(cut / last, ignore_errors=True)
    shutil.copytree(whole / "checkpoint-4", cut / "checkpoint-4")
    (cut / "model.safetensors").unlink()
    (cut / "summary.json").unlink()
    assert run(data, cut, *options, "--resume") == 0
    got, want = (load_file(folder / "model.safetensors") for folder in (cut, whole))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, msg=name)
    before = [
        json.loads((folder / "summary.json").read_text())["regimes"]["training questions, before"]
        for folder in (cut, whole)
    ]
    assert before[0] == before[1]


def test_the_regulariser_by_class_trains_another_model(data, tmp_path):
    for name in ("confidence", "classwise"):
        assert (
            run(
                data,
                tmp_path / name,
                "--calibration-aware",
                "rcft",
                "--ece",
                name,
                "--max-steps",
                "2",
            )
            == 0
        )
    one, other = (
        load_file(tmp_path / name / "model.safetensors") for name in ("confidence", "classwise")
    )
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ece-weight", "1"], "--ece-weight needs --calibration-aware"),
        (["--em-refresh", "once"], "--em-refresh needs --calibration-aware"),
        (
            ["--calibration-aware", "cft", "--ece", "classwise"],
            "--ece is of --calibration-aware rcft",
        ),
        (["--calibration-aware", "rcft", "--temperature", "2"], "leave them out"),
        (["--calibration-aware", "cft", "--teacher", "x"], "take one"),
    ],
)
def test_options_that_do_not_go_together_are_refused(data, tmp_path, capsys, options, message):
    assert run(data, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("refresh", ["0", "never", "-1", "1.5"])
def test_a_refresh_that_means_nothing_is_refused(data, tmp_path, capsys, refresh):
    with pytest.raises(SystemExit) as stop:
        run(data, tmp_path / "out", "--calibration-aware", "rcft", f"--em-refresh={refresh}")
    assert stop.value.code == 2
    assert "must be once, epoch or a number of steps" in capsys.readouterr().err


def test_rows_that_are_no_questions_are_named(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    assert run(str(path), tmp_path / "out", "--calibration-aware", "cft") == 2
    error = capsys.readouterr().err
    assert "line 1" in error
    assert 'each row must have "question"' in error
