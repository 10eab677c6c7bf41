"""What is compared: the same numbers, by every way that a user could get them from installed packages."""

import inspect
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import linear_cross_entropy, linear_logit_stats
from ..ops.api import Impl
from .timing import Method

# In this mode a method returns the negative log-likelihood of the target and the entropy of every token, (2, N),
# without smoothing; in others a loss, () or (N,).
STATISTICS = "eval statistics"


def dense(x: Tensor, weight: Tensor, target: Tensor, smoothing: float, reduction: str) -> Tensor:
    """PyTorch on materialised logits, in float32 as Hugging Face computes it."""
    logits = F.linear(x, weight).float()
    return F.cross_entropy(logits, target, label_smoothing=smoothing, reduction=reduction)


def compiled(*args: Any) -> Tensor:
    """PyTorch's dense loss, by torch.compile."""
    return _compiled(dense)(*args)


def auto_chunked(*args: Any) -> Tensor:
    """The same, and Inductor is asked to chunk it."""
    return _compiled(dense, ("auto_chunker.enable", True))(*args)


@cache
def _compiled(function: Method, *options: tuple[str, Any]) -> Method:
    # Not before it is run: the compiler is slow to import. Anew for each smoothing and shape: by default the second
    # smoothing would become a variable of the program.
    return torch.compile(function, dynamic=False, options=dict(options))


def torch_fused(
    options: Any, x: Tensor, weight: Tensor, target: Tensor, smoothing: float, reduction: str
) -> Tensor:
    """The fused loss of torch >= 2.13."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError("needs torch >= 2.13")
    chosen = torch.nn.LinearCrossEntropyOptions() if options == "chunked" else None
    return F.linear_cross_entropy(
        x, weight, target, label_smoothing=smoothing, reduction=reduction, options=chosen
    )


def label_smoother(
    x: Tensor, weight: Tensor, target: Tensor, smoothing: float, reduction: str
) -> Tensor:
    """What the Trainer of transformers does with the logits for `label_smoothing_factor`."""
    from transformers.trainer_pt_utils import LabelSmoother

    if reduction != "mean":
        raise NotImplementedError("reduces to the mean")
    loss: Tensor = LabelSmoother(epsilon=smoothing)({"logits": F.linear(x, weight)}, target)
    return loss


def _trl(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    from trl.kernels import ChunkedLogProbFunction

    # SFTTrainer asks for these outputs, with tiles of 32768 entries.
    outputs = ("log_probs", "entropy", "is_top1")
    log_probs, entropy, *_ = ChunkedLogProbFunction.apply(
        x, weight, None, target, 1.0, 32768, None, 1.0, outputs
    )
    return log_probs, entropy


def trl(x: Tensor, weight: Tensor, target: Tensor, smoothing: float, reduction: str) -> Tensor:
    """The fused head of TRL's SFTTrainer. It has no label smoothing."""
    if smoothing:
        raise NotImplementedError("has no label smoothing")
    losses = -_trl(x, weight, target)[0]
    return losses.mean() if reduction == "mean" else losses


def liger(x: Tensor, weight: Tensor, target: Tensor, smoothing: float, reduction: str) -> Tensor:
    """Liger-Kernel's fused loss, as it comes."""
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    if x.is_cpu:
        raise NotImplementedError("needs a GPU")
    function = LigerFusedLinearCrossEntropyLoss(label_smoothing=smoothing, reduction=reduction)
    loss: Tensor = function(weight, x, target)
    return loss


def cut(x: Tensor, weight: Tensor, target: Tensor, smoothing: float, reduction: str) -> Tensor:
    """Cut Cross-Entropy without its filter: the exact gradient. It has no label smoothing; on a CPU it compiles."""
    from cut_cross_entropy import linear_cross_entropy

    if smoothing:
        raise NotImplementedError("has no label smoothing")
    # Releases after 25.1 have a preset, which accumulates in float32 besides.
    preset = "accum_e_fp32" in inspect.signature(linear_cross_entropy).parameters
    exact = {"impl": "cce_exact"} if preset else {"filter_eps": None}
    options = {"impl": "torch_compile"} if x.is_cpu else exact
    loss: Tensor = linear_cross_entropy(x, weight, target, reduction=reduction, **options)
    return loss


def fused(impl: Impl | None) -> Method:
    """Levelhead, by one of its implementations."""
    return partial(_fused, impl)  # unlike a closure it can go to another process


def _fused(
    impl: Impl | None, x: Tensor, weight: Tensor, target: Tensor, smoothing: float, reduction: Any
) -> Tensor:
    return linear_cross_entropy(
        x, weight, target, label_smoothing=smoothing, reduction=reduction, impl=impl
    )


def dense_statistics(x: Tensor, weight: Tensor, target: Tensor, *_: Any) -> Tensor:
    """PyTorch on materialised logits."""
    log_p = F.linear(x, weight).float().log_softmax(1)
    return torch.stack([F.nll_loss(log_p, target, reduction="none"), -(log_p.exp() * log_p).sum(1)])


def compiled_statistics(*args: Any) -> Tensor:
    """The same, by torch.compile."""
    return _compiled(dense_statistics)(*args)


def trl_statistics(x: Tensor, weight: Tensor, target: Tensor, *_: Any) -> Tensor:
    """What TRL's SFTTrainer logs."""
    log_probability, entropy = _trl(x, weight, target)
    return torch.stack([-log_probability, entropy])


def fused_statistics(x: Tensor, weight: Tensor, target: Tensor, *_: Any) -> Tensor:
    """Levelhead; of what it returns, what the others return too."""
    stats = linear_logit_stats(x, weight, target)
    return torch.stack([-stats.log_probs, stats.entropy])


DENSE, COMPILED, OURS = "F.cross_entropy", "F.cross_entropy, torch.compile", "levelhead"
AUTO_CHUNKED = "F.cross_entropy, torch.compile, auto_chunker"
CHUNKED = "F.linear_cross_entropy, chunked"
CPU_METHODS: dict[str, Method] = {
    DENSE: dense,
    COMPILED: compiled,
    AUTO_CHUNKED: auto_chunked,
    "F.linear_cross_entropy": partial(torch_fused, None),
    CHUNKED: partial(torch_fused, "chunked"),
    "transformers, LabelSmoother": label_smoother,
    "TRL, fused head": trl,
    "Liger-Kernel": liger,
    "Cut Cross-Entropy, torch_compile": cut,
    OURS: fused(None),
}
CPU_STATISTICS: dict[str, Method] = {
    "log_softmax": dense_statistics,
    "log_softmax, torch.compile": compiled_statistics,
    "TRL, fused head": trl_statistics,
    OURS: fused_statistics,
}
GPU_METHODS: dict[str, Method] = {
    DENSE: dense,
    COMPILED: compiled,
    CHUNKED: partial(torch_fused, "chunked"),
    "levelhead, chunked": fused("chunked"),
    "levelhead, triton": fused("triton"),
    "Liger-Kernel": liger,
    "Cut Cross-Entropy, exact": cut,
}


def baseline(mode: str) -> Method:
    """Return what PyTorch alone does in a mode: the error of others is held against its error."""
    return dense_statistics if mode == STATISTICS else dense
