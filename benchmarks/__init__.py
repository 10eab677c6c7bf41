"""Benchmarks: `python -m benchmarks` measures into results/, `python -m benchmarks.render` fills the README."""
