"""What only kernels can get wrong, seen by Triton's interpreter; test_interpreter.py runs this with it switched on.

Memory: every tensor that the implementation allocates stands between canaries and starts as NaN, every tensor it is
given stands in a sea of NaN. A read or a write past an edge, or of what was never written, shows in a result or a
canary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.ops.test_error_budget import within_budget
from tests.problems import Problem, gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import levelhead
from levelhead.ops import reference
from levelhead.ops import triton as kernels
from levelhead.ops.sizes import Sizes
from levelhead.ops.statistics import StatsGradient
from levelhead.ops.triton import backward, forward, launch, softmax

MODELS = [(None, 1.0, False), (4.0, 1.7, True)]  # softcap, logit_scale, bias
# Fewer than a tile, exactly tiles, one more than tiles; the interpreter's tiles are 8 x 16 x 4.
SHAPES = [(1, 1, 1), (7, 3, 15), (8, 4, 16), (16, 8, 32), (17, 5, 33)]
_CANARY = 0x7E57
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_POISON = dict.fromkeys(_FLOATS, torch.nan) | {torch.int32: -_CANARY, torch.int64: -_CANARY}


@pytest.fixture(autouse=True)
def small_buffers(change_sizes: Callable[..., Sizes]) -> None:
    """Several chunks and slabs in every problem, none of them a whole number of tiles."""
    change_sizes(
        gradient_share=0, gradient_entries=13, entry_alignment=1, logits_tokens=3, gradient_tokens=7
    )


class _Canaries(TorchDispatchMode):
    """Puts canaries around everything that is allocated inside, and NaN, or nonsense, into what starts empty."""

    def __init__(self) -> None:
        super().__init__()
        self.guards: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        names = ("empty", "new_empty", "empty_like", "zeros", "zeros_like", "new_zeros", "full")
        if func.overloadpacket.__name__ not in names or result.dtype not in _POISON:
            return result
        edge = 256
        room = torch.full((result.numel() + 2 * edge,), _CANARY).to(result.dtype)
        inside = room[edge : edge + result.numel()].view(result.shape)
        self.guards += [room[:edge], room[-edge:]]
        if "empty" in func.overloadpacket.__name__:
            return inside.fill_(_POISON[result.dtype])
        return inside.copy_(result)


@contextmanager
def _canaries() -> Iterator[None]:
    with _Canaries() as mode:
        yield
    assert mode.guards
    for guard in mode.guards:
        assert (guard == torch.tensor(_CANARY).to(guard.dtype)).all(), "a canary was overwritten"


def _in_a_sea_of_nan(tensor: Tensor) -> Tensor:
    """Return the same values as a view with gaps, of a larger tensor that is NaN elsewhere."""
    sea = torch.full([2 * size + 3 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
    view = sea[tuple(slice(2, 2 + 2 * size, 2) for size in tensor.shape)]
    return view.copy_(tensor)


def _tensors(
    n: int, d: int, v: int, bias: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    random = torch.Generator().manual_seed(n + d + v)
    x, weight, b = (torch.randn(*s, generator=random) for s in ((n, d), (v, d), (v,)))
    return x.to(dtype), weight.to(dtype), b.to(dtype) if bias else None


def _assert_same(actual: Any, expected: Any) -> None:
    """Compare float64 results: the tolerance is rounding, a few thousand units in the last place."""
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("softcap", "logit_scale", "with_bias"), MODELS)
@pytest.mark.parametrize("shape", SHAPES)
class TestMemory:
    """Nothing past an edge is read or written, nothing is used that was not written first."""

    def test_statistics(
        self, shape: Any, softcap: Any, logit_scale: float, with_bias: bool
    ) -> None:
        n, _, v = shape
        x, weight, bias = _tensors(*shape, with_bias, torch.float64)
        picks = torch.arange(2 * n).view(n, 2) % (v + 2) - 1
        expected = reference.linear_logit_stats(x, weight, picks, bias, softcap, logit_scale)
        x, weight = _in_a_sea_of_nan(x), _in_a_sea_of_nan(weight)
        with _canaries():
            actual = kernels.linear_logit_stats(x, weight, picks, bias, softcap, logit_scale)
        _assert_same(actual, expected)

    def test_their_backward(
        self, shape: Any, softcap: Any, logit_scale: float, with_bias: bool
    ) -> None:
        n, _, v = shape
        x, weight, bias = _tensors(*shape, with_bias, torch.float64)
        picks = torch.arange(2 * n).view(n, 2) % (v + 2) - 1
        stats = reference.linear_logit_stats(x, weight, picks, bias, softcap, logit_scale)
        token = torch.linspace(-1, 2, n, dtype=torch.float64)
        gradient = StatsGradient(token, token[:, None].expand(n, 2), token + 1, 1 - token)
        dtypes = (x.dtype, x.dtype, x.dtype if with_bias else None)
        kept = (stats.relative_logsumexp, stats.relative_expected, stats.max)
        rest = (picks, bias, *kept, softcap, logit_scale, dtypes)
        keep = token != 0
        expected = reference.linear_logit_stats_backward(gradient, keep, x, weight, *rest)
        x, weight = _in_a_sea_of_nan(x), _in_a_sea_of_nan(weight)
        with _canaries():
            actual = kernels.linear_logit_stats_backward(gradient, keep, x, weight, *rest)
        _assert_same(actual, expected)

    def test_loss_with_gradients(
        self, shape: Any, softcap: Any, logit_scale: float, with_bias: bool
    ) -> None:
        n, _, v = shape
        x, weight, bias = _tensors(*shape, with_bias, torch.float64)
        target, token_weight = torch.arange(n) % v, torch.linspace(0.5, 2, n, dtype=torch.float64)
        dtypes = (x.dtype, x.dtype, x.dtype if with_bias else None)
        rest = (target, bias, token_weight, token_weight / 10, 0.1, softcap, logit_scale, dtypes)
        expected = reference.linear_cross_entropy(x, weight, *rest)
        x, weight = _in_a_sea_of_nan(x), _in_a_sea_of_nan(weight)
        with _canaries():
            actual = kernels.linear_cross_entropy(x, weight, *rest)
        _assert_same((actual[0], *actual[1]), (expected[0], *expected[1]))


def test_a_canary_can_die() -> None:
    def write_past_the_edge() -> None:
        with _canaries():
            room = torch.empty(4)
            torch.as_strided(room, (1,), (1,), room.storage_offset() + 4).fill_(0)

    with pytest.raises(AssertionError, match="a canary was overwritten"):
        write_past_the_edge()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loss_and_gradients_within_budget(
    dtype: torch.dtype, softcap: float | None, reduction: str
) -> None:
    x, weight, bias = _tensors(19, 24, 83, True, torch.float32)
    target = torch.arange(19) * 5 % 83
    target[::5] = -100
    problem = Problem(
        x, weight * 3 / 24**0.5, target, bias, None, -100, 0.1, softcap, 1.3, 0.01, reduction, "triton"
    ).to(dtype)  # fmt: skip
    _assert_within_budget(problem, problem.fused(), problem.dense())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_narrows_a_wide_weight_slab_by_slab(
    reduction: str, change_sizes: Callable[..., Sizes]
) -> None:
    change_sizes(slab_bytes=13 * 24 * 2)
    x, weight, bias = _tensors(19, 24, 83, True, torch.float32)
    problem = Problem(x, weight * 0.6, torch.arange(19), bias, reduction=reduction, impl="triton")
    problem = replace(problem, label_smoothing=0.1).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        actual, yardstick = problem.fused(), problem.dense()
    _assert_within_budget(problem, actual, yardstick)


@pytest.mark.parametrize(("eps", "z_loss"), [(0.1, 0.0), (0.0, 1e-4)])
def test_a_second_backward_of_tokens_that_are_certain_is_within_budget(
    eps: float, z_loss: float
) -> None:
    """Its logits are products of another kernel, and rounded otherwise than those of the first."""
    directions = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64))[0].float()
    target = torch.arange(19)
    options = {"label_smoothing": eps, "z_loss": z_loss, "impl": "triton"}
    problem = Problem(30 * directions[target], directions, target, **options).to(torch.float32)
    exact = problem.to(torch.float64)
    truth, yardstick, actual = exact.dense(), problem.dense(), problem.fused()
    for _ in range(2):
        found = zip(
            *(gradients(*p) for p in ((actual, problem), (truth, exact), (yardstick, problem))),
            strict=True,
        )
        for got, right, dense in found:
            within_budget("gradient", got, right, dense)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_bfloat16_where_nothing_is_multiplied_by_a_kernel(
    frozen: bool, softcap: float | None
) -> None:
    """The interpreter multiplies bfloat16 wrongly, but the loss with its gradients leaves products to the library."""
    x, weight, _ = _tensors(19, 24, 83, False, torch.bfloat16)
    target, token_weight = torch.arange(19), torch.full((19,), 1 / 19)
    dtypes = (torch.bfloat16, None if frozen else torch.bfloat16, None)
    loss, (dx, dw, _) = kernels.linear_cross_entropy(
        x, weight, target, None, token_weight, torch.full((19,), 0.1), 0.0, softcap, 1.0, dtypes
    )
    problem = Problem(x, weight, target, label_smoothing=0.1, softcap=softcap).to(torch.bfloat16)
    exact = problem.to(torch.float64)
    truth, yardstick = exact.dense(), problem.dense()
    within_budget("loss", loss, truth, yardstick)
    pairs = zip((dx, dw), gradients(truth, exact, truth.new_ones(())),
                gradients(yardstick, problem, yardstick.new_ones(())), strict=True)  # fmt: skip
    for actual, expected, dense in pairs:
        assert actual is not None or frozen
        if actual is not None:
            within_budget("gradient", actual, expected, dense)


def _assert_within_budget(problem: Problem, actual: Tensor, yardstick: Tensor) -> None:
    exact = problem.to(torch.float64)
    truth = exact.dense()
    within_budget("loss", actual, truth, yardstick)
    expected, dense = gradients(truth, exact), gradients(yardstick, problem)
    for got, true, same in zip(gradients(actual, problem), expected, dense, strict=True):
        within_budget("gradient", got, true, same)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_vocabulary_of_50257_and_one_token(
    reduction: str, monkeypatch: pytest.MonkeyPatch, change_sizes: Callable[..., Sizes]
) -> None:
    # There is one token: the interpreter would sum three rows of padding, entry by entry.
    product = {"BLOCK_N": 1, "BLOCK_V": 4096, "BLOCK_D": 8}
    wide = {"state": product, "gradient": product, "softmax": {"BLOCK_V": 4096}}
    chosen = launch.configuration
    for module in (forward, backward, softmax):
        monkeypatch.setattr(
            module, "configuration", lambda name, x: chosen(name, x) | wide.get(name, {})
        )
    change_sizes(gradient_entries=20000)
    x, weight, _ = _tensors(1, 5, 50257, False, torch.float64)
    target = torch.tensor([50256])
    problem = Problem(x, weight, target, label_smoothing=0.1, reduction=reduction, impl="triton")
    problem = problem.to(torch.float64)
    actual, expected = problem.fused(), problem.dense()
    _assert_same([actual], [expected])
    _assert_same(gradients(actual, problem), gradients(expected, problem))


def test_offsets_of_operands_beyond_two_to_the_31() -> None:
    """Rows a gigabyte apart: virtual memory that is never touched costs nothing."""
    n, d, v, stride = 3, 5, 4, 2**30 + 8
    x, weight, _ = _tensors(n, d, v, False, torch.float16)
    far_x = torch.empty(n * stride, dtype=torch.float16).as_strided((n, d), (stride, 1)).copy_(x)
    far_w = torch.empty(v * stride, dtype=torch.float16).as_strided((v, d), (stride, 1))
    far_w.copy_(weight)
    picks = torch.tensor([[3], [0], [2]])
    actual = kernels.linear_logit_stats(far_x, far_w, picks, None, None, 1.0)
    expected = kernels.linear_logit_stats(x, weight, picks, None, None, 1.0)
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=0, atol=0)


def test_offsets_of_hidden_units_beyond_two_to_the_31() -> None:
    n, d, v, stride = 3, 5, 4, 2**29 + 8
    x, weight, _ = _tensors(n, d, v, False, torch.float16)
    far_x = torch.empty(d * stride, dtype=torch.float16).as_strided((n, d), (1, stride)).copy_(x)
    picks = torch.tensor([[3], [0], [2]])
    actual = kernels.linear_logit_stats(far_x, weight, picks, None, None, 1.0)
    expected = kernels.linear_logit_stats(x, weight, picks, None, None, 1.0)
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=0, atol=0)


# NumPy computes what the kernel masks: the logarithm of an empty sum.
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")
def test_of_equal_logits_the_smallest_id_wins_within_a_tile_and_across() -> None:
    weight = torch.zeros(50, 3, dtype=torch.float64)
    weight[[5, 9, 21, 40]] = 1
    x = torch.tensor([[1.0], [-1], [0]]).double().expand(3, 3)
    nothing = torch.zeros(3, 0, dtype=torch.int64)
    for bias, ids in ((None, [5, 0, 0]), (torch.full((50,), -torch.inf).double(), [0, 0, 0])):
        stats = kernels.linear_logit_stats(x, weight, nothing, bias, None, 1.0)
        assert stats.argmax.tolist() == ids
    assert (stats.max == -torch.inf).all()
    assert (stats.logsumexp == -torch.inf).all()


# NumPy warns where a GPU does not: of NaN, which this test is about.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("entry", [0, 20, 49])
def test_a_nan_among_a_tokens_logits_is_in_its_statistics_and_no_others(entry: int) -> None:
    x, weight, _ = _tensors(3, 4, 50, False, torch.float64)
    x[:, 2], weight[entry, 2] = torch.tensor([-1, 0, -1]), torch.inf  # -inf, NaN, -inf
    picks = torch.zeros(3, 0, dtype=torch.int64)
    stats = kernels.linear_logit_stats(x, weight, picks, None, None, 1.0)
    for name in ("logsumexp", "mean", "expected", "max"):
        assert getattr(stats, name).isnan().tolist() == [False, True, False], name


def test_the_interpreter_refuses_bfloat16() -> None:
    x, weight, _ = _tensors(2, 3, 4, False, torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly; use impl=None"):
        levelhead.linear_cross_entropy(x, weight, torch.zeros(2).long(), impl="triton")


def test_no_tokens_give_zero_gradients_and_empty_statistics() -> None:
    x, weight, _ = _tensors(0, 3, 4, False, torch.float64)
    none = torch.zeros(0, dtype=torch.float64)
    stats = kernels.linear_logit_stats(x, weight, torch.zeros(0, 1).long(), None, None, 1.0)
    assert [len(field) for field in stats] == [0] * 6
    dtypes = (x.dtype, x.dtype, None)
    loss, (dx, dw, _) = kernels.linear_cross_entropy(
        x, weight, none.long(), None, none, None, 0.0, None, 1.0, dtypes
    )
    assert loss == 0
    assert dx.shape == x.shape
    _assert_same([dw], [torch.zeros_like(weight)])
