"""How many tokens the minute and the memory hold."""

from collections.abc import Collection
from dataclasses import replace

import torch

from ..plan.footprint import Problem
from .contest import LOSSES, TORCH, method_bytes, operand_bytes, step_seconds

_MOST, _USUAL, _LEAST = 8192, 64, 16
_ROUNDS = 3  # that there shall be time for before there are more tokens than usual


def choose(
    one: Problem, smoothing: float, free: int, seconds: float
) -> tuple[int, Collection[str], str]:
    """The tokens to measure, a power of two; the methods for which there is time; and why not more tokens.

    Args:
        one: The head, with any number of tokens.
        smoothing: Label smoothing.
        free: Bytes.
        seconds: What all of it may take.
    """

    def foretold(tokens: int, methods: Collection[str]) -> dict[str, float]:
        some = replace(one, tokens=tokens)
        # On a CPU memory is measured with one thread.
        slowdown = torch.get_num_threads() if one.device == "cpu" else 1
        runs = 2 + slowdown + (_ROUNDS if tokens > _USUAL else 0)  # checks, peaks, rounds
        return {
            name: runs * taken for name, taken in step_seconds(some, smoothing, methods).items()
        }

    least = foretold(_LEAST, LOSSES)
    # Torch's fused loss cuts a wide head into parts of few tokens, each of which goes through the whole weight.
    methods = [name for name in LOSSES if name != TORCH or least[name] <= seconds / 2]
    tokens, more = _LEAST, _USUAL
    taken = sum(least[name] for name in methods)
    while taken <= seconds and tokens < _MOST:
        some = replace(one, tokens=more)
        need = operand_bytes(some) + max(method_bytes(name, some, smoothing) for name in methods)
        if need > (free if more <= _USUAL else free / 2):
            return tokens, methods, "more would take too much of the free memory"
        taken = sum(foretold(more, methods).values())
        if taken <= seconds:
            tokens, more = more, 2 * more
    if tokens >= _MOST:
        return tokens, methods, "enough for steady times"
    few = "; times at so few say little of training" if tokens < _USUAL else ""
    return tokens, methods, f"more would take over a minute{few}"
