"""`levelhead doctor`: what it says, and that it sees a wrong result."""

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")

import levelhead
from levelhead.cli import main
from levelhead.ops import chunked, library


def lines(printed):
    """What stands to the right of each label."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    return {row[0]: " | ".join(row[1:]) for row in rows if row}


def break_it(monkeypatch, wrong):
    """Let the implementation that is chosen return `wrong(loss, gradients)`."""

    def linear_cross_entropy(*arguments):
        return wrong(*chunked.linear_cross_entropy(*arguments))

    broken = SimpleNamespace(**vars(chunked) | {"linear_cross_entropy": linear_cross_entropy})
    monkeypatch.setattr(library, "implementation", lambda *_: broken)


def test_all_is_well_here(capsys):
    assert main(["doctor"]) == 0
    said = lines(capsys.readouterr().out)
    assert said["levelhead"] == levelhead.__version__
    assert said["torch"] == torch.__version__
    assert said["implementation"] == "chunked"
    for dtype in ("float32", "bfloat16", "float16"):
        for label in (dtype, f"{dtype}, softcap"):
            assert [part.split()[0] for part in said[label].split(" | ")] == ["right", "right"]


def test_it_names_the_implementation_that_is_called(monkeypatch, capsys):
    monkeypatch.setattr(
        levelhead,
        "linear_cross_entropy",
        lambda *args, **options: levelhead.ops.linear_cross_entropy(
            *args, **options, impl="reference"
        ),
    )
    assert main(["doctor"]) == 0
    assert lines(capsys.readouterr().out)["implementation"] == "reference"


@pytest.mark.parametrize(
    ("wrong", "columns"),
    [
        (lambda loss, grads: (loss * (1 + 1e-4), grads), ["wrong", "right"]),
        (lambda loss, grads: (loss, (grads[0], grads[1], grads[2] * 1.1)), ["right", "wrong"]),
        (lambda loss, grads: (loss, (grads[0] * torch.nan, *grads[1:])), ["right", "wrong"]),
        (lambda loss, grads: (loss, (*grads[:2], grads[2] * torch.nan)), ["right", "wrong"]),
    ],
)
def test_a_wrong_result_exits_with_1(wrong, columns, monkeypatch, capsys):
    break_it(monkeypatch, wrong)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr()
    said = lines(printed.out)
    assert [part.split()[0] for part in said["float32"].split(" | ")] == columns
    assert printed.err.startswith(
        "levelhead doctor: error: linear_cross_entropy is wrong on this machine in float32, "
    )


def test_a_failure_is_a_wrong_result(monkeypatch, capsys):
    def fail(*_results):
        raise RuntimeError("no [kernel] image")

    break_it(monkeypatch, fail)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr()
    assert "float16, softcap: RuntimeError: no [kernel] image" in printed.out
    assert "wrong on this machine" in printed.err


def test_what_is_missing_comes_with_the_way_to_install_it(monkeypatch, capsys):
    version = importlib.metadata.version

    def some(package):
        if package in ("peft", "triton"):
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package) if package == "levelhead" else "9.9"

    monkeypatch.setattr(importlib.metadata, "version", some)
    assert main(["doctor"]) == 0
    said = lines(capsys.readouterr().out)
    assert said["peft"] == "not installed; run: pip install 'levelhead[peft]'"
    assert said["triton"] == "not installed"
    assert said["deepspeed"] == "9.9"


@pytest.mark.parametrize(
    ("version", "remark"),
    [
        ("2.10.1", "; not among those tested, 2.11 to 2.15"),
        ("2.11.0", ""),
        ("2.15.3+cu132", ""),
        ("2.16.0a0+git1234", "; not among those tested, 2.11 to 2.15"),
        ("2.16a0", "; not among those tested, 2.11 to 2.15"),
        ("3.0.0", "; not among those tested, 2.11 to 2.15"),
    ],
)
def test_it_remarks_on_a_version_that_no_test_has_seen(version, remark, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", version)
    assert main(["doctor"]) == 0
    assert lines(capsys.readouterr().out)["torch"] == version + remark
