"""`levelhead report` from end to end: numbers, page and pictures."""

import contextlib
import io
import json
import struct
import xml.dom.minidom
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

import pyarrow as pa
from pyarrow import parquet
from scipy.stats import mannwhitneyu, pearsonr
from sklearn.metrics import roc_auc_score

from levelhead.calibration import calibration_error
from levelhead.cli import main

MODELS = {"plain": 0.2, "sharp <b>": -0.1, "$x_1$": 0.05}  # and how over-confident each is
KINDS = ("msp", "max_logit")


@dataclass(frozen=True)
class Run:
    """A finished run, and what it read."""

    output: Path
    printed: str
    results: dict[str, Any]
    rows: dict[str, numpy.ndarray]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Three models, two tasks, two kinds of scores."""
    folder = tmp_path_factory.mktemp("report")
    rng = numpy.random.default_rng(0)
    parts = []
    for model, over in MODELS.items():
        for task in ("arc", "mmlu"):
            confidence = rng.beta(3, 1.5, 400)
            correct = rng.random(400) < confidence - over
            for kind in KINDS:
                score = confidence if kind == "msp" else 30 * confidence + rng.normal(0, 3, 400)
                parts += [
                    (model, task, kind, s, bool(c)) for s, c in zip(score, correct, strict=True)
                ]
    names = ("model", "task", "score_kind", "score", "correct")
    columns = dict(zip(names, map(list, zip(*parts, strict=True)), strict=True))
    parquet.write_table(pa.table(columns), folder / "answers.parquet")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert (
            main(["report", str(folder / "answers.parquet"), "--output", str(folder / "out")]) == 0
        )
    results = json.loads((folder / "out" / "results.json").read_text())
    arrays = {name: numpy.array(column) for name, column in columns.items()}
    return Run(folder / "out", printed.getvalue(), results, arrays)


def _of(run: Run, **values: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    mask = numpy.all([run.rows[name] == value for name, value in values.items()], axis=0)
    return run.rows["score"][mask], run.rows["correct"][mask]


def test_models_are_rows_and_tasks_are_strata(run):
    assert (run.results["by"], run.results["within"]) == ("model", ["task"])
    assert list(run.results["scores"]) == ["msp", "max_logit"]
    for kind in run.results["scores"].values():
        assert [row["name"] for row in kind["groups"]] == list(MODELS)


def test_measures_are_those_of_the_rows(run):
    for kind in KINDS:
        for row in run.results["scores"][kind]["groups"]:
            strata = [_of(run, model=row["name"], score_kind=kind, task=t) for t in ("arc", "mmlu")]
            macro = row["macro"]
            accuracy = [correct.mean() for _, correct in strata]
            auroc = [roc_auc_score(correct, score) for score, correct in strata]
            p = [mannwhitneyu(score[correct], score[~correct]).pvalue for score, correct in strata]
            assert macro["accuracy"] == pytest.approx(numpy.mean(accuracy))
            assert macro["auroc"] == pytest.approx(numpy.mean(auroc))
            assert macro["significant"] == sum(value < 1e-4 for value in p)
            pooled = _of(run, model=row["name"], score_kind=kind)
            metrics = row["metrics"]
            assert metrics["accuracy"]["estimate"] == pytest.approx(pooled[1].mean())
            assert metrics["accuracy"]["low"] < pooled[1].mean() < metrics["accuracy"]["high"]
            if kind == "msp":
                assert metrics["ece"]["estimate"] == pytest.approx(calibration_error(*pooled))
            else:
                assert "ece" not in metrics


def test_correlations_are_pearsons(run):
    kind = run.results["scores"]["msp"]
    accuracy = [row["macro"]["accuracy"] for row in kind["groups"]]
    ece = [row["metrics"]["ece"]["estimate"] for row in kind["groups"]]
    assert kind["relations"]["ece"]["r"] == pytest.approx(pearsonr(accuracy, ece).statistic)
    assert kind["relations"]["ece"]["n"] == 3


def test_curves_are_risk_and_coverage_at_their_thresholds(run):
    for kind in KINDS:
        row = run.results["scores"][kind]["groups"][0]
        score, correct = _of(run, model=row["name"], score_kind=kind)
        curve = row["curve"]
        assert curve["coverage"][-1] == 1
        for threshold, coverage, risk in zip(*curve.values(), strict=True):
            answered = score >= threshold - 1e-12
            assert coverage == pytest.approx(answered.mean())
            assert risk == pytest.approx(1 - correct[answered].mean())


def test_withholding_lies_between_its_bounds(run):
    for row in run.results["scores"]["msp"]["groups"]:
        for found in row["abstention"]:
            accuracy = row["macro"]["accuracy"]
            assert found["answer_all"] == pytest.approx(accuracy - found["wrong"] * (1 - accuracy))
            assert found["lowest"] <= found["with_threshold"] <= found["highest"] <= 1
            assert 0 <= found["withheld"] <= 1
            assert found["labels"] == 100


def test_what_is_no_probability_is_said(run):
    assert any(note.startswith("max_logit goes from ") for note in run.results["notes"])


def test_the_terminal_says_the_findings(run):
    assert "Of 3 models, 2 are over-confident and 1 under-confident" in " ".join(
        run.printed.split()
    )
    assert str(run.output / "report.html") in run.printed
    for name in MODELS:
        assert name in run.printed


@pytest.mark.parametrize(
    "name",
    ["reliability", "risk_coverage", "payoff_1", "payoff_2", "accuracy_auroc", "accuracy_ece"],
)
def test_pictures_are_png_and_svg(run, name):
    content = (run.output / f"{name}.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert min(width, height) > 500
    assert xml.dom.minidom.parse(str(run.output / f"{name}.svg")).documentElement.tagName == "svg"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.identities: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta",):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                self.links.append(str(value))
            if name == "id":
                self.identities.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(run):
    text = (run.output / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.tags.count("svg") == 3 + 3 + 2
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert len(set(page.identities)) == len(page.identities)
    assert {link[1:] for link in page.links} <= set(page.identities)
    assert "@import" not in text
    assert "url(http" not in text
    assert "prefers-color-scheme: dark" in text


def test_names_of_groups_are_text_not_markup(run):
    text = (run.output / "report.html").read_text(encoding="utf-8")
    assert "sharp &lt;b&gt;" in text
    assert "<b>" not in text


def test_equal_input_gives_equal_output(run, tmp_path):
    out = tmp_path / "again"
    source = run.output.parent / "answers.parquet"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["report", str(source), "--output", str(out)]) == 0
    for name in ("results.json", "report.html", "risk_coverage.svg"):
        assert (out / name).read_bytes() == (run.output / name).read_bytes()


@pytest.mark.parametrize("outcome", [0, 1])
@pytest.mark.parametrize("rows", [1, 60])
def test_answers_all_alike_are_a_stated_case(outcome, rows, tmp_path, capsys):
    path = tmp_path / "answers.csv"
    path.write_text("confidence,correct\n" + f"0.75,{outcome}\n" * rows)
    assert main(["report", str(path), "--output", str(tmp_path / "out")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "there is nothing for confidence to tell apart" in printed
    assert "nan" not in (tmp_path / "out" / "report.html").read_text().lower()


def test_an_output_that_is_a_file_exits_with_2(tmp_path, capsys):
    output = tmp_path / "out"
    output.touch()
    assert main(["report", "answers.csv", "--output", str(output)]) == 2
    assert "cannot make the folder" in capsys.readouterr().err
