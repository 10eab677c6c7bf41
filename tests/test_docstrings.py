"""The examples in public docstrings run."""

import doctest

import pytest

import levelhead


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_logit_stats"])
def test_example_runs(name: str) -> None:
    runner = doctest.DocTestRunner()
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(levelhead, name), name)
    assert example.examples
    assert runner.run(example).failed == 0
