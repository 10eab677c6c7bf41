"""The world of the benchmark of calibration-aware fine-tuning, and how its seeds are summed up."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from benchmarks import calibration_aware as benchmark


def test_labels_are_drawn_from_the_truth_and_others_are_others() -> None:
    recipe = benchmark.Recipe()
    world = benchmark.World(recipe, seed=0)
    questions = world.questions(20000)
    torch.testing.assert_close(questions.truth.sum(-1), torch.ones(20000, dtype=torch.float64))
    share = torch.nn.functional.one_hot(questions.label, 4).double()
    assert (share - questions.truth).mean(0).abs().max() < 0.02
    best, answer = questions.truth.max(-1)
    right = (answer == questions.label).double().mean()
    assert right.item() == pytest.approx(best.mean().item(), abs=0.02)  # a*
    assert (world.others(questions.label) != questions.label).all()


def test_the_truth_itself_is_calibrated() -> None:
    questions = benchmark.World(benchmark.Recipe(), seed=1).questions(20000)
    found = benchmark.metrics(questions.truth, questions)
    assert found["ece"] < 0.02
    assert found["distance"] == 0
    assert found["expected_accuracy"] == pytest.approx(found["confidence"])


def test_the_interval_is_students() -> None:
    found = benchmark._interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["high"] - 2 == pytest.approx(4.302653 / 3**0.5)


def test_the_committed_summary_is_that_of_the_committed_seeds() -> None:
    content = json.loads(Path(benchmark.RESULTS).read_text())
    assert len(content["seeds"]) == content["recipe"]["seeds"] >= 3
    assert content["summary"] == benchmark.summary(content["seeds"])
    assert content["more_than_CFT"] == benchmark.differences(content["seeds"])
