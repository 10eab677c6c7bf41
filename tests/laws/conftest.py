"""The laws run on small problems, so chunks, tiles and slabs are made small: several a problem."""

from collections.abc import Iterator

import pytest

from levelhead.ops.sizes import changed


@pytest.fixture(autouse=True, scope="module")
def small_sizes() -> Iterator[None]:
    with changed(
        buffer_share=0,
        buffer_bytes=2 * 3 * 7 * 8,
        tile_tokens=3,
        cast_bytes=5 * 6 * 4,
        sum_rows=3,
        slab_bytes=7 * 6 * 8,
        gradient_share=0,
        gradient_entries=7,
        entry_alignment=1,
        logits_tokens=2,
        gradient_tokens=4,
    ):
        yield
