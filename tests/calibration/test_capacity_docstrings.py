"""The examples in the docstrings of the capacity of heads run."""

import doctest

from levelhead.calibration import capacity


def test_examples_run() -> None:
    results = doctest.testmod(capacity)
    assert results.attempted >= 5
    assert results.failed == 0
