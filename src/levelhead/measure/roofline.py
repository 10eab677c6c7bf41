"""What each stage does, in numbers: operations of products, bytes from and to memory, launches; and its time floor.

The model goes through the loops of the host code with the same constants; tests/triton/test_roofline.py counts what the
host code launches, and holds the model to it. It is that of an accelerator, and assumes:

- Only products count as operations, a multiply-add as two; what is done to each logit hides behind them or memory.
- A launch reads each operand from memory once and writes each result once. What it reads again is in a cache, the
  second pass of the softmax kernel included. Adding to a sum reads it and writes it.
- From one launch to the next nothing stays in a cache. Where operands are small enough to stay, less time is possible.
- Fills, copies and conversions of matrices count; vectors of N or V numbers count in our kernels only.
- No bias; a label smoothing per token; picks all different; gradients in the dtypes that library.py asks for. What
  autograd adds afterwards, a multiplication of the gradients by the upstream one, is no part of a stage.

The floor is no prediction: it takes the rates of a datasheet, and no product reaches them.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch

from ..ops import sums
from ..ops.library import _stored_dtypes
from ..ops.sizes import sizes
from ..ops.statistics import statistics_dtype
from ..ops.triton import backward, forward, launch

_ID = torch.int64.itemsize


@dataclass(frozen=True)
class Work:
    """What some launches do; works add up. Operations of products, bytes read and written, number of launches."""

    operations: int = 0
    read: int = 0
    written: int = 0
    launches: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


Steps = dict[str, Work]  # in the order in which they first run


@dataclass(frozen=True)
class Device:
    """An accelerator: dense operations a second, bytes a second, and what configurations and shares depend on."""

    name: str
    narrow: float  # operations of bfloat16 and float16
    tf32: float
    exact: float  # of float32; and of float64, which has a unit of its own
    bandwidth: float
    processors: int
    architecture: str

    def rate(self, dtype: torch.dtype) -> float:
        """Return the operations a second of products; of float32 in the precision that torch is set to."""
        if dtype.itemsize == 2:
            return self.narrow
        return self.tf32 if launch.precision(dtype) == "tf32" else self.exact


# NVIDIA's datasheets of the A100, H100 and H200 Tensor Core GPU, columns SXM. The last two state narrow and TF32 rates
# with sparsity, which doubles them.
A100 = Device("A100 SXM 80GB", 312e12, 156e12, 19.5e12, 2.04e12, 108, "sm_80")
H100 = Device("H100 SXM", 989e12, 495e12, 67e12, 3.35e12, 132, "sm_90")
H200 = Device("H200 SXM", 989e12, 495e12, 67e12, 4.8e12, 132, "sm_90")


def floor(steps: Steps, device: Device, dtype: torch.dtype) -> float:
    """Return the seconds that the steps take at least, one after the other, their products in ``dtype``."""
    return sum(
        max(work.operations / device.rate(dtype), (work.read + work.written) / device.bandwidth)
        for work in steps.values()
    )


def bare_products(n: int, v: int, d: int, *, frozen: bool = False) -> Steps:
    """Return 6 NVD as if memory were free, 4 NVD if the head is frozen: what a loss with its gradients cannot avoid."""
    return {"products": Work(operations=(4 if frozen else 6) * n * v * d)}


def statistics(
    n: int,
    v: int,
    d: int,
    dtype: torch.dtype,
    device: Device,
    *,
    picks: int = 1,
    weight_dtype: torch.dtype | None = None,
) -> Steps:
    """Return the steps of ``linear_logit_stats``; its device sets how many shares the vocabulary has."""
    wide, weight_dtype = statistics_dtype(dtype), weight_dtype or dtype
    slabs = list(forward._slabs(_matrix(n, d, dtype), _matrix(v, d, weight_dtype)))
    states = n * _shares(n, slabs, dtype, device) * (5 * wide.itemsize + torch.int32.itemsize)
    steps: defaultdict[str, Work] = defaultdict(Work)
    for entries in _lengths(slabs):
        if weight_dtype != dtype:
            steps["narrow the weight"] += _copy(entries * d, weight_dtype, dtype)
        steps["logits"] += Work(2 * n * entries * d, (n + entries) * d * dtype.itemsize, 0, 1)
    steps["logits"] += Work(written=states)
    steps["merge"] = Work(0, states, n * (4 * wide.itemsize + _ID), 1)
    if picks:
        read = n * d * dtype.itemsize + min(n * picks, v) * d * weight_dtype.itemsize
        written = n * picks * wide.itemsize
        steps["picks"] = Work(2 * n * picks * d, read + n * picks * _ID, written, 1)
    return dict(steps)


def statistics_backward(
    n: int,
    v: int,
    d: int,
    dtype: torch.dtype,
    *,
    picks: int = 1,
    weight_dtype: torch.dtype | None = None,
    frozen: bool = False,
) -> Steps:
    """Return the steps of ``linear_logit_stats_backward``, without the weight's gradient if it is frozen."""
    wide, weight_dtype = statistics_dtype(dtype), weight_dtype or dtype
    per_token = 4 * wide.itemsize + picks * (_ID + wide.itemsize)  # max, coefficients, picks
    steps: defaultdict[str, Work] = defaultdict(Work)
    steps["mask"] = _copy(n * d, dtype, dtype)
    slab = backward._slab_entries(_matrix(n, d, dtype), v)
    for number, entries in enumerate(_lengths(sums.slices(v, slab, sizes().entry_alignment))):
        if weight_dtype != dtype:
            steps["narrow the weight"] += _copy(entries * d, weight_dtype, dtype)
        read, written = (n + entries) * d * dtype.itemsize, n * entries * dtype.itemsize
        steps["gradient of logits"] += Work(2 * n * entries * d, read + n * per_token, written, 1)
        _multiply(steps, "gradient of input", n, entries, d, dtype, wide, adds=number > 0)
        if not frozen:
            _multiply(steps, "gradient of weight", entries, n, d, dtype, weight_dtype)
    if dtype != wide:
        steps["round"] += _copy(n * d, wide, dtype)
    return dict(steps)


