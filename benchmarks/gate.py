"""What a result is held against before it is timed: float64, within the project's error budget."""

import torch
import torch.nn.functional as F
from torch import Tensor

from levelhead.measure.gate import error_budget
from levelhead.measure.methods import STATISTICS

from .step import Step

_SLICE = 512  # tokens whose float64 logits stand at a time: 1 GB at V = 256000


def exact(step: Step) -> list[Tensor]:
    """Return the loss and the gradients in float64: autograd through dense logits, some tokens at a time."""
    x, weight = (t.detach().double().requires_grad_(t.requires_grad) for t in (step.x, step.weight))
    mean = torch.full(step.target.shape, 1 / len(x), dtype=torch.float64, device=x.device)
    upstream = mean if step.upstream is None else step.upstream.double()
    losses = []
    slices = (tensor.split(_SLICE) for tensor in (x, step.target, upstream))
    for tokens, target, gradient in zip(*slices, strict=True):
        logits = F.linear(tokens, weight)
        if step.case.mode == STATISTICS:
            log_p = logits.log_softmax(1)
            nll = F.nll_loss(log_p, target, reduction="none")
            losses.append(torch.stack([nll, -(log_p.exp() * log_p).sum(1)]))
            continue
        loss = F.cross_entropy(logits, target, label_smoothing=step.case.eps, reduction="none")
        if loss.requires_grad:
            loss.backward(gradient)
        losses.append(loss.detach())
    loss = torch.cat(losses, dim=-1)
    mean_of_tokens = step.upstream is None and step.case.mode != STATISTICS
    return [
        loss.mean() if mean_of_tokens else loss,
        *(t.grad for t in (x, weight) if t.grad is not None),
    ]


class Gate:
    """The error budgets of a case: twice the error of PyTorch's dense path in the same dtype, plus one rounding.

    Errors are those of the worst element. A loss has more room: a method may round its logits to the input's dtype,
    which in the mean over N tokens averages out, and adds up two sums in float32, a few roundings each.
    """

    def __init__(self, step: Step) -> None:
        self.truth = exact(step)
        self.dense = [error for error, _ in self._errors(step)]
        for error, true in zip(self.dense, self.truth, strict=True):
            # A few roundings of bfloat16 logits are 3 %. Beyond that it is another loss, and its budget would hide all.
            if not error <= 0.1 * true.abs().amax().item():
                raise ArithmeticError(f"PyTorch's dense path is off by {error:.2g}")
        tokens = len(step.x) if self.truth[0].dim() == 0 else 1
        of_logits = torch.finfo(step.x.dtype).eps / tokens**0.5
        self.of_loss = of_logits + 16 * torch.finfo(torch.float32).eps

    def errors(self, step: Step) -> dict[str, float]:
        """Return a method's largest error as a multiple of its budget, and its errors as shares of the largest value.

        The gradient's is that of the worse one of the two.
        """
        of_budget, relative = [], []
        for index, (error, rounding) in enumerate(self._errors(step)):
            rounding += self.of_loss if index == 0 else 0
            largest = self.truth[index].abs().amax().item()
            of_budget.append(error / error_budget(self.dense[index], largest, rounding))
            relative.append(error / largest)
        errors = {"error": _largest(of_budget), "loss_error": relative[0]}
        return errors | ({"gradient_error": _largest(relative[1:])} if relative[1:] else {})

    def _errors(self, step: Step) -> list[tuple[float, float]]:
        """Return the error of the loss and of each gradient, and one rounding in its dtype."""
        results = [step(), *step.gradients()]
        return [
            (
                (got.reshape(true.shape).double() - true).abs().amax().item(),
                torch.finfo(got.dtype).eps,
            )
            for got, true in zip(results, self.truth, strict=True)
        ]


def _largest(errors: list[float]) -> float:
    return torch.tensor(errors).amax().item()  # NaN stays NaN, unlike with max
