"""`levelhead capacity`: the verdict on models that cannot, can, and do become confident."""

import json
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("peft")

import transformers
from tests.cli.trained import save_trained, text

from levelhead.calibration.capacity import smoothed_margin
from levelhead.cli import main
from levelhead.cli.models import load_model, load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("capacity")
    (folder / "text.txt").write_text(text(seed=2, lines=60))
    save_trained(folder / "trained", factor=3.0)
    return folder


def capacity(capsys, *arguments):
    assert main(["capacity", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model_with_small_weights_cannot_become_confident(capsys):
    found = capacity(capsys, "tiny")
    assert found["verdict"] == "impossible"
    assert found["sample"] is None
    assert found["ceiling"]["hidden_norm"] == pytest.approx(8)  # sqrt(64), gains of one
    assert found["optimum"]["margin"] == pytest.approx(smoothed_margin(259, 0.1))
    transformers.set_seed(42)
    weight = load_model("tiny", torch.float32, trust_remote_code=False).lm_head.weight.detach()
    singular = torch.linalg.svdvals(weight.double())[0].item()
    assert found["head"]["spectral_norm"] == pytest.approx(singular, rel=1e-5)


def test_a_lower_temperature_brings_it_within_reach(capsys):
    limit = capacity(capsys, "tiny")["ceiling"]["max_temperature"]
    for share, verdict in ((0.99, "possible"), (1.01, "impossible")):
        found = capacity(capsys, "tiny", "--temperature", limit * share)
        assert found["verdict"] == verdict
        assert found["ceiling"]["max_temperature"] == pytest.approx(limit)


def test_a_confident_model_has_reached_it(capsys, folder):
    found = capacity(capsys, folder / "trained", folder / "text.txt")
    assert found["verdict"] == "reached"
    ids = load_tokenizer("tiny", None, trust_remote_code=False)((folder / "text.txt").read_text())[
        "input_ids"
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "trained").eval()
    with torch.no_grad():
        z = torch.cat(
            [model(input_ids=torch.tensor([ids[i : i + 1024]])).logits[0, :-1].double()
             for i in range(0, len(ids), 1024)]
        )  # fmt: skip
    p = z.softmax(-1)
    seen, target = found["sample"]["observed"], 0.9 + 0.1 / 259
    assert found["sample"]["hidden_norms"]["count"] == len(z)
    assert seen["max_confidence"] == pytest.approx(p.max().item(), rel=1e-4)
    assert seen["mean_confidence"] == pytest.approx(p.max(-1).values.mean().item(), rel=1e-4)
    entropy = torch.distributions.Categorical(logits=z).entropy().mean().item()
    assert seen["mean_entropy"] == pytest.approx(entropy, rel=1e-3)
    margin = ((z.max(-1).values - z.mean(-1)) * 259 / 258).max().item()
    assert seen["max_margin"] == pytest.approx(margin, rel=1e-4)
    share = (p.max(-1).values >= target).double().mean().item()
    assert seen["share_at_optimum"] == pytest.approx(share, abs=2 / len(z))


def test_what_is_seen_lies_within_the_bounds(capsys, folder):
    for options in ([], ["--temperature", "0.3"], ["--softcap", "3"]):
        found = capacity(capsys, folder / "trained", folder / "text.txt", *options)
        sample, ceiling = found["sample"], found["ceiling"]
        bounds, seen = sample["bounds"], sample["observed"]
        assert seen["max_margin"] <= min(
            bounds["margin"], ceiling["margin"]
        )  # either is the tighter
        for bound in (bounds, ceiling):
            assert seen["max_confidence"] <= bound["max_probability"]
            assert seen["mean_entropy"] >= bound["min_entropy"]
        assert sample["hidden_norms"]["max"] == bounds["hidden_norm"] <= ceiling["hidden_norm"]


def test_a_softcap_can_rule_it_out(capsys, folder):
    half = smoothed_margin(259, 0.1) / 2
    found = capacity(capsys, folder / "trained", "--softcap", half * 0.99)
    assert found["verdict"] == "impossible"
    assert found["ceiling"]["max_temperature"] is None
    assert capacity(capsys, folder / "trained", "--softcap", half * 1.01)["verdict"] == "possible"


def llama(folder, **changes):
    """A model in `folder` whose final norm has gains such that a sample's norms are far below them."""
    tokenizer = load_tokenizer("tiny", None, trust_remote_code=False)
    transformers.set_seed(0)
    model = load_model("tiny", torch.float32, trust_remote_code=False)
    for name, value in changes.items():
        model.get_parameter(name.replace("__", ".")).data.copy_(value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_bounds_may_allow_what_the_norms_seen_do_not(capsys, folder, tmp_path):
    # One unit that is always zero where it is normed, and would count a thousandfold.
    gain = torch.ones(64)
    gain[5] = 1000
    model = llama(tmp_path / "model", model__norm__weight=gain)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.model.embed_tokens.weight[:, 5] = 0
        for layer in loaded.model.layers:
            layer.self_attn.o_proj.weight[5] = 0
            layer.mlp.down_proj.weight[5] = 0
    loaded.save_pretrained(model)
    found = capacity(capsys, model, folder / "text.txt")
    assert found["verdict"] == "out of reach"
    assert found["ceiling"]["reachable"]
    assert found["sample"]["bounds"]["hidden_norm"] < 9 < found["ceiling"]["hidden_norm"]


def test_a_norm_with_a_shift_bounds_too(capsys, tmp_path):
    from tests.integrations.tiny_models import batch, tiny

    model = tiny("gpt2", torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    load_tokenizer("tiny", None, trust_remote_code=False).save_pretrained(tmp_path)
    found = capacity(capsys, tmp_path)
    z = model.eval()(input_ids=batch()["input_ids"]).logits
    margin = ((z.max(-1).values - z.mean(-1)) * 67 / 66).max().item()
    assert margin <= found["ceiling"]["margin"] <= 100 * margin


def test_the_tables_say_the_verdict_first(capsys, folder):
    assert main(["capacity", str(folder / "trained"), str(folder / "text.txt")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("Can this head become over-confident? Yes: it already is.")
    for words in (
        "259 x 64",
        "largest singular value",
        "training temperature of",
        "must be at least",
    ):
        assert words in printed
    assert main(["capacity", "tiny", "--softcap", "2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "No: no input whatever" in printed
    assert "2 rules it out at any temperature" in printed


def test_json_has_no_infinity(capsys, tmp_path):
    equal = llama(tmp_path / "equal", lm_head__weight=torch.ones(259, 64))
    found = capacity(capsys, equal)
    assert found["verdict"] == "impossible"
    assert found["ceiling"]["share_of_norm_required"] is None
    assert found["ceiling"]["max_probability"] == pytest.approx(1 / 259)
    assert found["ceiling"]["min_entropy"] == pytest.approx(math.log(259))


def test_what_cannot_be_judged_is_said(capsys, tmp_path):
    config = transformers.Gemma2Config(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "capped")
    for arguments, reason in (
        (("tiny", "--smoothing", "0"), "no finite margin"),
        ((tmp_path / "none",), "cannot load the model"),
        ((tmp_path / "capped", "--softcap", "9"), "caps its logits at 30 already"),
        (("tiny", tmp_path / "none.jsonl"), "cannot read"),
    ):
        assert main(["capacity", *map(str, arguments)]) == 2
        assert reason in capsys.readouterr().err
