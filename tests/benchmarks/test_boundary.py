"""The layers around a kernel: what is counted and timed, and the table made of it."""

import json
import re

import torch
from benchmarks import boundary, render


def results():
    return json.loads((boundary.RESULTS / "boundary.json").read_text())


def test_one_operator_forward_and_backward_only_where_the_gradient_is_not_known_yet() -> None:
    expected = {
        "mean": {"forward": 1, "backward": 0},
        "sum": {"forward": 1, "backward": 0},
        "none": {"forward": 1, "backward": 1},
    }
    assert boundary.operators() == results()["operators"] == expected


def test_every_layer_computes_the_same() -> None:
    problem = boundary.Problem()
    losses = [f(*problem.leaves) for f in (problem.fused, problem.fused_operator, problem.dense)]
    losses.append(problem.fused_implementation()[0])
    for loss in losses:
        torch.testing.assert_close(loss, losses[0])
    logsumexps = [f(*problem.leaves) for f in (problem.stats, problem.stats_operator)]
    torch.testing.assert_close(logsumexps[0], logsumexps[1])
    torch.testing.assert_close(logsumexps[0], problem.stats_implementation().logsumexp)
    gradients = problem.both(problem.stats)()
    for found, want in zip(problem.stats_implementation_and_backward(), gradients, strict=False):
        torch.testing.assert_close(found, want)


def test_the_committed_results_time_every_call() -> None:
    timed = {(row["function"], row["layer"], row["direction"]) for row in results()["rows"]}
    assert timed == boundary.calls().keys()
    for row in results()["rows"]:
        assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"]


def test_a_row_is_measured() -> None:
    (row,) = boundary.measure({("f", "layer", "forward"): lambda: sum(range(1000))}, 3)
    assert row["function"] == "f"
    assert 0 < row["us_p50"] < 1e4


def test_the_table_has_every_layer_and_every_median() -> None:
    table = render.boundary(results())
    for layer in boundary.LAYERS:
        assert f"| {layer} |" in table
    rows = re.findall(r"^\| .*? \| (.*) \|$", table, re.MULTILINE)[1:]
    cells = [cell for row in rows for cell in row.split(" | ") if cell.strip().isdigit()]
    assert len(cells) == len(results()["rows"])
    assert "mean 1 and 0, sum 1 and 0, none 1 and 1" in table
