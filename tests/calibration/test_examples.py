"""The examples in public docstrings run."""

import doctest

import pytest
import torch

from levelhead import calibration

PUBLIC = [name for name in calibration.__all__ if callable(getattr(calibration, name))]
FUNCTIONS = [name for name in PUBLIC if name[0].islower()]


@pytest.mark.parametrize("name", PUBLIC)
def test_example_runs(name):
    names = {**vars(calibration), "torch": torch}
    (found,) = doctest.DocTestFinder(recurse=False).find(
        getattr(calibration, name), name, globs=names
    ) or [None]
    if name in FUNCTIONS:
        assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0
