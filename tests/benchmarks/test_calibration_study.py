"""The study of all remedies: a seed of it in small, and a picture of its summary."""

from dataclasses import replace
from pathlib import Path

from benchmarks.calibration_study import NAMES, Recipe, draw, repetition
from benchmarks.distillation import mean_interval


def test_a_seed_asks_every_model_the_same_questions(tmp_path: Path) -> None:
    recipe = replace(
        Recipe(), first=64, fine=32, unseen=32, test=50, first_epochs=1, epochs=1, repair_epochs=1
    )
    found = repetition(recipe, seed=0)
    assert list(found) == list(NAMES)
    for numbers in found.values():
        assert 0 <= numbers["ece"] <= 1
        assert 0 <= numbers["accuracy"] <= 1
    assert found["temperature"]["accuracy"] == found["hard targets"]["accuracy"]
    again = repetition(recipe, seed=0)
    assert again == found

    summary = {
        name: {metric: mean_interval([1.0, 2.0, 3.0]) for metric in numbers}
        for name, numbers in found.items()
    }
    draw(summary, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 1000
