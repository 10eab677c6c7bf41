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
    taken: dict[str, float] = {}

    def too_many(tokens: int) -> str:
        some = replace(one, tokens=tokens)
        need = operand_bytes(some) + max(method_bytes(name, some, smoothing) for name in LOSSES)
        if need > (free if tokens <= _USUAL else free / 2):
            return "more would take too much of the free memory"
        taken.update(_seconds(some, smoothing))
        return "more would take over a minute" if sum(taken.values()) > seconds else ""

    tokens, why = _USUAL, too_many(_USUAL)
    if not why:
        while tokens < _MOST and not (why := too_many(2 * tokens)):
            tokens *= 2
        return tokens, LOSSES, why or "enough for steady times"
    why += "; times at so few say little of training"
    if not too_many(_LEAST):
        return _LEAST, LOSSES, why
    # Torch's fused loss cuts a wide head into parts of few tokens, each of which goes through the whole weight.
    slow = taken.get(TORCH, 0.0) > seconds / 2
    return _LEAST, [name for name in LOSSES if not (slow and name == TORCH)], why


def _seconds(problem: Problem, smoothing: float) -> dict[str, float]:
    """What each method takes: it is checked, its peak measured and, of more than a few tokens, timed in rounds."""
    # On a CPU memory is measured with one thread.
    slowdown = torch.get_num_threads() if problem.device == "cpu" else 1
    runs = 2 + slowdown + (_ROUNDS if problem.tokens > _USUAL else 1)
    return {name: runs * taken for name, taken in step_seconds(problem, smoothing).items()}
