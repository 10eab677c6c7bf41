"""What may never exist: the logits, a second weight gradient, a gradient nobody asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks.shapes import SHAPES
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import levelhead
from levelhead.ops import chunked
from levelhead.ops.sizes import Sizes
from levelhead.ops.statistics import StatsGradient

N, D, V = 640, 16, 5000


class _Largest(TorchDispatchMode):
    """Remembers every storage that the operators inside allocate, by size in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._alive.append(tensor)  # or another storage could get its address
                self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return result


@contextmanager
def _allocations(given: list[Tensor]) -> Iterator[list[int]]:
    found: list[int] = []
    with _Largest() as mode:
        yield found
    for tensor in given:
        mode.sizes.pop(tensor.untyped_storage().data_ptr(), None)
    found.extend(sorted(mode.sizes.values(), reverse=True))


def _tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype), torch.randint(0, V, (N,))


@pytest.fixture(autouse=True)
def budget(change_sizes: Callable[..., Sizes]) -> int:
    return change_sizes(buffer_share=0, buffer_bytes=2**20).buffer_bytes


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_with_gradients(frozen: bool, softcap: float | None, budget: int) -> None:
    x, weight, target = _tensors(torch.float32)
    token_weight = torch.ones(N)
    dtypes = (x.dtype, None if frozen else weight.dtype, None)
    with _allocations([x, weight, target, token_weight]) as sizes:
        chunked.linear_cross_entropy(
            x, weight, target, None, token_weight, token_weight / 10, 0.0, softcap, 1.0, dtypes
        )
    weight_gradients = [size for size in sizes if size == V * D * 4]
    assert len(weight_gradients) == (0 if frozen else 1)
    others = [size for size in sizes if size != V * D * 4]
    assert others[0] <= budget < N * V * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_and_their_backward(dtype: torch.dtype, budget: int) -> None:
    x, weight, target = _tensors(dtype)
    with _allocations([x, weight, target]) as sizes:
        stats = chunked.linear_logit_stats(x, weight, target[:, None], None, None, 1.0)
    assert sizes[0] <= budget
    ones = torch.ones(N)
    gradient = StatsGradient(ones, -ones[:, None], None, None)
    with _allocations([x, weight, target, ones, *stats]) as sizes:
        chunked.linear_logit_stats_backward(
            gradient, ones != 0, x, weight, target[:, None], None, stats.relative_logsumexp,
            stats.relative_expected, stats.max, None, 1.0, (dtype, dtype, None),
        )  # fmt: skip
    # A narrow weight gradient is rounded tile by tile: no float32 copy of it ever exists.
    assert [size for size in sizes if size > budget] == []
    assert V * D * 4 not in sizes or dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "megabytes"), [((32000, 512), 31), (SHAPES["Qwen2.5 7B"], 259), ((1, 1), 31)]
)
def test_the_budget_follows_from_the_size_of_the_weight(
    shape: tuple[int, int], megabytes: int, change_sizes: Callable[..., Sizes]
) -> None:
    change_sizes(**asdict(Sizes()))  # the defaults
    weight = torch.empty(shape, dtype=torch.float32, device="meta")
    assert chunked.buffer_budget(weight) // 2**20 == megabytes


@pytest.mark.parametrize(
    ("count", "chunk"),
    [(0, 1), (1, 1), (255, 255), (256, 128), (300, 150), (512, 128), (4096, 456)],
)
def test_a_chunk_is_a_quarter_of_the_tokens_unless_that_is_little_or_the_budget_is_less(
    count: int, chunk: int, change_sizes: Callable[..., Sizes]
) -> None:
    change_sizes(**asdict(Sizes()))
    weight = torch.empty(16384, 128, device="meta")
    assert chunked.chunk_tokens(count, weight, torch.float32) == chunk
    assert chunked.chunk_tokens(count, weight[:256], torch.float32) == max(1, count)


def test_a_checkpoint_holds_one_gradient_of_the_weight(budget: int) -> None:
    """That of the first forward must not stand beside that of the second."""
    rows, vocabulary, hidden = 256, 4096, 256
    head = 4 * vocabulary * hidden

    def peak(loss: Callable[..., Tensor]) -> int:
        x = torch.randn(rows, hidden, requires_grad=True)
        weight = torch.randn(vocabulary, hidden, requires_grad=True)
        target = torch.randint(vocabulary, (rows,))
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiler:
            checkpoint(loss, x, weight, target, use_reentrant=False).backward()
        now = most = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most

    dense = peak(lambda x, weight, target: F.cross_entropy(x @ weight.T, target))
    fused = peak(levelhead.linear_cross_entropy)
    assert head <= fused < head + 2 * budget
    assert fused < dense
