"""The error budget of this project, and a gate that a loss must pass before it is timed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .timing import Step

SLICE = 128  # tokens whose float64 logits stand at a time
_PART = 2**24  # numbers of a gradient that are compared at a time


def error_budget(dense_error: float, largest: float, rounding: float) -> float:
    """Return how large an error may be: twice that of the dense path in the same dtype, plus one rounding.

    Args:
        dense_error: the largest error of PyTorch's dense path in the same dtype, against float64.
        largest: the largest absolute value of the truth, which sets the size of a rounding.
        rounding: of a number of order one, `torch.finfo(dtype).eps` of the result's dtype.
    """
    return 2 * dense_error + rounding * largest


class Gate:
    """The truth from float32 operands (see `_truth`), and the error that a method may have.

    An error may be twice that of the dense path in the same dtype, plus a rounding of that dtype and a few hundred of
    float32: sums over tokens and vocabulary, in other orders. It is the worst element's, relative to the largest.
    Until `measure` is told of the dense path's errors, roundings alone are allowed.

    Args:
        step: Any method's step, for its operands. Those of a frozen head can be held against the same truth.
    """

    def __init__(self, step: Step) -> None:
        self._truth = _truth(step)
        self._rounding = torch.finfo(step.x.dtype).eps + 256 * torch.finfo(torch.float32).eps
        self._largest = [torch.linalg.vector_norm(true, torch.inf).item() for true in self._truth]
        self._budgets = [error_budget(0.0, largest, self._rounding) for largest in self._largest]

    def errors(self, results: list[Tensor]) -> list[float]:
        """The largest error of the loss, and of each gradient that there is: hidden states, weight."""
        return [_error(got, true) for got, true in zip(results, self._truth, strict=False)]

    def measure(self, dense: list[float]) -> None:
        """Allows twice the errors of the dense path besides.

        Raises:
            ArithmeticError: They are those of another loss, whose budget would hide all.
        """
        for error, largest in zip(dense, self._largest, strict=False):
            if not error <= 0.1 * largest:
                raise ArithmeticError(
                    f"PyTorch's dense path is off by {error:.2g} of {largest:.2g}"
                )
        for index, error in enumerate(dense):
            self._budgets[index] = error_budget(error, self._largest[index], self._rounding)

    def share(self, errors: list[float]) -> float:
        """The largest of some errors, as a share of what it may be; NaN stays NaN."""
        shares = torch.tensor(errors) / torch.tensor(self._budgets[: len(errors)])
        return shares.amax().item()


def _error(got: Tensor, true: Tensor) -> float:
    """The largest difference; a part at a time, for a second gradient of a large head takes long to allocate."""
    count = -(-true.numel() // _PART)
    parts = list(zip(got.reshape(-1).chunk(count), true.reshape(-1).chunk(count), strict=True))
    buffer = torch.empty_like(parts[0][1])
    largest = []
    for some, same in parts:
        difference = torch.sub(some, same, out=buffer[: len(same)])
        largest.append(difference.abs_().amax())
    return torch.stack(largest).amax().item()


def _truth(step: Step) -> list[Tensor]:
    """The mean loss and its gradients by autograd through dense logits, some tokens at a time.

    Products in float32, and in float64 what lies between them: there PyTorch sums as many numbers as there are logits
    one after the other, and is off by 1e-4 of the gradient for a vocabulary of 262144.
    """
    x, weight = (t.detach().float().requires_grad_(t.requires_grad) for t in (step.x, step.weight))
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), SLICE):
        tokens = slice(start, start + SLICE)
        logits, target = F.linear(x[tokens], weight).double(), step.target[tokens]
        loss = F.cross_entropy(logits, target, label_smoothing=step.smoothing, reduction="sum")
        loss = loss / len(x)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return [total, *(t.grad for t in (x, weight) if t.grad is not None)]
