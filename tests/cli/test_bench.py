"""`levelhead bench`: its rows, its checks, and what it does where memory is short."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")

from levelhead.cli import main, memory
from levelhead.cli.bench import contest, measure
from levelhead.cli.bench.gate import Gate
from levelhead.cli.plan import footprint
from levelhead.ops import chunked, library

SHAPE = ["--hidden", "32", "--vocabulary", "3001"]
TOKENS = ["--tokens", "300"]


@pytest.fixture
def unweighed(monkeypatch):
    """Spares the process that measures memory."""
    monkeypatch.setattr(contest, "_weighed", lambda rows, *_: rows)


def bench(capsys, *arguments):
    assert main(["bench", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_time_and_memory_of_every_method(capsys):
    said = bench(capsys, *SHAPE, "--tokens", "2000", "--smoothing", "0")
    assert (said["hidden"], said["vocabulary"], said["tokens"]) == (32, 3001, 2000)
    modes = ("forward+backward", "frozen head")
    assert [(row["method"], row["mode"]) for row in said["rows"]] == [
        (method, mode) for mode in modes for method in contest.LOSSES
    ]
    peaks = {}
    for row in said["rows"]:
        assert not row["failure"]
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["rounds"] >= 1
        assert row["error"] <= 1
        peaks[row["method"], row["mode"]] = row["extra_bytes"]
    if torch.get_num_threads() and None not in peaks.values():  # Linux
        problem = footprint.Problem(2000, 32, 3001, torch.float32, device="cpu")
        want = footprint.extra_bytes(footprint.CHUNKED, problem)
        assert peaks["levelhead", modes[0]] == pytest.approx(want, rel=0.1)
        assert peaks["levelhead", modes[0]] < peaks["F.cross_entropy", modes[0]] / 2


@pytest.mark.usefixtures("unweighed")
def test_a_table(capsys):
    assert main(["bench", *SHAPE, *TOKENS]) == 0
    printed = capsys.readouterr().out
    assert "head 3001 x 32, float32" in printed
    for method in contest.LOSSES:
        assert printed.count(f"│ {method} ") == 2, printed


@pytest.mark.usefixtures("unweighed")
def test_tokens_are_chosen_and_the_reason_said(monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr("levelhead.cli.bench._MOST", 128)
    said = bench(capsys, "tiny", "--dtype", "bf16")
    assert (said["hidden"], said["vocabulary"]) == (64, 259)
    assert (said["tokens"], said["tokens_are"]) == (128, "enough for steady times")
    monkeypatch.setattr("levelhead.cli.bench.product_seconds", lambda _: 3600.0)
    assert bench(capsys, *SHAPE)["tokens_are"].startswith("the fewest")


@pytest.mark.usefixtures("unweighed")
def test_memory_limits_the_tokens(monkeypatch, capsys):
    monkeypatch.setattr(memory, "free", lambda _: 32 * 2**20)
    said = bench(capsys, *SHAPE)
    assert 64 <= said["tokens"] < 512
    assert "free memory" in said["tokens_are"]


@pytest.mark.usefixtures("unweighed")
def test_out_of_memory_is_a_row(monkeypatch, capsys):
    monkeypatch.setattr(memory, "free", lambda _: 60 * 2**20)
    said = bench(capsys, *SHAPE, "--tokens", "1500")
    rows = {row["method"]: row for row in said["rows"]}
    failure = rows["F.cross_entropy"]["failure"]
    assert failure.startswith("out of memory: needs about 0.05 GiB")
    assert rows["F.cross_entropy"]["ms_p50"] is None
    assert rows["levelhead"]["ms_p50"] > 0


def test_a_head_that_does_not_fit_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(memory, "free", lambda _: 2**20)
    assert main(["bench", *SHAPE]) == 2
    assert "0.0 GiB are free" in capsys.readouterr().err


@pytest.mark.usefixtures("unweighed")
def test_a_wrong_result_exits_with_1(monkeypatch, capsys):
    def linear_cross_entropy(*arguments):
        loss, logsumexp, (dx, dw, db) = chunked.linear_cross_entropy(*arguments)
        return loss, logsumexp, (dx * 1.01, dw, db)

    broken = SimpleNamespace(**vars(chunked) | {"linear_cross_entropy": linear_cross_entropy})
    monkeypatch.setattr(library, "implementation", lambda *_: broken)
    assert main(["bench", *SHAPE, *TOKENS]) == 1
    printed = capsys.readouterr()
    assert "wrong: its error is" in printed.out
    assert printed.err.startswith("levelhead bench: error: levelhead fails on this machine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gate_passes_the_dense_path_and_no_other_loss(dtype):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(300, 32, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(3001, 32, generator=random).to(dtype).requires_grad_()
    operands = x, weight, torch.randint(3001, (300,), generator=random), 0.1

    def step(factor):
        def loss(x, weight, target, smoothing):
            z = F.linear(x, weight).float() * factor
            return F.cross_entropy(z, target, label_smoothing=smoothing)

        return measure.Step(loss, *operands)

    gate = Gate(step(1), step(1))
    assert gate.share(step(1)) <= 1
    assert gate.share(step(1.02)) > 1
    assert not gate.share(step(float("nan"))) <= 1


@pytest.mark.parametrize(
    "arguments", [[], ["--hidden", "3"], ["--vocabulary", "3"], ["tiny", "--hidden", "3"]]
)
def test_either_a_model_or_both_sizes(arguments, capsys):
    assert main(["bench", *arguments]) == 2
    assert "give either a MODEL" in capsys.readouterr().err


def test_a_name_that_does_not_exist_is_refused(tmp_path, capsys):
    assert main(["bench", str(tmp_path / "none")]) == 2
    assert "cannot load the config of" in capsys.readouterr().err
