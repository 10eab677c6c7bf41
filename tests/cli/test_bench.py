"""`levelhead bench`: its rows, its checks, and what it does where memory is short."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")

from levelhead.cli import main
from levelhead.measure import bench as comparison
from levelhead.measure import footprint, memory
from levelhead.measure.gate import Gate
from levelhead.measure.timing import Step
from levelhead.ops import chunked, library

SHAPE = ["--hidden", "32", "--vocabulary", "3001"]
TOKENS = ["--tokens", "300"]


@pytest.fixture
def unweighed(monkeypatch):
    """Spares the process that measures memory."""
    monkeypatch.setattr(comparison, "_weigh", lambda *_: None)


def bench(capsys, *arguments):
    assert main(["bench", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_time_and_memory_of_every_method(capsys):
    said = bench(capsys, *SHAPE, "--tokens", "2000", "--smoothing", "0")
    assert (said["hidden"], said["vocabulary"], said["tokens"]) == (32, 3001, 2000)
    modes = ("forward+backward", "frozen head")
    assert [(row["method"], row["mode"]) for row in said["rows"]] == [
        (method, mode) for mode in modes for method in comparison.LOSSES
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
    for method in comparison.LOSSES:
        assert printed.count(f"│ {method} ") == 2, printed


@pytest.mark.usefixtures("unweighed")
def test_tokens_are_chosen_and_the_reason_said(monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(comparison, "_MOST", 128)
    said = bench(capsys, "tiny", "--dtype", "bf16")
    assert (said["hidden"], said["vocabulary"]) == (64, 259)
    assert (said["tokens"], said["tokens_are"]) == (128, "enough for steady times")
    monkeypatch.setattr(
        comparison, "_step_seconds", lambda *_: dict.fromkeys(comparison.LOSSES, 3600.0)
    )
    said = bench(capsys, *SHAPE)
    assert said["tokens"] == 16
    assert said["tokens_are"].startswith("more would take over a minute; times at so few")
    failures = {row["method"]: row["failure"] for row in said["rows"]}
    if comparison.TORCH in comparison.LOSSES:  # torch >= 2.13
        assert failures[comparison.TORCH] == "left out: a run of it would take too long"
    assert not failures["levelhead"]
    assert not failures["F.cross_entropy"]


def test_what_there_is_no_time_for_is_left_out_and_said(monkeypatch, capsys):
    monkeypatch.setattr("levelhead.measure.bench._SECONDS", 0.0)
    rows = {(row["method"], row["mode"]): row for row in bench(capsys, *SHAPE)["rows"]}
    trained = rows.pop((comparison.LEVELHEAD, comparison.TRAINED))
    assert trained["ms_p50"] > 0
    assert trained["rounds"] == 1
    assert trained["extra_bytes"] is None
    assert trained["unweighed"] == "no time left"
    assert all(row["failure"].startswith("left out: ") for row in rows.values())
    assert main(["bench", *SHAPE]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "one run each" in printed
    assert "no time left" in printed
    assert "What was left out is measured with --tokens N" in printed


@pytest.mark.usefixtures("unweighed")
def test_tokens_that_are_asked_for_are_measured_whole(monkeypatch, capsys):
    monkeypatch.setattr("levelhead.measure.bench._SECONDS", 0.0)
    said = bench(capsys, *SHAPE, *TOKENS)
    assert (said["tokens"], said["tokens_are"]) == (300, "asked for")
    assert not any(row["failure"] for row in said["rows"])


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
        loss, (dx, dw, db) = chunked.linear_cross_entropy(*arguments)
        return loss, (dx * 1.01, dw, db)

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
        def loss(x, weight, target, smoothing, reduction):
            z = F.linear(x, weight).float() * factor
            return F.cross_entropy(z, target, label_smoothing=smoothing, reduction=reduction)

        return Step(loss, *operands)

    gate = Gate(step(1))

    def errors(step):
        return gate.errors([step(), *step.gradients()])

    gate.measure(errors(step(1)))
    assert gate.share(errors(step(1))) <= 1
    assert gate.share(errors(step(1.02))) > 1
    assert not gate.share(errors(step(float("nan")))) <= 1
    with pytest.raises(ArithmeticError, match="dense path is off"):
        gate.measure(errors(step(2)))


def test_the_gate_is_exact_for_a_large_vocabulary():
    """There PyTorch's own float32 is off by more than what the gate allows anybody for roundings."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, generator=random, requires_grad=True)
    weight = torch.randn(262144, 8, generator=random).requires_grad_()
    target = torch.randint(262144, (4,), generator=random)
    loss = comparison.LOSSES["levelhead"]
    step = Step(loss, x, weight, target, 0.1)
    gate = Gate(step)
    assert gate.share(gate.errors([step(), *step.gradients()])) <= 1


@pytest.mark.parametrize(
    "arguments", [[], ["--hidden", "3"], ["--vocabulary", "3"], ["tiny", "--hidden", "3"]]
)
def test_either_a_model_or_both_sizes(arguments, capsys):
    assert main(["bench", *arguments]) == 2
    assert "give either a MODEL" in capsys.readouterr().err


def test_a_name_that_does_not_exist_is_refused(tmp_path, capsys):
    assert main(["bench", str(tmp_path / "none")]) == 2
    assert "cannot load the config of" in capsys.readouterr().err
