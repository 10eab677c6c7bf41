"""How much is computed at a time, by either implementation: one value that tests and measurements may replace."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sizes:
    """Sizes of chunks, tiles, slabs and buffers..

    Attributes:
        buffer_share: All buffers of logits of the ATen implementation together, as a share of the weight's bytes: so
            little that they never matter beside the weight and its gradient.
        buffer_bytes: The same buffers of a small head: 258 tokens at V = 32000, so that a call stays within 32 MiB.
            With less, many tokens would be slower, since every chunk reads the whole weight and its gradient.
        chunks: Four chunks take no longer than one, if each has at least `chunk_tokens` tokens and `chunk_bytes` of
            logits, enough to be worth reading the weight and its gradient for, and a few calls more.
        chunk_tokens: See `chunks`.
        chunk_bytes: See `chunks`.
        tile_tokens: Tokens of a tile of logits, where statistics are computed tile by tile.
        cast_bytes: The part of a narrow weight that a CPU casts to float32 at a time: it stays in the cache.
        sum_rows: Rows of a narrow result that are in float32 at a time.
        waves: Triton's statistics have so many programs for each processor that the last wave of them, which is never
            full, costs little.
        slab_bytes: The part of a wide weight that is narrowed at a time for Triton's statistics: enough tiles for all
            processors, little beside the weight.
        gradient_share: The buffer for a slab of logits' gradients, as a share of the weight's entries.
        gradient_entries: The vocabulary entries of such a slab, at least: with fewer, accumulating the gradient of the
            input would cost more than a tenth of the products.
        entry_alignment: Of a slab's first entry: libraries and wide loads want 16 bytes, tiles a multiple of their own.
        logits_tokens: Tokens of a chunk of float32 logits in Triton's loss; triton/softmax.py derives it.
        gradient_tokens: Tokens of a chunk of narrow gradients of logits there; the same.
        row_alignment: Of a row of logits, in entries: what libraries and wide loads want.
    """

    buffer_share: float = 1 / 8
    buffer_bytes: int = 63 * 2**19
    chunks: int = 4
    chunk_tokens: int = 128
    chunk_bytes: int = 2**22
    tile_tokens: int = 512
    cast_bytes: int = 2**23
    sum_rows: int = 8192
    waves: int = 8
    slab_bytes: int = 64 * 2**20
    gradient_share: float = 1 / 16
    gradient_entries: int = 2048
    entry_alignment: int = 128
    logits_tokens: int = 512
    gradient_tokens: int = 2048
    row_alignment: int = 64


# Not a context variable: autograd runs backward passes on threads of its own.
_current = Sizes()


def sizes() -> Sizes:
    """Return the sizes in use."""
    return _current


@contextmanager
def changed(**fields: float) -> Iterator[Sizes]:
    """Use other sizes, in all threads, until the context ends."""
    global _current
    before = _current
    _current = replace(before, **fields)  # type: ignore[arg-type]
    try:
        yield _current
    finally:
        _current = before
