"""What the arguments of the operators are, by name: fakes, autograd, batches, shards and FLOP counts ask here.

The signatures in library.py say which arguments an operator has, and in which order. A new argument goes there and, if
it has an entry for each token or belongs to the head, into one of the two sets below. Nothing else counts positions.
"""

import inspect
from collections import namedtuple
from collections.abc import Callable
from typing import Any, TypeVar

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

PER_TOKEN = frozenset(
    {
        "input",
        "target",
        "picks",
        "token_weight",
        "label_smoothing",
        "grad_logsumexp",
        "grad_picked",
        "grad_mean",
        "grad_expected",
        "logsumexp",
        "expected",
        "largest",
    }
)
OF_HEAD = frozenset({"linear_weight", "linear_bias"})

_TUPLES: dict[str, Any] = {}  # by the name of an operator, a named tuple of its arguments


def described(operator: FunctionT) -> FunctionT:
    """Take down the arguments of an operator, which is returned as it is."""
    names = tuple(inspect.signature(operator).parameters)
    name = operator.__name__
    _TUPLES[name] = namedtuple(name, names, defaults=(None,) * len(names))
    return operator


def named(operator: str, args: tuple[Any, ...]) -> Any:
    """Return the arguments of a call by name, with None for those at the end that the dispatcher has left out."""
    return _TUPLES[operator](*args)


def gradients_of(operator: str, **by_name: Any) -> tuple[Any, ...]:
    """Return what a backward of the operator returns: these gradients in the places of their arguments, and None."""
    return tuple(_TUPLES[operator](**by_name))


def position(operator: str, name: str) -> int:
    """Return where an argument stands."""
    return int(_TUPLES[operator]._fields.index(name))


def per_token(operator: str) -> list[int]:
    """Return where the arguments stand that have an entry for each token."""
    return [i for i, name in enumerate(_TUPLES[operator]._fields) if name in PER_TOKEN]
