"""What the kernels share: a tile of logits, the softcap, and the rule by which statistics merge.

Sizes in capitals are compile-time constants. ``BLOCK_N`` tokens, ``BLOCK_V`` vocabulary entries and ``BLOCK_D`` hidden
units make a tile; offsets are 64-bit, because N x V and V x D pass 2^31. Whatever a tile holds beyond N, V or D never
reaches a result.

A ``state`` is five numbers a token: the largest logit, the sums over the entries of ``exp(z - largest)``, of
``(z - largest) exp(z - largest)`` and of ``z - largest``, and the id of the largest logit, the smallest in a tie.
"""

import triton
import triton.language as tl


@triton.jit
def grouped(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Return a program's row and column tile, so that programs that run together share their operands in the L2 cache.

    GROUP row tiles go through all columns together, then the next GROUP.
    """
    group = program // (GROUP * column_tiles)
    rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    return group * GROUP + within % rows, within // rows


@triton.jit
def tanh(x):
    """Return tanh and its derivative, each to a few roundings of itself; triton.language has neither.

    Away from 0 by way of the exponential; near 0, where that would cancel, by the odd Taylor polynomial, which in
    float32 at 0.3 leaves out 2e-9 of the result, and in float64 at 1e-4 nothing.
    """
    limit = 1e-8 if x.dtype == tl.float64 else 0.09
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    s = x * x
    near = 1 + s * (
        -1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 + s * (-1382 / 155925))))
    )
    t = tl.where(s < limit, x * near, tl.where(x < 0, -far, far))
    return t, 4 * e / ((1 + e) * (1 + e))


@triton.jit
def finite(z):
    """Replace -inf, an entry that is masked out: its probability is 0, and 0 * -inf would be NaN.

    By no more than float32 holds when it is multiplied by a gradient.
    """
    return tl.maximum(z, -1e18)


@triton.jit
def capped(a, SOFTCAP: tl.constexpr):
    """Return the logits z and their derivative dz/da."""
    if SOFTCAP is None:
        z = a
        slope = tl.full(a.shape, 1, a.dtype)
    else:
        t, slope = tanh(a / SOFTCAP)
        z = SOFTCAP * t
    return z, slope


@triton.jit
def logits_before_softcap(
    x,  # (N, D)
    weight,  # (V, D)
    bias,  # (V,) or None
    rows,  # (BLOCK_N,), each < N
    columns,  # (BLOCK_V,), each < V
    D,
    x_stride_n,
    x_stride_d,
    weight_stride_v,
    weight_stride_d,
    LOGIT_SCALE: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return a tile of ``LOGIT_SCALE * (x W^T + b)``, (BLOCK_N, BLOCK_V), accumulated in DTYPE: 2 NVD."""
    units = tl.arange(0, BLOCK_D).to(tl.int64)
    x_tile = x + rows.to(tl.int64)[:, None] * x_stride_n + units[None, :] * x_stride_d
    w_tile = (
        weight + columns.to(tl.int64)[None, :] * weight_stride_v + units[:, None] * weight_stride_d
    )
    a = tl.zeros((rows.shape[0], columns.shape[0]), DTYPE)
    for first in range(0, D, BLOCK_D):
        if EVEN_D:
            x_part, w_part = tl.load(x_tile), tl.load(w_tile)
        else:
            x_part = tl.load(x_tile, mask=(first + units)[None, :] < D, other=0.0)
            w_part = tl.load(w_tile, mask=(first + units)[:, None] < D, other=0.0)
        a = tl.dot(x_part, w_part, a, input_precision=PRECISION, out_dtype=DTYPE)
        x_tile += tl.cast(BLOCK_D, tl.int64) * x_stride_d
        w_tile += tl.cast(BLOCK_D, tl.int64) * weight_stride_d
    if bias is not None:
        a += tl.load(bias + columns).to(DTYPE)[None, :]
    return a * LOGIT_SCALE


@triton.jit
def empty_state(N: tl.constexpr, DTYPE: tl.constexpr):
    """Return the state of no entry at all, the neutral element of :func:`merge_states`."""
    nothing = tl.full((N,), float("-inf"), DTYPE)
    zero = tl.zeros((N,), DTYPE)
    return nothing, zero, zero, zero, tl.full((N,), 2147483647, tl.int32)


@triton.jit
def tile_state(z, inside, first_id):
    """Return the state of those entries of a tile (BLOCK_N, BLOCK_V) that are ``inside``; of a NaN, only its sum.

    As few reductions as possible, or a tile of sums no longer fits the registers beside what they shuffle.
    """
    known = tl.where(inside & (z == z), z, float("-inf"))
    largest, best = tl.max(known, 1, return_indices=True)  # the smallest index in a tie
    z -= anchor(largest)[:, None]
    sums = tl.sum(tl.where(inside, z, 0.0), 1)
    z = tl.where(inside & (z == z), z, float("-inf"))
    exps = tl.exp(z)
    total, weighted = tl.reduce((exps, exps * finite(z)), 1, _add_pairs)
    return largest, total, weighted, sums, first_id + best


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def anchor(largest):
    """Return what logits are relative to: the largest of them, 0 where all are -inf."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _offset(largest, of_union):
    """Return the largest logit of a part relative to the union's; if it is -inf, a number that its sums do not feel."""
    return tl.minimum(anchor(largest) - anchor(of_union), 0.0)


@triton.jit
def merge_states(a, a_size, b, b_size):
    """Merge the states of two disjoint sets of so many entries into that of their union: the rule of LogitStats."""
    a_largest, a_total, a_weighted, a_sum, a_best = a
    b_largest, b_total, b_weighted, b_sum, b_best = b
    largest = tl.maximum(a_largest, b_largest)
    a_offset, b_offset = _offset(a_largest, largest), _offset(b_largest, largest)
    a_scale, b_scale = tl.exp(a_offset), tl.exp(b_offset)
    b_wins = (b_largest > a_largest) | ((b_largest == a_largest) & (b_best < a_best))
    return (
        largest,
        a_scale * a_total + b_scale * b_total,
        a_scale * (a_weighted + finite(a_offset) * a_total)
        + b_scale * (b_weighted + finite(b_offset) * b_total),
        a_sum + a_size * a_offset + b_sum + b_size * b_offset,
        tl.where(b_wins, b_best, a_best),
    )
