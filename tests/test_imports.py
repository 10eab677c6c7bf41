"""What an import costs, and which way imports run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import levelhead

PACKAGE = Path(levelhead.__file__).parent
HEAVY = ("triton", "transformers", "accelerate", "deepspeed", "peft", "trl", "matplotlib", "rich")
# Each layer may import itself and what stands to its right.
LAYERS = ("cli", "objectives", "calibration", "integrations", "ops")
MAY_IMPORT = {
    "ops": {"ops"},
    "integrations": {"integrations", "ops"},
    "calibration": {"calibration", "ops"},
    "objectives": {"objectives", "calibration", "integrations", "ops"},
    "cli": {*LAYERS, "levelhead"},
}


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """The modules that are there after the import of the package."""
    code = "import sys, levelhead; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_of_the_package_takes_torch_alone(loaded: set[str]) -> None:
    packages = {name.partition(".")[0] for name in loaded}
    assert packages.isdisjoint(HEAVY), packages.intersection(HEAVY)


def test_the_package_loads_no_dtensor_until_there_is_one(loaded: set[str]) -> None:
    assert "torch.distributed.tensor" not in loaded


def _imported_layers(path: Path) -> set[str]:
    """The layers that a file's imports name, those inside functions included."""
    package = ("levelhead", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split("."))
            names = [(*filter(None, module), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        for name in names:
            if name[0] == "levelhead":
                found.add(name[1] if len(name) > 1 and name[1] in LAYERS else "levelhead")
    return found


def test_imports_run_in_one_direction() -> None:
    wrong = {}
    for path in PACKAGE.rglob("*.py"):
        layer = path.relative_to(PACKAGE).parts[0]
        if layer in MAY_IMPORT:
            against = _imported_layers(path) - MAY_IMPORT[layer]
            if against:
                wrong[str(path.relative_to(PACKAGE))] = against
    assert not wrong


def test_an_import_against_the_direction_is_seen(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "ops" / "wrong.py"
    path.parent.mkdir()
    path.write_text("from ..cli import main\nfrom .. import patch_model\nfrom . import tile\n")
    assert _imported_layers(path) == {"cli", "levelhead", "ops"}
