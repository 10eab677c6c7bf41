"""The figures of README and docs/ are those of the committed results, and their links and code hold."""

import ast
import re
from pathlib import Path

import pytest
from benchmarks import render

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CUSTOM_OP = render.CUSTOM_OP.read_text()
BENCHMARKS = render.BENCHMARKS.read_text()
LINK = re.compile(r"\]\((?!http)([^)#]+)\)")
LINKS = [
    (page, link)
    for page in ("README.md", "docs/custom_op.md", "docs/benchmarks.md")
    for link in LINK.findall((ROOT / page).read_text())
]


def test_its_figures_are_those_of_the_committed_results() -> None:
    assert render.render(README) == README, "run: python -m benchmarks.render"
    assert render.render_custom_op(CUSTOM_OP) == CUSTOM_OP, "run: python -m benchmarks.render"
    assert render.render_benchmarks(BENCHMARKS) == BENCHMARKS, "run: python -m benchmarks.render"


def test_a_changed_figure_is_seen() -> None:
    figure = re.search(r"(\d+) MiB where", README)
    assert figure is not None
    changed = README.replace(figure[0], f"{int(figure[1]) + 1} MiB where")
    assert render.render(changed) == README != changed


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_somewhere(page: str, link: str) -> None:
    assert (ROOT / page).parent.joinpath(link).exists()


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:tests|benchmarks)/[^`\s*]+)`", README)))
)
def test_a_file_it_names_is_there(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make (\w+)`?", README))))
def test_a_make_target_it_names_is_there(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_name_of_levelhead_in_it_is_public() -> None:
    import levelhead

    names = set(re.findall(r"levelhead\.([a-z_]+)\(", README))
    assert names
    assert names <= set(levelhead.__all__)


def test_it_names_every_verb() -> None:
    from levelhead.cli import _VERBS

    verbs = {verb.__name__.rpartition(".")[2] for verb in _VERBS}
    missing = {
        verb for verb in verbs if not re.search(rf"`?(levelhead|make) {verb}\b|`{verb}`", README)
    }
    assert not missing


def test_its_one_column_python_parses() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    single = [block for block in blocks if "# before" not in block]
    assert single
    for block in single:
        ast.parse(block)
