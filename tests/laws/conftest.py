"""The laws run on small problems, so chunks, tiles and slabs are made small: several a problem."""

from collections.abc import Iterator

import pytest
from tests.problems import INTERPRETED

from levelhead.ops import chunked, sums


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_BUDGET_SHARE", 0)
        patch.setattr(chunked, "_BUDGET_FLOOR", 2 * 3 * 7 * 8)
        patch.setattr(chunked, "_TILE_TOKENS", 3)
        patch.setattr(chunked, "_TILE_BYTES", 5 * 6 * 4)
        patch.setattr(sums, "_ROWS", 3)
        if INTERPRETED:
            from levelhead.ops.triton import backward, forward, softmax

            patch.setattr(forward, "_SLAB_BYTES", 7 * 6 * 8)
            patch.setattr(backward, "_BUDGET_SHARE", 0)
            patch.setattr(backward, "_SLAB_ENTRIES", 7)
            patch.setattr(backward, "_ALIGNMENT", 1)
            patch.setattr(softmax, "_LOGITS_TOKENS", 2)
            patch.setattr(softmax, "_GRADIENT_TOKENS", 4)
        yield
