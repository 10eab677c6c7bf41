"""Compiled graphs on disk: a second process uses them again, unless the package has changed since."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Autograd formulas are traced into the cached graph, and are not part of its key: `version` stands for them.
_PROCESS = """
import sys, torch, levelhead
from levelhead.ops import library
from torch._dynamo.utils import counters

library.VERSION = sys.argv[1] or library.VERSION
weight = torch.randn(13, 4, requires_grad=True)

@torch.compile(backend="inductor", fullgraph=True)
def step(x, y):
    entropy = levelhead.linear_logit_stats(x, weight, y).expected.sum()
    return levelhead.linear_cross_entropy(x, weight, y, label_smoothing=0.1) + entropy

step(torch.randn(5, 4), torch.randint(0, 13, (5,))).backward()
print(counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"])
"""


@pytest.mark.slow
def test_a_second_process_uses_the_cache_and_another_version_does_not(tmp_path: Path) -> None:
    def run(version: str) -> str:
        command = [sys.executable, "-c", _PROCESS, version]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    assert run("") == "0 1"
    assert run("") == "1 0"
    assert run("another") == "0 1"
