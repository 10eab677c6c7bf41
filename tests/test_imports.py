"""What an import costs, and which way imports run."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import levelhead

PACKAGE = Path(levelhead.__file__).parent
HEAVY = ("triton", "transformers", "accelerate", "deepspeed", "peft", "trl", "matplotlib", "rich")
# A room is a folder, and may import the rooms that are named here, but no file of the package's own.
ROOMS = {
    "ops": (),
    "calibration": (),
    "integrations.patch": ("ops",),
    "integrations.inductor": ("ops",),
    "heads": ("ops", "calibration", "integrations.patch"),
    "scoring": ("ops", "heads"),
    "integrations": ("ops", "heads", "integrations.patch", "integrations.inductor"),
    "objectives": ("ops", "calibration", "heads"),
    "measure": ("ops",),
    "cli": (
        *("ops", "calibration", "objectives", "heads", "scoring", "measure"),
        *("integrations", "integrations.patch", "integrations.inductor"),
    ),
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


def _imports(package: Path) -> dict[str, set[str]]:
    """Of each module the modules of the package that its file names, those inside functions included."""
    modules = {}
    for path in package.rglob("*.py"):
        parts = ("levelhead", *path.relative_to(package).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        modules[parts[:-1] if is_package else parts] = path, parts[:-1]
    found: dict[str, set[str]] = {}
    for module, (path, home) in modules.items():
        names: list[tuple[str, ...]] = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = home[: len(home) - node.level + 1] if node.level else ()
                source = (*base, *filter(None, (node.module or "").split(".")))
                names += [(*source, alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                names += [tuple(alias.name.split(".")) for alias in node.names]
        # `from x import y` is of the module x.y, or else of x.
        nearest = {name if name in modules else name[:-1] for name in names}
        found[".".join(module)] = {".".join(n) for n in nearest if n in modules and n != module}
    return found


def _room(module: str) -> str | None:
    """The folder that a module is in, as ROOMS names it; None: the top, and with it a module that is in no room."""
    inside = module.removeprefix("levelhead.") + "."
    rooms = [room for room in ROOMS if inside.startswith(f"{room}.")]
    return max(rooms, key=len, default=None)


def _against(package: Path) -> set[tuple[str, str]]:
    """The imports that a room must not have."""
    return {
        (module, other)
        for module, others in _imports(package).items()
        if (room := _room(module)) is not None
        for other in others
        if _room(other) not in (room, *ROOMS[room]) and not (room == "cli" and other == "levelhead")
    }


def test_imports_run_in_one_direction() -> None:
    assert not _against(PACKAGE)


def test_no_import_is_circular() -> None:
    order = graphlib.TopologicalSorter(_imports(PACKAGE))
    order.prepare()  # names a circle, if there is one


def test_an_import_against_the_direction_is_seen(tmp_path: Path) -> None:
    for name in ("__init__", "ops/__init__", "ops/tile", "ops/wrong", "cli/__init__"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "ops/wrong.py").write_text(
        "from ..cli import main\nfrom .. import patch_model\nfrom . import tile\n"
    )
    (tmp_path / "ops/tile.py").write_text("def f():\n    from .wrong import g\n")
    wrong = "levelhead.ops.wrong"
    assert _against(tmp_path) == {(wrong, "levelhead.cli"), (wrong, "levelhead")}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(_imports(tmp_path)).prepare()
