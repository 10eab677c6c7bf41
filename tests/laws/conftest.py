"""The laws run on small problems, so the chunked implementation gets small tiles: several a problem."""

from collections.abc import Iterator

import pytest

from levelhead.ops import chunked


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_BUDGET_SHARE", 0)
        patch.setattr(chunked, "_BUDGET_FLOOR", 2 * 3 * 7 * 8)
        patch.setattr(chunked, "_TILE_TOKENS", 3)
        patch.setattr(chunked, "_TILE_BYTES", 5 * 6 * 4)
        yield
