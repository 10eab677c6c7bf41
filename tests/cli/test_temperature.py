"""`levelhead temperature` from end to end: an over-confident model becomes a calibrated one."""

import contextlib
import io
import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("peft")

from tests.cli.trained import save_trained, text
from transformers import AutoModelForCausalLM, AutoTokenizer

from levelhead.cli import main

LENGTH = 50


def temperature(model, data, output, *options):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(["temperature", model, data, "--output", str(output), *options])
    return code, printed.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("temperature")
    save_trained(folder / "model", factor=3.0)
    (folder / "text.txt").write_text(text(seed=2))
    arguments = (str(folder / "model"), str(folder / "text.txt"), folder / "out")
    code, printed = temperature(*arguments, "--max-length", str(LENGTH))
    (folder / "printed").write_text(printed)
    assert code == 0
    return folder


def pieces(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    ids = tokenizer((folder / "text.txt").read_text())["input_ids"]
    return [torch.tensor(ids[i : i + LENGTH]) for i in range(0, len(ids), LENGTH)]


def logits(folder, name):
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto").eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=piece[None]).logits[0, :-1] for piece in pieces(folder)])


def test_an_over_confident_model_is_mended(folder):
    summary = json.loads((folder / "out" / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert summary["temperature"] > 1.5
    assert after["nll"] < before["nll"]
    assert after["calibration_error"] < before["calibration_error"] / 2
    assert after["mean_confidence"] == pytest.approx(after["accuracy"], abs=0.05)
    assert after["accuracy"] == before["accuracy"]


def test_the_checkpoint_has_the_logits_divided(folder):
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["applied_to"] == "head"
    before, after = logits(folder, "model"), logits(folder, "out")
    torch.testing.assert_close(after, before / summary["temperature"], rtol=1e-4, atol=1e-4)


def test_both_halves_together_are_all_tokens_and_nothing_was_fitted_on_both(folder):
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert sum(summary["tokens"].values()) == sum(len(piece) - 1 for piece in pieces(folder))
    z, target = logits(folder, "model"), torch.cat([piece[1:] for piece in pieces(folder)])
    of_all = F.cross_entropy(z, target).item()
    # That of one half alone, which it lies close to and is not.
    assert summary["before"]["nll"] == pytest.approx(of_all, rel=0.1)
    assert summary["before"]["nll"] != pytest.approx(of_all, rel=1e-5)


def test_it_says_what_it_did(folder):
    printed = (folder / "printed").read_text()
    assert "negative log-likelihood" in printed
    assert "expected calibration error (10 bins)" in printed
    assert "the weights of its head" in printed


def test_the_seed_decides_the_halves(folder, tmp_path):
    def summary(seed):
        output = tmp_path / f"{seed}-{len(list(tmp_path.iterdir()))}"
        arguments = (str(folder / "model"), str(folder / "text.txt"), output)
        assert temperature(*arguments, "--seed", seed, "--max-tokens", "500")[0] == 0
        return json.loads((output / "summary.json").read_text())

    first, second, other = summary("1"), summary("1"), summary("2")
    assert first == second
    assert first["tokens"] == {"fit": 500, "report": 500}
    assert first["temperature"] != other["temperature"]


def test_a_tied_model_and_rows_of_completions(tmp_path):
    model = save_trained(tmp_path / "model", factor=3.0, tie_word_embeddings=True)
    data = tmp_path / "rows.jsonl"
    lines = text(seed=3).splitlines()
    rows = [{"prompt": line[:8], "completion": line[8:]} for line in lines]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert temperature(model, str(data), tmp_path / "out")[0] == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["applied_to"] == "final_norm"
    # One token a byte, and the end of each.
    assert sum(summary["tokens"].values()) == sum(len(line) - 8 + 1 for line in lines)
    assert summary["after"]["nll"] < summary["before"]["nll"]


def test_what_cannot_be_done_is_said_and_nothing_is_written(folder, tmp_path, capsys):
    model, data = str(folder / "model"), str(folder / "text.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 9)
    (tmp_path / "short.txt").write_text("x")
    for arguments, reason in (
        (("tiny", data), "which no temperature mends"),
        ((model, data, "--max-length", "100000"), "gives one row"),
        ((model, str(tmp_path / "none.txt")), "cannot read"),
        ((model, str(tmp_path / "latin.txt")), "not UTF-8"),
        ((model, str(tmp_path / "short.txt")), "no text of two tokens"),
    ):
        assert temperature(*arguments[:2], tmp_path / "new", *arguments[2:])[0] == 2
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    assert temperature(model, data, folder / "out")[0] == 2
    assert "is not empty" in capsys.readouterr().err
    assert temperature(model, data, tmp_path / "short.txt")[0] == 2
    assert "cannot make the folder" in capsys.readouterr().err


def test_a_file_of_blank_lines_has_no_rows(folder, tmp_path, capsys):
    (tmp_path / "blank.jsonl").write_text("\n\n")
    model = str(folder / "model")
    assert temperature(model, str(tmp_path / "blank.jsonl"), tmp_path / "new")[0] == 2
    assert "has no rows" in capsys.readouterr().err
