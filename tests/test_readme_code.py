"""The commands and the code of README and docs/ run as they stand there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import render
from tests.cli.sft_runs import save_tiny

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text()


# Blocks of nothing but these are run by `make test`; those of minutes, or of several models, are not.
QUICK = ("$ pip install", "$ levelhead temperature")


def blocks(language: str) -> list[Any]:
    """The blocks of a language on all pages, named by page and first line."""
    found = []
    for path in render.PAGES:
        for block in re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL):
            commands = [line for line in block.splitlines() if line.startswith("$ ")]
            slow = not all(line.startswith(QUICK) for line in commands)
            name = f"{path.stem}: {block.splitlines()[0]}"
            found.append(pytest.param(block, id=name, marks=[pytest.mark.slow] * slow))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which everything is that the commands name."""
    for name in ("MODEL", "TEACHER", "STUDENT"):
        save_tiny(tmp_path / name)
    chosen = ("fig", "plum", "apple", "quince")
    questions = [
        {"question": f"Which one is number {i}?", "choices": chosen, "answer": i % 4}
        for i in range(16)
    ]
    pairs = [{"prompt": f"box {i}:", "completion": f" {chosen[i % 4]}"} for i in range(16)]
    rows = {"questions": questions, "data": pairs, "held_out": pairs[:8]}
    for name, written in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, written)))
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    return tmp_path


def run(command: str, folder: Path) -> str:
    """What a command prints in a folder, as its user would type it there."""
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "ACCELERATE_USE_CPU": "true",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    ran = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, text=True, capture_output=True,
        check=False, timeout=540,
    )  # fmt: skip
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout + ran.stderr


@pytest.mark.parametrize("block", blocks("console"))
def test_commands_run(block: str, folder: Path) -> None:
    commands = [line[2:] for line in block.splitlines() if line.startswith("$ ")]
    assert commands
    for command in commands:
        if command.startswith("pip install"):
            # In the clone, without changing this environment, which has it all.
            said = run(
                f"{command.partition('#')[0]} --dry-run --no-index --no-build-isolation", ROOT
            )
            assert "does not provide the extra" not in said
        elif command.startswith("make"):
            # With this environment instead of a new one.
            run(f"{command} --file {ROOT}/Makefile --assume-old .venv/demo BIN={BIN}", folder)
        else:
            # As many processes as cores here, not as GPUs in the configuration.
            run(command.replace("accelerate launch", "accelerate launch --num_processes 2"), folder)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the reader has when the code on a page begins."""
    from transformers import Trainer, TrainingArguments

    import levelhead
    from levelhead.cli.models import load_model

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = load_model("tiny", torch.float32, trust_remote_code=False)
    ids = torch.randint(200, (8, 12))
    target = torch.randint(8, (4,))
    return {
        "levelhead": levelhead,
        "torch": torch,
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
        "args": TrainingArguments("trained", report_to="none"),
        "model": model,
        "dataset": [{"input_ids": row, "labels": row} for row in ids],
        "hidden": torch.randn(4, 16, requires_grad=True),
        "lm_head": torch.nn.Linear(16, 8, bias=False),
        "target": target,
        "picks": target[:, None],
        "confidence": torch.tensor([0.9, 0.8, 0.7, 0.4]),
        "correct": torch.tensor([True, True, False, False]),
    }


@pytest.mark.parametrize("block", blocks("python"))
def test_code_runs(block: str, names: dict[str, Any]) -> None:
    exec(compile(block, "page", "exec"), names)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # Trainer's default, for GPUs
def test_before_and_after_train_to_the_same_parameters(names: dict[str, Any]) -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    trained = []
    for other in "+-":
        lines = [line[2:] for line in diff.splitlines() if line[0] != other]
        fresh = dict(names, model=type(names["model"])(names["model"].config))
        fresh["model"].load_state_dict(names["model"].state_dict())
        exec(compile("\n".join(lines), "README", "exec"), fresh)
        trained.append(fresh["model"].state_dict())
    before, after = trained
    moved = 0.0
    for name, parameter in before.items():
        torch.testing.assert_close(after[name], parameter, rtol=0, atol=1e-5)
        moved = max(moved, (parameter - names["model"].state_dict()[name]).abs().max().item())
    assert moved > 1e-4
