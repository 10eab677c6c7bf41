"""`levelhead sft`: what it refuses, with exit code 2, and leaves untouched."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("peft")

import transformers
from tests.cli.sft_runs import PAIRS, save_tiny, start, weights, write
from transformers import TrainingArguments

from levelhead.cli import main
from levelhead.cli.errors import CliError
from levelhead.cli.models import load_tokenizer
from levelhead.cli.sft.training import _check_zero


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "model")


def test_a_model_that_patch_model_refuses_exits_with_2(pairs, tmp_path, capsys):
    config = transformers.Gemma2Config(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    folder = tmp_path / "model"
    transformers.Gemma2ForCausalLM(config).save_pretrained(folder)
    load_tokenizer("tiny", None, trust_remote_code=False).save_pretrained(folder)
    run = ["sft", str(folder), pairs, "--output", str(tmp_path / "run"), "--softcap", "20"]
    assert main(run) == 2
    assert "it caps its logits at 30 already" in capsys.readouterr().err


def test_pickled_weights_are_refused_unread(folder, pairs, tmp_path, capsys):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert main(["sft", str(folder), pairs, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "holds its weights as a pickle alone" in error
    assert "use_safetensors=False).save_pretrained" in error


def test_code_of_a_model_does_not_run_unless_trusted(folder, pairs, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert main(["sft", str(folder), pairs, "--output", str(tmp_path / "run")]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_no_such_model(pairs, tmp_path, capsys):
    model = str(tmp_path / "none")
    assert main(["sft", model, pairs, "--output", str(tmp_path / "run")]) == 2
    assert f"cannot load the tokenizer of {model}" in capsys.readouterr().err


def test_a_model_without_its_tokenizer(pairs, tmp_path, capsys):
    model = tmp_path / "untold"
    start().save_pretrained(model)
    assert main(["sft", str(model), pairs, "--output", str(tmp_path / "run")]) == 2
    assert (
        f"{model} holds a model without its tokenizer; save that there" in capsys.readouterr().err
    )


def test_nothing_is_overwritten(folder, pairs, capsys):
    before = weights(folder)["lm_head.weight"]
    assert main(["sft", str(folder), pairs, "--output", str(folder)]) == 2
    assert "holds files that are not of a run; name an empty folder" in capsys.readouterr().err
    assert main(["sft", str(folder), pairs, "--output", str(folder), "--resume"]) == 2
    assert torch.equal(weights(folder)["lm_head.weight"], before)


def test_a_refused_run_does_not_stand_in_the_way_of_the_next(folder, pairs, tmp_path):
    run = [pairs, "--output", str(tmp_path / "run"), "--max-steps", "1"]
    weights_file = folder / "model.safetensors"
    weights_file.rename(tmp_path / "aside")
    assert main(["sft", str(folder), *run]) == 2
    (tmp_path / "aside").rename(weights_file)
    assert main(["sft", str(folder), *run]) == 0


def test_bad_data_exits_with_2_and_leaves_nothing(tmp_path, capsys):
    data = write(tmp_path / "bad.jsonl", [PAIRS[0], {"prompt": "p"}])
    assert main(["sft", "tiny", data, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"levelhead sft: error: 1 of 2 lines of {data} cannot be used, so noth")
    assert '  line 2: "completion" is missing\n' in error
    assert not (tmp_path / "run").exists()


def test_bad_held_out_data_stops_it_too(pairs, tmp_path, capsys):
    run = ["sft", "tiny", pairs, "--output", str(tmp_path / "run"), "--eval"]
    assert main([*run, write(tmp_path / "bad.jsonl", [{}])]) == 2
    assert "1 of 1 lines of " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_accelerators_in_one_process_are_refused(pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    assert main(["sft", "tiny", pairs, "--output", str(tmp_path / "run")]) == 2
    assert "2 accelerators are visible to one process" in capsys.readouterr().err


def test_processes_that_do_not_know_of_each_other_are_refused(pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 3)
    assert main(["sft", "tiny", pairs, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "1 processes were launched, but accelerate makes a group of 3" in error


@pytest.mark.parametrize("gathers", [True, False])
def test_zero_3_must_gather_the_weights_to_save_them(gathers):
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": gathers}
    plugin = SimpleNamespace(hf_ds_config=HfDeepSpeedConfig({"zero_optimization": zero}))
    refusal = pytest.raises(CliError, match='"stage3_gather_16bit_weights_on_model_save": true')
    with contextlib.nullcontext() if gathers else refusal:
        _check_zero(plugin)
