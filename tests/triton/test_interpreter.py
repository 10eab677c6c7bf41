"""The Triton kernels by Triton's interpreter, which must be on before triton is imported: a pytest process of its own.

All laws of tests/laws hold for ``impl="triton"`` in float64, and what only kernels can get wrong is in interpreted.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAWS = [f"tests/laws/{path.name}" for path in sorted((ROOT / "tests/laws").glob("test_*.py"))]


@pytest.mark.parametrize(
    "tests",
    [
        *LAWS,  # a process each, so that workers share them
        "tests/triton/interpreted.py",
        pytest.param("tests/triton/test_gpu_values.py", marks=pytest.mark.slow),
        pytest.param("tests/triton/test_gpu_edges.py", marks=pytest.mark.slow),
    ],
)
def test_in_the_interpreter(tests: str) -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "LEVELHEAD_HYPOTHESIS": "interpreter",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
