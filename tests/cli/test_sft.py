"""`levelhead sft` from end to end, with the tiny model on a few rows."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
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
from tests.cli.sft_runs import CHATS, PAIRS, save_tiny, start, weights, write
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from levelhead.cli import main
from levelhead.cli.models import load_tokenizer


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", PAIRS)


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


# peft 0.21 asks transformers 5.23 by a name that is deprecated there.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [[], ["--bf16"], ["--gradient-checkpointing"]])
def test_lora_saves_an_adapter_that_leaves_the_head_alone(options, pairs, tmp_path):
    from peft import PeftModel

    folder = save_tiny(tmp_path / "model")
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


def test_a_chat_template_in_a_file_takes_the_place_of_the_tokenizers(tmp_path, capsys):
    chats, output = write(tmp_path / "chats.jsonl", CHATS), tmp_path / "run"
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    run = ["sft", "tiny", chats, "--output", str(output), "--max-steps", "1"]
    assert main([*run, "--chat-template", str(template)]) == 0
    assert AutoTokenizer.from_pretrained(output).chat_template == template.read_text()
    assert main([*run, "--chat-template", str(tmp_path / "none")]) == 2
    assert "cannot read " in capsys.readouterr().err
