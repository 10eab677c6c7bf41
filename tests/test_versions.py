"""What docs/versions.md says holds: versions are the same wherever they stand, private names those of the source."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from levelhead.cli.doctor import TESTED

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/versions.md").read_text()
PRIVATE = re.compile(r"_[a-zA-Z]\w*")
OF_PYTHON = {
    "_asdict",
    "_fields",
    "_make",
    "_operator",
    "_replace",
}  # documented, or as old as they are
OF_ENDINGS = {"endswith", "removesuffix"}


@pytest.mark.parametrize("package", TESTED)
def test_the_ends_of_what_is_tested_are_the_same_everywhere(package: str) -> None:
    first, last = TESTED[package]
    assert f"{package} {first} to {last}" in " ".join(PAGE.split())
    contributing = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    assert f"{package} {first} and {last}" in contributing
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^OLDEST := .*\b{package}=={first}\.\d", makefile, re.MULTILINE)
    assert re.search(rf"^NEWEST := .*\b{package}=={last}\.\d", makefile, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    required = [*project["dependencies"], *(name for extra in extras for name in extra)]
    bounds = [name for name in required if re.match(rf"{package}\b", name)]
    assert [name.startswith(f"{package}>={first}") for name in bounds] == [True]


def is_private(path: str) -> bool:
    return any(PRIVATE.fullmatch(part) for part in path.split("."))


def defined(tree: ast.AST) -> Iterator[str]:
    """What a module names itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Names of other packages in a module, and what each stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.asname or name.name.partition(".")[0], name.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for name in node.names:
                yield name.asname or name.name, f"{node.module}.{name.name}"


def used(tree: ast.AST) -> Iterator[str]:
    """Private names that a module takes from others, or looks up on their objects."""
    aliases = dict(imported(tree))
    yield from aliases.values()
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    endings = {
        text
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in OF_ENDINGS
        for text in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node not in endings:
            if isinstance(node.value, str) and PRIVATE.fullmatch(node.value):
                yield node.value
        elif isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first not in aliases or not re.fullmatch(r"[\w.]+", rest):
                yield node.attr
            elif node not in inner:
                yield f"{aliases[first]}.{rest}"


def test_each_is_listed_with_what_happens_if_it_goes() -> None:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "src").rglob("*.py")]
    own = {name for tree in trees for name in defined(tree)} | OF_PYTHON
    taken = {name for tree in trees for name in used(tree) if is_private(name)} - own
    taken = {name for name in taken if not name.startswith(("_levelhead", "levelhead"))}
    # An import of a module from which names are taken says nothing more.
    taken = {n for n in taken if not any(other.startswith(f"{n}.") for other in taken)}
    rows = re.findall(r"^\| (`.+?) \|", PAGE, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(.+?)`", row)} == taken
