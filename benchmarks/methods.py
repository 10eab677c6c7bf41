"""What is compared: the same loss, by every way that a user could get it from installed packages."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import levelhead

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def dense(x: Tensor, weight: Tensor, target: Tensor, eps: float) -> Tensor:
    """PyTorch on materialised logits, in float32 as Hugging Face computes it."""
    return F.cross_entropy(F.linear(x, weight).float(), target, label_smoothing=eps)


def torch_chunked(x: Tensor, weight: Tensor, target: Tensor, eps: float) -> Tensor:
    """The fused loss of torch >= 2.13, its chunking asked for; with label smoothing it has none."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, target, label_smoothing=eps, options=options)


def fused(x: Tensor, weight: Tensor, target: Tensor, eps: float) -> Tensor:
    """Levelhead."""
    return levelhead.linear_cross_entropy(x, weight, target, label_smoothing=eps)


METHODS: dict[str, Loss] = {
    "F.cross_entropy": dense,
    "F.cross_entropy, torch.compile": torch.compile(dense),
    "F.linear_cross_entropy, chunked": torch_chunked,
    "levelhead": fused,
}
