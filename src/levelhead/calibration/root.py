"""The root finder of the fits: regula falsi with the Illinois rule."""

from collections.abc import Callable


def increasing_root(
    function: Callable[[float], float],
    low: float,
    at_low: float,
    high: float,
    at_high: float,
    *,
    tolerance: float,
) -> float:
    """Return where an increasing function is zero, to within `tolerance`.

    Args:
        function: Increasing between `low` and `high`.
        low: Where it is at most 0.
        at_low: Its value there.
        high: Where it is at least 0.
        at_high: Its value there.
        tolerance: Width of the interval at which the search stops.
    """
    kept = 0  # the end that the last step left in place: -1 low, 1 high
    while high - low > tolerance and at_low != at_high and at_low:
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        # A step from an end close to the root is too short to close the interval.
        middle = min(max(middle, low + tolerance / 2), high - tolerance / 2)
        value = function(middle)
        if value == 0:
            return middle
        # An end that stays twice counts half, or the interval would close from one side only.
        if value < 0:
            low, at_low = middle, value
            at_high /= 2 if kept == 1 else 1
            kept = 1
        else:
            high, at_high = middle, value
            at_low /= 2 if kept == -1 else 1
            kept = -1
    return (low + high) / 2 if at_low else low
