"""What is compared: the same loss, by every way that a user could get it from installed packages."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import levelhead
from levelhead.ops.api import Impl

# Of input (N, D), weight (V, D), target (N,), label smoothing and reduction, "mean" or "none".
Loss = Callable[[Tensor, Tensor, Tensor, float, str], Tensor]


def dense(x: Tensor, weight: Tensor, target: Tensor, eps: float, reduction: str) -> Tensor:
    """PyTorch on materialised logits, in float32 as Hugging Face computes it."""
    logits = F.linear(x, weight).float()
    return F.cross_entropy(logits, target, label_smoothing=eps, reduction=reduction)


def compiled(*args: Any) -> Tensor:
    """PyTorch's dense loss, by torch.compile."""
    return _compiled()(*args)


@cache
def _compiled() -> Loss:
    # Not before it is run: the compiler is slow to import. Anew for each smoothing and shape: by default the second
    # smoothing would become a variable of the program.
    return torch.compile(dense, dynamic=False)


def torch_chunked(x: Tensor, weight: Tensor, target: Tensor, eps: float, reduction: str) -> Tensor:
    """The fused loss of torch >= 2.13, its chunking asked for; with label smoothing it has none."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError("needs torch >= 2.13")
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(
        x, weight, target, label_smoothing=eps, reduction=reduction, options=options
    )


def fused(impl: Impl | None) -> Loss:
    """Levelhead, by one of its implementations."""

    def loss(x: Tensor, weight: Tensor, target: Tensor, eps: float, reduction: str) -> Tensor:
        return levelhead.linear_cross_entropy(
            x, weight, target, label_smoothing=eps, reduction=reduction, impl=impl
        )

    return loss


def liger(x: Tensor, weight: Tensor, target: Tensor, eps: float, reduction: str) -> Tensor:
    """Liger-Kernel's fused loss, as it comes."""
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss(label_smoothing=eps, reduction=reduction)
    return loss(weight, x, target)


def cut(x: Tensor, weight: Tensor, target: Tensor, eps: float, reduction: str) -> Tensor:
    """Cut Cross-Entropy without its filter: the exact gradient. It has no label smoothing."""
    from cut_cross_entropy import linear_cross_entropy

    if eps:
        raise NotImplementedError("has no label smoothing")
    # Releases after 25.1 have a preset, which accumulates in float32 besides.
    preset = "accum_e_fp32" in inspect.signature(linear_cross_entropy).parameters
    exact = {"impl": "cce_exact"} if preset else {"filter_eps": None}
    return linear_cross_entropy(x, weight, target, reduction=reduction, **exact)


METHODS: dict[str, Loss] = {
    "F.cross_entropy": dense,
    "F.cross_entropy, torch.compile": compiled,
    "F.linear_cross_entropy, chunked": torch_chunked,
    "levelhead": fused(None),
}

GPU_METHODS: dict[str, Loss] = {
    "F.cross_entropy": dense,
    "F.cross_entropy, torch.compile": compiled,
    "F.linear_cross_entropy, chunked": torch_chunked,
    "levelhead, chunked": fused("chunked"),
    "levelhead, triton": fused("triton"),
    "Liger-Kernel": liger,
    "Cut Cross-Entropy, exact": cut,
}
