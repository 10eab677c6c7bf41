"""The study of large vocabularies: a small cell of it, trained, and what its committed rows are said to show."""

import json
from dataclasses import replace

import pytest
from benchmarks.large_vocabulary import REMEDIES, RESULTS, Recipe, acts, cells, helps, run


def test_a_cell_has_a_row_for_every_remedy_with_what_was_predicted_and_what_came() -> None:
    recipe = replace(Recipe(), classes=16, training=64, held_out=64, steps=2, batch=32)
    rows = list(run(recipe, 8, 32, seed=0))
    assert [row["remedy"] for row in rows] == list(REMEDIES)
    plain, cooled, capped = rows
    assert cooled["margin"] == pytest.approx(4 * plain["margin"])
    assert capped["margin"] == pytest.approx(min(16, plain["margin"]))
    for row in rows:
        for label in ("hard", "smoothed"):
            assert 0 <= row[label]["ece"] <= 1
            assert 0 <= row[label]["accuracy"] <= 1


def test_where_the_optimum_is_out_of_reach_smoothing_does_nothing() -> None:
    found = cells(json.loads((RESULTS / "large_vocabulary.json").read_text())["rows"])
    out_of_reach = [cell for cell in found if cell["capacity"] < 1]
    assert out_of_reach
    assert not any(acts(cell) for cell in out_of_reach)


def test_where_smoothing_does_not_help_the_smoothed_models_are_under_confident() -> None:
    found = cells(json.loads((RESULTS / "large_vocabulary.json").read_text())["rows"])
    enough = min(cell["capacity"] for cell in found if helps(cell))
    less = [cell for cell in found if cell["capacity"] < enough]
    assert less
    assert all(cell["smoothed_confidence"] < cell["smoothed_accuracy"] for cell in less)