def cross_entropy(
    n: int,
    v: int,
    d: int,
    dtype: torch.dtype,
    *,
    weight_dtype: torch.dtype | None = None,
    frozen: bool = False,
) -> Steps:
    """Return the steps of ``linear_cross_entropy``, without the weight's gradient if it is frozen."""
    wide, weight_dtype = statistics_dtype(dtype), weight_dtype or dtype
    large = sizes().logits_tokens if dtype == wide or frozen else sizes().gradient_tokens
    chunks = _lengths(sums.slices(n, large))
    dx, dw = _stored(dtype), _stored(weight_dtype)
    total = wide if len(chunks) > 1 else dw  # what the weight's gradient is summed in
    per_token = _ID + 2 * wide.itemsize  # target, weight, smoothing
    steps: defaultdict[str, Work] = defaultdict(Work)
    steps["mask"] = _copy(n * d, dtype, dtype)
    if weight_dtype != dtype:
        steps["narrow the weight"] = _copy(v * d, weight_dtype, dtype)
    for number, tokens in enumerate(chunks):
        for part in _lengths(sums.slices(tokens, sizes().logits_tokens)):
            steps["logits"] += _product(part, d, v, dtype, wide)
            read, written = v * wide.itemsize + per_token, v * dtype.itemsize + 4 * wide.itemsize
            steps["softmax"] += Work(0, part * read, part * written, 1)
        _multiply(steps, "gradient of input", tokens, v, d, dtype, dx)
        if not frozen:
            _multiply(steps, "gradient of weight", v, tokens, d, dtype, total, adds=number > 0)
    if dtype == torch.float16:  # the scale of sums.float16_scale is taken out again
        steps["unscale"] = _copy(n * d, dx, dx) + (Work() if frozen else _copy(v * d, total, total))
    if total != dw and not frozen:
        steps["round"] += _copy(v * d, total, dw)
    return dict(steps)


def _product(
    m: int, k: int, n: int, operands: torch.dtype, result: torch.dtype, *, adds: bool = False
) -> Work:
    """Return what the library does for (m, k) times (k, n), added to what is there or not."""
    written = m * n * result.itemsize
    read = (m + n) * k * operands.itemsize + (written if adds else 0)
    return Work(2 * m * k * n, read, written, 1)


def _multiply(
    steps: defaultdict[str, Work],
    name: str,
    m: int,
    k: int,
    n: int,
    operands: torch.dtype,
    result: torch.dtype,
    *,
    adds: bool = False,
) -> None:
    """Add to the steps what ``sums.multiply_`` does: a narrow result is made of wide rows, some at a time."""
    wide = statistics_dtype(result)
    for rows in [m] if result == wide else _lengths(sums.slices(m, sizes().sum_rows)):
        steps[name] += _product(rows, k, n, operands, wide, adds=adds)
        if result != wide:
            steps["round"] += _copy(rows * n, wide, result)


def _copy(elements: int, source: torch.dtype, result: torch.dtype) -> Work:
    return Work(0, elements * source.itemsize, elements * result.itemsize, 1)


def _lengths(slices: Iterable[slice]) -> list[int]:
    return [part.stop - part.start for part in slices]


def _matrix(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a matrix without its elements, for what the host code decides by shape and dtype."""
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def _shares(n: int, slabs: list[slice], dtype: torch.dtype, device: Device) -> int:
    """Return how many shares the vocabulary has, by the rule of ``forward._share_entries``."""
    name = str(dtype).removeprefix("torch.")
    block = launch._configurations()["state", device.architecture, name]
    entries = forward._share_entries(n, slabs, block, sizes().waves * device.processors)
    return sum(launch.cdiv(slab, entries) for slab in _lengths(slabs))


def _stored(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the loss's operator keeps a gradient for the backward pass."""
    return _stored_dtypes((dtype, None, None))[0] or dtype
