"""`levelhead sft` from end to end, with the tiny model on a few rows."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("peft")

import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from levelhead.cli import main
from levelhead.cli.errors import CliError
from levelhead.cli.models import load_model, load_tokenizer
from levelhead.cli.sft.training import _check_zero

PAIRS = [
    {"prompt": f"box {i}, shelf {i % 7}:", "completion": (" fig", " plum", " apple")[i % 3]}
    for i in range(24)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{i} + {i}?"},
            {"role": "assistant", "content": f"{2 * i}"},
        ]
    }
    for i in range(6)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", PAIRS)


def weights(folder):
    return load_file(folder / "model.safetensors")


def start(seed=42):
    transformers.set_seed(seed)
    return load_model("tiny", torch.float32, trust_remote_code=False)


def reference_rows():
    """The pairs by hand: one token a byte, and a label where the completion and its end are."""
    tokenizer = load_tokenizer("tiny", None, trust_remote_code=False)
    rows = []
    for pair in PAIRS:
        prompt, completion = (tokenizer(pair[key])["input_ids"] for key in ("prompt", "completion"))
        answer = [*completion, tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def reference_batch(rows):
    width = max(len(row["input_ids"]) for row in rows)
    return {
        key: torch.tensor([row[key] + [padding] * (width - len(row[key])) for row in rows])
        for key, padding in (("input_ids", 0), ("labels", -100))
    }


@dataclass(frozen=True)
class Run:
    """A finished command."""

    code: int
    output: Path
    printed: str
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """Pairs to learn from, chats to evaluate on, two epochs of six steps."""
    folder = tmp_path_factory.mktemp("sft")
    data, held_out = write(folder / "p.jsonl", PAIRS), write(folder / "c.jsonl", CHATS)
    output = folder / "new" / "run"
    options = ["--eval", held_out, "--output", str(output), "--epochs", "2", "--batch-size", "4"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(["sft", "tiny", data, *options, "--learning-rate", "1e-3"])
    summary = json.loads((output / "summary.json").read_text())
    return Run(code, output, printed.getvalue(), summary)


def test_it_succeeds_and_says_what_it_did(sft):
    assert sft.code == 0
    assert "Training: 24 rows of " in sft.printed
    assert "Evaluation: 6 rows of " in sft.printed
    assert "12 steps, 2 epochs" in sft.printed
    assert str(sft.output) in sft.printed


def test_the_summary_adds_up(sft):
    summary, rows = sft.summary, reference_rows()
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert summary["rows"]["data"]["tokens"] == tokens
    assert summary["rows"]["data"]["supervised"] == sum(
        label != -100 for row in rows for label in row["labels"]
    )
    assert (summary["steps"], summary["tokens"]) == (12, 2 * tokens)
    assert summary["tokens_per_second"] == pytest.approx(2 * tokens / summary["seconds"])
    assert summary["loss"]["last"] < summary["loss"]["first"]
    assert summary["eval_loss"]["last"] < summary["eval_loss"]["first"]
    assert summary["settings"]["learning_rate"] == 1e-3


def test_the_memory_saved_follows_from_the_largest_batch(sft):
    logits = sft.summary["logits"]
    entries = logits["positions"] * logits["vocabulary"]
    # Rows differ in length by a few bytes, and a batch is as wide as its widest.
    assert (
        4 * 14 < logits["positions"] <= 4 * max(len(row["input_ids"]) for row in reference_rows())
    )
    assert logits["vocabulary"] == 256 + 3
    assert logits["dense_bytes"] == 8 * entries  # float32: logits and their gradient
    assert logits["levelhead_bytes"] == 4 * entries  # one buffer holds them all


def test_the_model_loads_without_levelhead(sft):
    model = AutoModelForCausalLM.from_pretrained(sft.output)
    assert type(model) is transformers.LlamaForCausalLM
    assert weights(sft.output).keys() == start().state_dict().keys()
    for path in sft.output.glob("*.json"):
        if path.name not in ("summary.json", "settings.json"):
            assert "levelhead" not in path.read_text().lower()
    tokenizer = AutoTokenizer.from_pretrained(sft.output)
    assert (
        tokenizer.chat_template
        == load_tokenizer("tiny", None, trust_remote_code=False).chat_template
    )


def test_prepared_data_is_not_left_behind(sft):
    assert not list(sft.output.glob("tokens-*"))


def test_it_trains_as_the_trainer_with_label_smoothing_does(sft, tmp_path):
    model = start()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        label_smoothing_factor=0.1,
        learning_rate=1e-3,
        warmup_steps=0.03,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=reference_rows(),
        data_collator=reference_batch,
    )
    trainer.train()
    moved = 0.0
    for (name, want), before in zip(
        model.state_dict().items(), start().state_dict().values(), strict=True
    ):
        # Parameters move by 1e-3 a step; float32 roundings of the loss shift that by 1e-3 of it.
        torch.testing.assert_close(weights(sft.output)[name], want, rtol=0, atol=1e-6)
        moved = max(moved, (want - before).abs().max().item())
    assert moved > 5e-3


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        (["--smoothing", "0"], lambda z, t: F.cross_entropy(z, t)),
        (["--smoothing", "0.3"], lambda z, t: F.cross_entropy(z, t, label_smoothing=0.3)),
        (
            ["--softcap", "0.5", "--temperature", "0.25"],
            lambda z, t: (
                F.cross_entropy(0.5 * torch.tanh(z / 0.25 / 0.5), t, label_smoothing=0.1) * 0.25
            ),
        ),
    ],
)
def test_the_first_loss_is_that_of_the_formula(options, loss, pairs, tmp_path):
    output = tmp_path / "run"
    run = ["sft", "tiny", pairs, "--output", str(output), "--batch-size", "24", "--max-steps", "1"]
    assert main([*run, *options]) == 0
    batch = reference_batch(reference_rows())
    with torch.no_grad():
        logits = start()(input_ids=batch["input_ids"]).logits[:, :-1]
    target = batch["labels"][:, 1:]
    counts = target != -100
    want = loss(logits[counts], target[counts])
    summary = json.loads((output / "summary.json").read_text())
    # float32 roundings of a mean over some hundred tokens; the formulas differ by 0.01 and more
    assert summary["loss"]["first"] == pytest.approx(want.item(), abs=1e-5)


RESUMABLE = ["--batch-size", "4", "--max-steps", "9", "--save-steps", "3", "--seed", "1"]


def test_a_run_killed_within_a_checkpoint_resumes_to_the_same_model(
    pairs, tmp_path, monkeypatch, capsys
):
    whole, broken = (["sft", "tiny", pairs, *RESUMABLE, "--output", str(tmp_path / name)]
                     for name in ("whole", "broken"))  # fmt: skip
    assert main(whole) == 0
    save_rng_state = Trainer._save_rng_state

    def interrupt(self, folder):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        save_rng_state(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", interrupt)
        assert main(broken) == 130
    assert (tmp_path / "broken" / "checkpoint-6" / "model.safetensors").exists()
    capsys.readouterr()
    assert main([*broken, "--resume"]) == 0
    assert f"Going on from {tmp_path / 'broken' / 'checkpoint-3'}." in capsys.readouterr().out
    got, want = weights(tmp_path / "broken"), weights(tmp_path / "whole")
    assert all(torch.equal(got[name], value) for name, value in want.items())
    first, second = (
        json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "broken")
    )
    assert first["loss"] == second["loss"]
    assert first["tokens"] == second["tokens"]


def test_resuming_something_else_is_refused(pairs, tmp_path, capsys):
    run = ["sft", "tiny", pairs, *RESUMABLE, "--output", str(tmp_path / "run")]
    assert main(run) == 0
    before = weights(tmp_path / "run")["lm_head.weight"]
    assert main([*run, "--resume", "--smoothing", "0.2"]) == 2
    assert "changed smoothing (was 0.1, is 0.2)\n" in capsys.readouterr().err
    write(Path(pairs), PAIRS[1:])
    assert main([*run, "--resume"]) == 2
    assert "changed tokens (was {'data': '" in capsys.readouterr().err
    assert main(run) == 2
    assert "holds a run already; go on with it by --resume, or name" in capsys.readouterr().err
    assert torch.equal(weights(tmp_path / "run")["lm_head.weight"], before)


def test_there_may_be_nothing_to_resume_yet(pairs, tmp_path, capsys):
    run = ["sft", "tiny", pairs, "--max-steps", "1", "--output", str(tmp_path / "run")]
    assert main([*run, "--resume"]) == 0
    assert "no whole checkpoint yet: starting from the beginning" in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path):
    """The tiny model, saved."""
    path = tmp_path / "model"
    start(seed=3).save_pretrained(path)
    load_tokenizer("tiny", None, trust_remote_code=False).save_pretrained(path)
    return path


# peft 0.21 asks transformers 5.23 by a name that is deprecated there.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [[], ["--bf16"], ["--gradient-checkpointing"]])
def test_lora_saves_an_adapter_that_leaves_the_head_alone(options, folder, pairs, tmp_path):
    from peft import PeftModel

    output = tmp_path / "run"
    run = ["sft", str(folder), pairs, "--output", str(output), "--max-steps", "3", "--lora", "4"]
    assert main([*run, *options]) == 0
    saved = load_file(output / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 7  # A and B, of seven linear layers, in two blocks
    assert all(weight.shape[0] == 4 or weight.shape[1] == 4 for weight in saved.values())
    assert not any("lm_head" in name for name in saved)
    assert any(weight.abs().max() > 0 for name, weight in saved.items() if "lora_B" in name)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), output)
    assert type(model.base_model.model) is transformers.LlamaForCausalLM


def test_bf16_keeps_the_weights_wide(pairs, tmp_path):
    narrow, wide = tmp_path / "narrow", tmp_path / "wide"
    run = ["sft", "tiny", pairs, "--max-steps", "2", "--learning-rate", "1e-3"]
    assert main([*run, "--output", str(narrow), "--bf16"]) == 0
    assert main([*run, "--output", str(wide)]) == 0
    head, same = (weights(folder)["lm_head.weight"] for folder in (narrow, wide))
    assert head.dtype == torch.float32
    assert not torch.equal(head, same)
    # Two steps of AdamW, of 1e-3 at most in either direction.
    torch.testing.assert_close(head, same, rtol=0, atol=4e-3)


def test_gradient_checkpointing_changes_nothing(pairs, tmp_path):
    run = ["sft", "tiny", pairs, "--max-steps", "2", "--output"]
    assert main([*run, str(tmp_path / "a"), "--gradient-checkpointing"]) == 0
    assert main([*run, str(tmp_path / "b")]) == 0
    got, want = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(got[name], value) for name, value in want.items())


@pytest.mark.slow
def test_compile_trains_the_same_model(pairs, tmp_path):
    run = ["sft", "tiny", pairs, "--max-steps", "3", "--learning-rate", "1e-3", "--output"]
    assert main([*run, str(tmp_path / "a"), "--compile"]) == 0
    assert main([*run, str(tmp_path / "b")]) == 0
    got, want = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert got.keys() == want.keys()
    for name, value in want.items():
        # float32 sums in another order, divided by their own size in the first steps of AdamW
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5)


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


def test_a_chat_template_in_a_file_takes_the_place_of_the_tokenizers(tmp_path, capsys):
    chats, output = write(tmp_path / "chats.jsonl", CHATS), tmp_path / "run"
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    run = ["sft", "tiny", chats, "--output", str(output), "--max-steps", "1"]
    assert main([*run, "--chat-template", str(template)]) == 0
    assert AutoTokenizer.from_pretrained(output).chat_template == template.read_text()
    assert main([*run, "--chat-template", str(tmp_path / "none")]) == 2
    assert "cannot read " in capsys.readouterr().err


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
