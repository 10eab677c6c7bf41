"""What the measures take, from a caller's tensor, array or list to checked columns on the CPU.

Scores become float64 and outcomes booleans; arrays and tensors that already are so are not copied.
Whatever runs over all rows takes `CHUNK` of them at a time, so ten million need little more memory
than the input itself.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 18  # rows


def as_predictions(confidence: Any, correct: Any) -> tuple[Tensor, Tensor]:
    """Return confidence (N,) float64 in [0, 1] and outcomes (N,) bool, at least one of each."""
    confidence, correct = _as_columns("confidence", confidence, correct)
    check_probabilities("confidence", confidence)
    return confidence, correct


def as_scores(score: Any, correct: Any) -> tuple[Tensor, Tensor]:
    """Return scores (N,) float64, any number but NaN, and outcomes (N,) bool, at least one of each."""
    score, correct = _as_columns("score", score, correct)
    _check_values("score", score, valid=lambda part: ~part.isnan(), expected="a number, not NaN")
    return score, correct


def chunks(*columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield equally long columns, `CHUNK` rows at a time."""
    return zip(*(torch.split(column, CHUNK) for column in columns), strict=True)


def check_probabilities(name: str, values: Tensor) -> None:
    """Refuse what is not in [0, 1]."""
    _check_values(
        name,
        values,
        valid=lambda part: (part >= 0) & (part <= 1),
        expected="a probability in [0, 1]; take the softmax of logits, divide percentages by 100",
    )


def check_choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    """Refuse a word that is none of the valid ones."""
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; expected one of {', '.join(map(repr, valid))}")


def as_number(name: str, value: Any) -> float:
    """Return the number that an option holds, which may be a tensor or an array of one."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} is a constant here, and requires a gradient; pass {name}.item()")
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} must be a number, got {value!r}")


def check_int(name: str, value: object, such_as: int) -> None:
    """Refuse what is no whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}; pass a number such as {such_as}")


def check_dense(name: str, values: object) -> None:
    """Refuse what is no tensor, or none whose values can be read one by one."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    kinds = {
        "nested": values.is_nested,
        "sparse": values.layout is not torch.strided,
        "quantised": values.is_quantized,
        "meta": values.is_meta,
    }
    for kind, found in kinds.items():
        if found:
            raise TypeError(f"{name} is a {kind} tensor; pass a dense one that holds its values")


def as_tensor(name: str, values: Any) -> Tensor:
    """Return a detached tensor of real numbers on the CPU, of the caller's dtype where it has one."""
    tensor = _as_tensor(name, values)
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}")
    return tensor


def _as_tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        check_dense(name, values)
        return values.detach().cpu()
    if hasattr(values, "compressed"):  # numpy.ma, whose __array__ forgets the mask
        raise TypeError(
            f"{name} is a masked array; leave out what is masked in all that goes with it, and pass arrays"
        )
    try:
        if hasattr(values, "__array__"):  # numpy, pandas, pyarrow, polars
            array = values.__array__()
            if not array.flags.writeable or min(array.strides, default=0) < 0:
                array = array.copy()  # torch takes neither without a word
            return torch.as_tensor(array)
        tensor = torch.tensor(values)
        # Python's floats again, straight to float64: through float32 they would change bins.
        floats = tensor.is_floating_point()
        return torch.tensor(values, dtype=torch.float64) if floats else tensor
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a tensor, an array or a list of numbers, "
            f"got {type(values).__name__} ({error})"
        ) from error


def as_classes(name: str, values: Tensor, target: Any) -> Tensor:
    """Return the right classes (N,) int64 for the (N, C) tensor called `name`, N and C at least 1."""
    classes = as_tensor("target", target)
    if values.dim() != 2 or classes.shape != values.shape[:1] or 0 in values.shape:
        raise ValueError(
            f"{name} must have shape (N, C) and target (N,), none of them empty, got "
            f"{tuple(values.shape)} and {tuple(classes.shape)}"
        )
    if classes.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch does not compare
        classes = classes.double()
    elif not classes.is_floating_point():
        # Beside a narrow dtype torch wraps a number around before it compares.
        classes = classes.long()
    _check_values(
        "target",
        classes,
        valid=lambda part: (part >= 0) & (part < values.shape[1]) & (part == part.long()),
        expected=f"a class, an integer from 0 to {values.shape[1] - 1}",
    )
    return classes.long()


def _as_columns(name: str, values: Any, correct: Any) -> tuple[Tensor, Tensor]:
    values, correct = as_tensor(name, values), as_tensor("correct", correct)
    if values.shape != correct.shape:
        raise ValueError(
            f"{name} and correct must have the same shape, got {tuple(values.shape)} and "
            f"{tuple(correct.shape)}; pass one {name} and one outcome per prediction"
        )
    if values.numel() == 0:
        raise ValueError(f"no predictions: {name} and correct are empty; pass at least one of each")
    values, correct = values.flatten().contiguous(), correct.flatten()
    if correct.dtype is not torch.bool:
        _check_values(
            "correct",
            correct,
            valid=lambda part: (part == 0) | (part == 1),
            expected="a boolean, 0 or 1; compare the predicted ids with the target ids first",
        )
    return values.double(), correct.bool()


def _check_values(
    name: str, values: Tensor, *, valid: Callable[[Tensor], Tensor], expected: str
) -> None:
    if all(bool(valid(part).all()) for (part,) in chunks(values)):
        return
    bad = (~valid(values)).nonzero()
    first = int(bad[0])
    raise ValueError(
        f"{name} holds {values[first].item():g} at position {first} "
        f"({len(bad)} such of {len(values)}); each value must be {expected}"
    )
