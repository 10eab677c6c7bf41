"""What a user gets: sdist -> wheel -> a fresh environment without optional packages."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # one build for all of them

_IMPORT_ALL = """
import importlib, pkgutil, levelhead
for module in pkgutil.walk_packages(levelhead.__path__, "levelhead."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        print(module.name, error.name)
"""


def _run(*command: str | Path) -> str:
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist as a package index would."""
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel and what it requires, nothing else."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    _run(*pip, "torch")
    _run(*pip, wheel)
    return folder / "bin"


def test_the_wheel_holds_every_module_and_the_type_marker(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    expected = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    assert expected <= names
    assert "levelhead/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_module_of_the_core_imports_without_optional_packages(fresh: Path) -> None:
    failed = [line.split() for line in _run(fresh / "python", "-c", _IMPORT_ALL).splitlines()]
    optional = (
        "levelhead.cli.bench.report",
        "levelhead.cli.capacity.",
        "levelhead.cli.demo.",
        "levelhead.cli.examples",
        "levelhead.cli.models",
        "levelhead.cli.progress",
        "levelhead.cli.report.",
        "levelhead.cli.reading",
        "levelhead.cli.score.",
        "levelhead.cli.sft.",
        "levelhead.cli.sources",
        "levelhead.cli.teacher.",
        "levelhead.cli.temperature.",
        "levelhead.integrations.transformers",
    )
    assert all(module.startswith(optional) for module, _ in failed)
    packages = {"datasets", "matplotlib", "numpy", "pyarrow", "rich", "safetensors", "transformers"}
    assert {package for _, package in failed} <= packages


@pytest.mark.parametrize(
    ("verb", "extra"),
    [
        ("demo", "demo"),
        ("sft tiny rows.jsonl --output trained", "sft"),
        ("score tiny rows.jsonl -o scores.parquet", "sft"),
        ("capacity tiny", "sft"),
        ("temperature tiny rows.jsonl --output calibrated", "sft"),
        ("report a.csv", "report"),
        ("doctor", "cli"),
    ],
)
def test_a_missing_extra_names_the_command_that_mends_it(
    fresh: Path, verb: str, extra: str
) -> None:
    environment = {**os.environ, "COLUMNS": "200"}
    run = subprocess.run(
        [fresh / "levelhead", *verb.split()],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 2
    assert f"pip install 'levelhead[{extra}]'" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_operator_runs(fresh: Path) -> None:
    code = (
        "import torch, levelhead; w = torch.randn(9, 4, requires_grad=True); "
        "levelhead.linear_cross_entropy(torch.randn(3, 4), w, torch.tensor([1, 2, 3])).backward(); "
        "print(w.grad.shape)"
    )
    assert "torch.Size([9, 4])" in _run(fresh / "python", "-c", code)


def test_every_module_imports_with_them(fresh: Path, wheel: Path) -> None:
    """Runs last: it installs the extras that the others must do without."""
    pip = [fresh / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    _run(*pip, f"{wheel}[demo,report,sft]")
    assert _run(fresh / "python", "-c", _IMPORT_ALL) == ""
