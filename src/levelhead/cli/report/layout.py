"""Which groups become the rows of the main table, and which the strata within each."""

from dataclasses import dataclass

from .reading import FILE, KIND

_MODEL = "model"


@dataclass(frozen=True)
class Layout:
    """How answers are grouped.

    Attributes:
        by: The group whose values are the rows; None for one row.
        within: Groups whose combinations are the strata of each row.
    """

    by: str | None
    within: tuple[str, ...]


def layout(columns: tuple[str, ...], by: str | None, within: tuple[str, ...]) -> Layout:
    """The user's choice, and otherwise: models, or files, or the first group; then all other groups.

    Args:
        columns: The groups there are.
        by: As in `Layout`, if the user said so.
        within: As in `Layout`; () if the user said nothing.
    """
    groups = [column for column in columns if column not in (KIND, FILE, *within)]
    if by is None:
        candidates = [name for name in (_MODEL, FILE) if name in columns and name not in within]
        by = next(iter([*candidates, *groups]), None)
    return Layout(by, within or tuple(name for name in groups if name != by))
