"""What is the same whether ranks share the tokens or the rows of the head: scenarios."""

from collections.abc import Callable
from typing import Any

import torch
from tests.problems import Problem
from torch import Tensor
from torch.distributed.tensor import DTensor


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights() -> Tensor:
    return torch.linspace(0.1, 2, 9, dtype=torch.float64)


def scenarios(
    problem: Callable[..., Problem],
    share: Callable[[Problem], Problem],
    of_tokens: Callable[[Tensor], Tensor],
) -> dict[str, Callable[[], Any]]:
    """Those of a worker that shares a problem, and a tensor of one number a token, in its way."""

    def smoothed(**options: Any) -> Problem:
        return share(problem(label_smoothing=0.1, **options))

    def frozen(*names: str) -> list[Tensor | None]:
        whole = problem(label_smoothing=0.1)
        for name in names:
            getattr(whole, name).requires_grad_(False)
        part = share(whole)
        part.fused().backward()
        return [None if p.grad is None else full(p.grad) for p in part.parameters]

    def learned() -> list[Tensor]:
        """Gradients of token weights and smoothing, which are the loss's own business."""
        options = {
            "token_weight": of_tokens(weights().requires_grad_()),
            "label_smoothing": of_tokens(torch.full_like(weights(), 0.2).requires_grad_()),
        }
        loss = share(problem()).fused(**options)
        return [full(g) for g in torch.autograd.grad(loss, list(options.values()))]

    def no_grad() -> Tensor:
        with torch.no_grad():
            return full(smoothed().fused())

    def inference(reduction: str) -> Tensor:
        part = smoothed(reduction=reduction)
        with torch.inference_mode():
            return full(part.fused())

    def accumulated() -> list[Tensor]:
        """Two backward passes into one ``grad``, the second of a graph that was used before."""
        part = smoothed()
        loss = part.fused()
        loss.backward(retain_graph=True)
        loss.backward()
        return [full(p.grad) for p in part.parameters]

    def double_backward() -> str:
        part = share(problem())
        (gradient,) = torch.autograd.grad(part.fused(), [part.input], create_graph=True)
        try:
            gradient.sum().backward()
        except RuntimeError as error:
            return str(error)
        return ""

    return {
        "frozen head": lambda: frozen("linear_weight", "linear_bias"),
        "frozen input": lambda: frozen("input"),
        "frozen bias": lambda: frozen("linear_bias"),
        "learned": learned,
        "no grad": no_grad,
        "inference, mean": lambda: inference("mean"),
        "inference, none": lambda: inference("none"),
        "accumulated": accumulated,
        "double backward": double_backward,
    }


def refusals(
    share: Callable[[], Problem], changes: dict[str, Callable[[Problem], Problem]]
) -> dict[str, str]:
    """What is said to each change of a problem that makes it one that cannot be done."""
    messages = {}
    for name, change in changes.items():
        part = change(share())
        try:
            part.fused()
        except ValueError as error:
            messages[name] = str(error)
    return messages
