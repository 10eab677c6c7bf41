"""What a loss and its gradients are held against before they are timed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .measure import Step

SLICE = 256  # tokens whose float32 logits stand at a time


class Gate:
    """The truth from float32 operands, and the error that a method may have.

    An error may be twice that of the dense path in the same dtype, plus a rounding of that dtype and a few hundred of
    float32: sums over tokens and vocabulary, in other orders. It is the worst element's, relative to the largest.

    Args:
        step: Any method's step, for its operands.
        dense: The dense path's, which sets the measure; None where it does not fit: then roundings alone do.
    """

    def __init__(self, step: Step, dense: Step | None) -> None:
        self._truth = _truth(*step.operands)
        dtype = step.operands[0].dtype
        roundings = torch.finfo(dtype).eps + 256 * torch.finfo(torch.float32).eps
        largest = [true.abs().amax().item() for true in self._truth]
        of_dense = [0.0] * len(largest) if dense is None else self._errors(dense)
        for error, size in zip(of_dense, largest, strict=True):
            if not error <= 0.1 * size:  # another loss, whose budget would hide all
                raise ArithmeticError(f"PyTorch's dense path is off by {error:.2g} of {size:.2g}")
        self._budgets = [
            2 * error + roundings * size for error, size in zip(of_dense, largest, strict=True)
        ]

    def share(self, step: Step) -> float:
        """The largest error of a method, as a share of what it may be; NaN stays NaN."""
        errors = torch.tensor(self._errors(step)) / torch.tensor(self._budgets)
        return errors.amax().item()

    def _errors(self, step: Step) -> list[float]:
        results = [step(), *step.gradients()]
        step.clear()
        return [
            (got.float() - true).abs().amax().item()
            for got, true in zip(results, self._truth, strict=True)
        ]


def _truth(x: Tensor, weight: Tensor, target: Tensor, smoothing: float) -> list[Tensor]:
    """The mean loss and its gradients by autograd through dense float32 logits, some tokens at a time."""
    x, weight = (t.detach().float().requires_grad_(t.requires_grad) for t in (x, weight))
    total = torch.zeros((), device=x.device)
    for start in range(0, len(x), SLICE):
        tokens = slice(start, start + SLICE)
        logits = F.linear(x[tokens], weight)
        loss = F.cross_entropy(
            logits, target[tokens], label_smoothing=smoothing, reduction="sum"
        ) / len(x)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return [total, *(t.grad for t in (x, weight) if t.grad is not None)]
