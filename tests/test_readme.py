"""The figures of README and docs/ are those of the committed results, and their links and names hold."""

import re
from pathlib import Path

import pytest
from benchmarks import render

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in render.PAGES}
README = PAGES["README.md"]
LINKS = [
    (page, link)
    for page, text in PAGES.items()
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text)
]


@pytest.mark.parametrize("page", PAGES)
def test_its_figures_are_those_of_the_committed_results(page: str) -> None:
    assert render.render(PAGES[page]) == PAGES[page], "run: python -m benchmarks.render"


def test_no_table_counts_nothing() -> None:
    assert not [line for text in PAGES.values() for line in text.splitlines() if "0 of 0" in line]


def test_every_block_stands_on_a_page() -> None:
    found = {name for text in PAGES.values() for name in re.findall(r"<!-- (\w+) -->", text)}
    assert found == set(render.BLOCKS)


def test_a_changed_figure_is_seen() -> None:
    figure = re.search(r"(\d+) MiB where", README)
    assert figure is not None
    changed = README.replace(figure[0], f"{int(figure[1]) + 1} MiB where")
    assert render.render(changed) == README != changed


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_somewhere(page: str, link: str) -> None:
    path, _, heading = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    if heading:
        titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        assert heading in {
            re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles
        }


@pytest.mark.parametrize(
    "path",
    sorted(
        {
            path
            for text in PAGES.values()
            for path in re.findall(r"`((?:tests|benchmarks)/[^`\s*]+)`", text)
        }
    ),
)
def test_a_file_it_names_is_there(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "target",
    sorted({name for text in PAGES.values() for name in re.findall(r"`?make (\w+)`", text)}),
)
def test_a_make_target_it_names_is_there(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_it_names_every_verb() -> None:
    from levelhead.cli import _VERBS

    verbs = {verb.__name__.rpartition(".")[2] for verb in _VERBS}
    missing = {verb for verb in verbs if not re.search(rf"(levelhead|make) {verb}\b", README)}
    assert not missing
