"""Hypothesis profiles: `ci` is the default and repeatable, `thorough` looks further (LEVELHEAD_HYPOTHESIS=thorough)."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile("ci", max_examples=25, derandomize=True, deadline=None, database=None)
settings.register_profile(
    "thorough", max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("LEVELHEAD_HYPOTHESIS", "ci"))
