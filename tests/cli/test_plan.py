"""`levelhead plan`: what it says about configs in a folder, layouts, and unusable arguments."""

import json

import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")

import torch
import transformers

from levelhead.cli import main
from levelhead.cli.plan.cost import Layout

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def folder(tmp_path, config):
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def llama(tmp_path, **options):
    return folder(tmp_path, transformers.LlamaConfig(vocab_size=32000, **SMALL, **HEADS, **options))


def plan(capsys, *arguments):
    """What it says as JSON."""
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def methods(said):
    return {row["method"]: row for row in said["methods"]}


def refusal(capsys, *arguments):
    assert main(["plan", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_a_llama(tmp_path, capsys):
    said = plan(capsys, llama(tmp_path), "--tokens", 1000)
    model = said["model"]
    assert (model["vocabulary"], model["hidden"], model["layers"]) == (32000, 64, 2)
    assert (model["tied"], model["softcap"]) == (False, None)
    dense = methods(said)["transformers loss"]
    assert dense["peak_bytes"] == 12 * 1000 * 32000
    assert dense["operations"] == 6 * 1000 * 32000 * 64
    assert dense["seconds"] is None
    assert dense["longest_tokens"] is None


def test_gemma_2_has_a_softcap_and_a_tied_head(tmp_path, capsys):
    config = transformers.Gemma2Config(vocab_size=500, head_dim=16, **SMALL, **HEADS)
    said = plan(capsys, folder(tmp_path, config), "--tokens", 1000)
    assert (said["model"]["softcap"], said["model"]["tied"]) == (30, True)
    assert methods(said)["transformers loss"]["peak_bytes"] == 14 * 1000 * 500
    fused = methods(said)["F.linear_cross_entropy, chunked"]
    assert fused["peak_bytes"] is None
    assert "cap" in fused["note"]


def test_gpt_2_names_its_fields_otherwise(tmp_path, capsys):
    config = transformers.GPT2Config(vocab_size=1001, n_embd=32, n_layer=3, n_head=2)
    model = plan(capsys, folder(tmp_path, config), "--tokens", 10)["model"]
    assert (model["vocabulary"], model["hidden"], model["layers"]) == (1001, 32, 3)
    assert model["tied"]


def test_lora_freezes_the_head(capsys):
    said = plan(capsys, "tiny", "--tokens", 100, "--lora", "--tflops", 100)
    assert said["head_at_rest_bytes"] == {
        "parameters": 2 * 259 * 64,
        "gradients": 0,
        "optimizer states": 0,
    }
    for row in said["methods"]:
        assert row["operations"] == 4 * 100 * 259 * 64
        assert row["seconds"] == row["operations"] / 1e14


@pytest.mark.parametrize(
    ("zero", "want"),
    [
        (0, (2000, 2000, 12000)),
        (1, (2000, 2000, 3000)),
        (2, (2000, 500, 3000)),
        (3, (500, 500, 3000)),
    ],
)
def test_zero_divides_what_its_paper_says(zero, want):
    states = Layout(zero, tensor=1, data=4).states(1000, torch.bfloat16, frozen=False)
    assert tuple(states.values()) == want


def test_tensor_parallel_ranks_share_the_head(tmp_path, capsys):
    model = llama(tmp_path)
    alone = plan(capsys, model, "--tokens", 1000)
    shared = plan(capsys, model, "--tokens", 1000, "--gpus", 4, "--tensor-parallel", 2)
    assert (shared["tensor_parallel"], shared["data_parallel"]) == (2, 2)
    assert (
        2 * shared["head_at_rest_bytes"]["parameters"] == alone["head_at_rest_bytes"]["parameters"]
    )
    dense, ours = (methods(shared)[m] for m in ("transformers loss", "levelhead, chunked"))
    assert dense["peak_bytes"] == methods(alone)["transformers loss"]["peak_bytes"]  # gathered
    assert dense["operations"] == 6 * 1000 * 16000 * 64
    assert ours["operations"] == 8 * 1000 * 16000 * 64
    assert "share" in methods(shared)["F.linear_cross_entropy, chunked"]["note"]


def test_the_longest_batch_grows_with_memory_and_sharding(tmp_path, capsys):
    model = llama(tmp_path)

    def longest(*arguments):
        said = plan(capsys, model, "--tokens", 1, *arguments)
        return {name: row["longest_tokens"] for name, row in methods(said).items()}

    one, two = longest("--memory", 1), longest("--memory", 2)
    sharded = longest("--memory", 1, "--gpus", 8, "--zero", 3)
    for name, tokens in one.items():
        assert 0 < tokens < two[name]
        assert tokens < sharded[name]
    assert one["transformers loss"] * 2 < one["levelhead, chunked"]
    assert set(longest("--memory", 0.01).values()) == {0}


def test_the_verdict_comes_first(tmp_path, capsys):
    arguments = [llama(tmp_path), "--tokens", "8192", "--memory", "2", "--tflops", "100"]
    assert main(["plan", *arguments]) == 0
    printed = capsys.readouterr().out
    verdict, table = printed.split("┌", 1)
    assert verdict.startswith("Dense (transformers loss): 2.93 GiB per GPU")
    flat = " ".join(verdict.split())
    assert "Longest micro-batch that fits --memory 2, in tokens: dense " in flat
    assert "Time at 100 TFLOP/s, products alone: dense 0.00101 s" in flat
    assert "32000 x 64 bfloat16" in table


def test_no_time_is_printed_without_a_rate(capsys):
    assert main(["plan", "tiny", "--tokens", "10"]) == 0
    assert "Time: not known without a rate" in capsys.readouterr().out


def test_what_does_not_fit_is_said(capsys):
    said = plan(capsys, "tiny", "--tokens", 10**12, "--memory", 1)
    assert any("do not fit" in line for line in said["verdict"])
    said = plan(capsys, "tiny", "--tokens", 1, "--memory", 0.0001)
    assert any("leave no room" in line for line in said["verdict"])


def test_gpus_that_do_not_divide_are_refused(capsys):
    said = refusal(capsys, "tiny", "--tokens", 10, "--gpus", 6, "--tensor-parallel", 4)
    assert "--gpus 6 cannot be divided into tensor-parallel groups of 4" in said


def test_more_ranks_than_rows_are_refused(capsys):
    said = refusal(capsys, "tiny", "--tokens", 10, "--gpus", 512, "--tensor-parallel", 512)
    assert "259" in said


def test_a_folder_without_a_config_is_refused(tmp_path, capsys):
    assert f"{tmp_path} holds no model" in refusal(capsys, tmp_path, "--tokens", 10)


def test_a_model_that_is_no_causal_one_is_refused(tmp_path, capsys):
    model = folder(tmp_path, transformers.T5Config())
    assert "holds a T5Config: no causal language model" in refusal(capsys, model, "--tokens", 10)


@pytest.mark.parametrize("tokens", ["0", "-1", "many"])
def test_tokens_are_counted_from_one(tokens, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "tiny", "--tokens", tokens])
    assert stopped.value.code == 2
    assert "whole number from 1 on" in capsys.readouterr().err
