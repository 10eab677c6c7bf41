"""Compiled graphs on disk: another process uses them again, unless the package, or an option, has changed since."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tests import forked
from torch import Tensor
from torch._dynamo.utils import counters

import levelhead
from levelhead.ops import library

V, D, N = 37, 8, 6


def _function(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    expected = levelhead.linear_logit_stats(x, weight, y).expected.sum()
    return levelhead.linear_cross_entropy(x, weight, y, label_smoothing=0.1) + expected


def _dense(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), y)


def _cache(
    loss: Callable[..., Tensor], truth: Callable[[Tensor, Tensor], Tensor], options: Any = None
) -> list[int]:
    """Hits, misses and bypasses of a compiled training step; `truth` is of logits and targets."""
    counters.clear()
    torch.manual_seed(0)
    x, weight = (torch.randn(rows, D, requires_grad=True) for rows in (N, V))
    y = torch.randint(0, V, (N,))
    values = torch.compile(loss, options=options)(x, weight, y), truth(x @ weight.T, y)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, (x, weight)) for value in values))
    whats = "hit", "miss", "bypass"
    if options and torch.__version__ < "2.12":
        # torch 2.11 looks a graph up after the pass, and bypasses this cache for a function that is not its own. What
        # it makes of the graph, one forward and one backward, it finds in the cache of Inductor.
        assert counters["aot_autograd"]["autograd_cache_bypass"] == 1
        return [counters["inductor"][f"fxgraph_cache_{what}"] // 2 for what in whats]
    return [counters["aot_autograd"][f"autograd_cache_{what}"] for what in whats]


def _process(folder: str, version: str, eps: float) -> list[list[int]]:
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        # Autograd formulas are traced into the cached graph, and are not part of its key: `version` stands for them.
        with mock.patch.object(library, "VERSION", version):
            ours = _cache(
                _function,
                lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1) + (z.softmax(1) * z).sum(),
            )
        swapped = _cache(
            _dense,
            lambda z, y: F.cross_entropy(z, y, label_smoothing=eps),
            levelhead.inductor_options(eps),
        )
        return [ours, swapped]


@pytest.mark.slow
def test_another_process_uses_the_cache_and_another_version_or_smoothing_does_not(
    tmp_path: Path,
) -> None:
    def run(*arguments: Any) -> list[list[int]]:
        with ProcessPoolExecutor(1, forked.context()) as process:
            return process.submit(_process, str(tmp_path), *arguments).result()

    hit, miss = [1, 0, 0], [0, 1, 0]
    assert run(library.VERSION, 0.1) == [miss, miss]
    assert run(library.VERSION, 0.1) == [hit, hit]
    assert run("another", 0.2) == [miss, miss]
