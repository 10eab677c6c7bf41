"""Hypothesis profiles: `ci` is the default and repeatable, `thorough` looks further (LEVELHEAD_HYPOTHESIS=thorough)."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from hypothesis import HealthCheck, settings

from levelhead.ops.sizes import Sizes, changed

settings.register_profile("ci", max_examples=25, derandomize=True, deadline=None, database=None)
# Triton's interpreter takes a tenth of a second a kernel.
settings.register_profile("interpreter", settings.get_profile("ci"), max_examples=6)
settings.register_profile(
    "thorough", max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("LEVELHEAD_HYPOTHESIS", "ci"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Or what a test draws would hang on which tests its worker ran before.
    torch.manual_seed(0)
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture
def change_sizes() -> Iterator[Callable[..., Sizes]]:
    """Compute other amounts at a time, until the test ends: `change_sizes(tile_tokens=3)`."""
    with ExitStack() as stack:
        yield lambda **fields: stack.enter_context(changed(**fields))
