"""`levelhead teacher`, and `levelhead sft --teacher`, from end to end with the tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("peft")

from levelhead.cli import main
from levelhead.cli.errors import CliError
from levelhead.cli.examples import Pair, encode
from levelhead.cli.models import load_model, load_tokenizer
from levelhead.cli.teacher import recording, store
from levelhead.cli.teacher.store import TeacherStore

ROWS = [{"prompt": f"box {i}:", "completion": f" {'plüm' * (1 + i % 3)}"} for i in range(10)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.jsonl", ROWS)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    for module in (store, recording):
        monkeypatch.setattr(module, "ROWS", 4)


def teach(data, folder, *options):
    assert main(["teacher", "tiny", data, "-o", str(folder), "--batch-size", "2", *options]) == 0
    return TeacherStore(Path(folder))


def shards(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("shard-*")}


def test_the_store_holds_the_top_k_of_the_logits(data, tmp_path, capsys):
    taught = teach(data, tmp_path / "store", "--top-k", "3")
    assert "10 rows, " in capsys.readouterr().out
    torch.manual_seed(42)
    model = load_model("tiny", torch.float32, trust_remote_code=False).eval()
    tokenizer = load_tokenizer("tiny", None, trust_remote_code=False)
    assert len(taught) == len(ROWS)
    for number, row in enumerate(ROWS):
        tokens = encode(Pair(**row), tokenizer)
        logits = model(torch.tensor([tokens.input_ids])).logits[0, :-1].detach()
        asked = torch.tensor(tokens.labels[1:]) != -100
        top = logits[asked].log_softmax(-1).topk(3)
        assert torch.equal(taught[number].ids, top.indices)
        # float16 holds eleven bits of a log-probability of about -5.
        torch.testing.assert_close(taught[number].log_probs, top.values, rtol=2**-11, atol=1e-5)


def test_a_run_killed_at_any_moment_goes_on_to_the_same_store(data, tmp_path):
    moments = ["inside a shard", "before a shard is described", "before the manifest"]
    pairs = [word for n, moment in enumerate(moments) for word in (moment, str(tmp_path / str(n)))]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed_teacher.py"), data, *pairs],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    teach(data, tmp_path / "whole")
    for n in range(len(moments)):
        with pytest.raises(CliError, match="holds no finished store"):
            TeacherStore(tmp_path / str(n))
        kept = (tmp_path / str(n) / "shard-00000.arrow").stat().st_mtime_ns
        teach(data, tmp_path / str(n))
        assert (tmp_path / str(n) / "shard-00000.arrow").stat().st_mtime_ns == kept
        assert shards(tmp_path / str(n)) == shards(tmp_path / "whole")


def test_two_processes_share_the_work_in_any_order(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        arguments = ["teacher", "tiny", data, "-o", str(tmp_path / "two"), "--batch-size", "2"]
        assert main([*arguments, "--validation", data]) == 0
        assert (tmp_path / "two" / "manifest.json").exists() == (rank == "0")
    assert capsys.readouterr().out.count("10 rows, ") == 1
    monkeypatch.delenv("WORLD_SIZE")
    teach(data, tmp_path / "one")
    assert shards(tmp_path / "two") == shards(tmp_path / "one")
    assert sorted(shards(tmp_path / "one")) == [
        f"shard-{n:05}.{kind}" for n in range(3) for kind in ("arrow", "json")
    ]


def test_recalibration_is_chosen_reported_and_changed_without_another_pass(data, tmp_path, capsys):
    taught = teach(data, tmp_path / "store", "--validation", data)
    found = taught.manifest.recalibration
    assert found.method == "temperature"
    assert found.ece_after == min(error for _, error in found.curve)
    assert f"{found.value:.2f}: {found.ece_after:.4f}" in capsys.readouterr().out.replace("\n", "")
    before = shards(tmp_path / "store")
    again = teach(data, tmp_path / "store", "--validation", data, "--recalibrate", "smoothing")
    assert again.manifest.recalibration.method == "smoothing"
    assert shards(tmp_path / "store") == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--top-k", "260"], "--top-k 260 is more than the teacher's 259 tokens"),
        (["--top-k", "1", "--validation", "x.jsonl"], "use --top-k 2 or more"),
        (["--validation", "absent.jsonl"], "cannot read absent.jsonl"),
    ],
)
def test_refusals(data, tmp_path, capsys, options, says):
    assert main(["teacher", "tiny", data, "-o", str(tmp_path / "store"), *options]) == 2
    assert says in capsys.readouterr().err


def test_a_store_goes_on_with_its_own_settings_alone(data, tmp_path, capsys):
    teach(data, tmp_path / "store")
    arguments = ["teacher", "tiny", data, "-o", str(tmp_path / "store")]
    assert main([*arguments, "--top-k", "3"]) == 2
    assert "Changed: k (was 5, is 3)" in capsys.readouterr().err
    assert main([*arguments[:-1], str(tmp_path)]) == 2
    assert "holds files that are not of a store" in capsys.readouterr().err


def test_a_shard_that_was_changed_is_an_error_and_is_made_again(data, tmp_path):
    teach(data, tmp_path / "store")
    path = tmp_path / "store" / "shard-00001.arrow"
    whole = path.read_bytes()
    path.write_bytes(whole[:400] + bytes([whole[400] ^ 1]) + whole[401:])
    with pytest.raises(CliError, match=r"shard-00001\.arrow is not what the manifest"):
        TeacherStore(tmp_path / "store")
    teach(data, tmp_path / "store")
    assert path.read_bytes() == whole


def student(data, folder, teacher, *options):
    run = ["sft", "tiny", data, "--output", str(folder), "--teacher", str(teacher)]
    return main([*run, "--max-steps", "3", "--learning-rate", "1e-3", *options])


def test_a_student_learns_from_it(data, tmp_path, capsys):
    teach(data, tmp_path / "store", "--validation", data)
    options = ["--eval", data, "--distillation", "other", "--batch-size", "4"]
    assert student(data, tmp_path / "student", tmp_path / "store", *options) == 0
    assert "KL to the teacher" in capsys.readouterr().out
    summary = json.loads((tmp_path / "student" / "summary.json").read_text())
    assert summary["settings"]["distillation"] == "other"
    assert summary["settings"]["smoothing"] == 0
    assert summary["steps"] == 3
    found = summary["calibration"]
    assert found["trust"] == pytest.approx(found["token_accuracy"] - found["ece"])
    assert 0 <= found["ece"] <= 1


def test_the_loss_of_the_first_step_is_that_of_the_logits(data, tmp_path):
    taught = teach(data, tmp_path / "store", "--validation", data)
    options = ["--batch-size", "10", "--distillation", "full"]
    assert student(data, tmp_path / "student", tmp_path / "store", *options) == 0
    summary = json.loads((tmp_path / "student" / "summary.json").read_text())
    torch.manual_seed(42)  # as transformers.set_seed does
    model = load_model("tiny", torch.float32, trust_remote_code=False).eval()
    tokenizer = load_tokenizer("tiny", None, trust_remote_code=False)
    losses = []
    for number, row in enumerate(ROWS):
        tokens = encode(Pair(**row), tokenizer)
        asked = torch.tensor(tokens.labels[1:]) != -100
        student_log_probs = model(torch.tensor([tokens.input_ids])).logits[0, :-1].log_softmax(-1)
        ids, log_probs = taught[number]
        teacher = taught.manifest.recalibration(log_probs)
        picked = student_log_probs[asked].gather(1, ids)
        losses.append((teacher.exp() * (teacher - picked)).sum(1))
    expected = torch.cat(losses).mean().item()
    assert summary["loss"]["first"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-length", "9"], "was made for other tokens: 10 rows of"),
        (["--smoothing", "0.1"], "leave one of them out"),
        (["--teacher", "absent"], "absent holds no finished store of a teacher"),
    ],
)
def test_a_store_that_does_not_fit_is_refused(data, tmp_path, capsys, options, says):
    teach(data, tmp_path / "store")
    assert student(data, tmp_path / "student", tmp_path / "store", *options) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


def test_another_tokenizer_is_refused(data, tmp_path, capsys):
    teach(data, tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocabulary": "0" * 64}))
    assert student(data, tmp_path / "student", tmp_path / "store") == 2
    assert "the tokenizer of tiny is not that of the teacher tiny" in capsys.readouterr().err


def test_options_of_a_student_need_a_teacher(data, tmp_path, capsys):
    run = ["sft", "tiny", data, "--output", str(tmp_path / "student"), "--raw-teacher"]
    assert main(run) == 2
    assert "need --teacher STORE" in capsys.readouterr().err
