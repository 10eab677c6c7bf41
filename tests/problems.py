"""Random problems, and the dense answer to each in plain PyTorch: the truth that the laws are held against."""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import levelhead

# The laws hold for every implementation; Triton's without a GPU only where its interpreter is on (tests/triton).
# There a kernel takes a tenth of a second: gradcheck then probes a random direction instead of every element, which the
# law of equality with PyTorch compares one by one all the same.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ["triton"] if INTERPRETED else ["chunked", "reference"]


@dataclass(frozen=True)
class Problem:
    """A smoothed linear cross-entropy: tensors and options. Gradients are those of the three parameters."""

    input: Tensor  # (N, D)
    linear_weight: Tensor  # (V, D)
    target: Tensor  # (N,)
    linear_bias: Tensor | None = None  # (V,)
    token_weight: Tensor | None = None  # (N,)
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    z_loss: float = 0.0
    reduction: str = "mean"
    impl: str = IMPLEMENTATIONS[0]

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in (self.input, self.linear_weight, self.linear_bias) if p is not None]

    @property
    def counts(self) -> Tensor:
        return self.target != self.ignore_index

    def to(self, dtype: torch.dtype) -> "Problem":
        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_()

        return replace(
            self,
            input=cast(self.input),
            linear_weight=cast(self.linear_weight),
            linear_bias=cast(self.linear_bias),
        )

    def logits(self) -> Tensor:
        z = F.linear(self.input, self.linear_weight, self.linear_bias) * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def dense(self) -> Tensor:
        """Return the loss as PyTorch computes it from the logits, in float32 at least as Hugging Face does."""
        z = self.logits()
        z = z if z.dtype == torch.float64 else z.float()
        losses = F.cross_entropy(
            z,
            self.target,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        losses = losses + self.z_loss * z.logsumexp(1).square() * self.counts
        weight = torch.ones_like(losses) if self.token_weight is None else self.token_weight
        losses, weight = losses * weight, (weight * self.counts).sum()
        if self.reduction == "none":
            return losses
        return losses.sum() / weight if self.reduction == "mean" else losses.sum()

    def fused(self, **changes: Any) -> Tensor:
        """Return the loss as Levelhead computes it."""
        options = dict(vars(self), **changes)
        tensors = [options.pop(name) for name in ("input", "linear_weight", "target")]
        return levelhead.linear_cross_entropy(*tensors, **options)


@st.composite
def problems(draw: st.DrawFn, **fixed: Any) -> Problem:
    """Small float64 problems over every option; ``fixed`` ones are given."""
    n, d, v = draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 23))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        # Logits of a few units: neither uniform nor one-hot.
        tensor = torch.randn(*shape, generator=random, dtype=torch.float64)
        return (1.5 * tensor).requires_grad_()

    ignore_index = fixed.pop("ignore_index", None) or draw(st.sampled_from([-100, -1, 0]))
    target = torch.randint(0, v, (n,), generator=random)
    ignored = torch.rand(n, generator=random) < draw(st.sampled_from([0.0, 0.4]))
    ignored[0] = False  # one token counts, or the mean is NaN: that has tests of its own
    target = torch.where(ignored, ignore_index, target)
    target[0] = v - 1 if v - 1 != ignore_index else target[0]
    if (target == ignore_index).all():
        ignore_index = -100
    options = {
        "linear_bias": normal(v) if draw(st.booleans()) else None,
        "token_weight": (
            torch.rand(n, generator=random, dtype=torch.float64) + 0.1
            if draw(st.booleans())
            else None
        ),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "softcap": draw(st.sampled_from([None, 2.0, 30.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.0625, 1.7])),
        "z_loss": draw(st.sampled_from([0.0, 1e-2])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "impl": draw(st.sampled_from(IMPLEMENTATIONS)),
    }
    return Problem(
        normal(n, d), normal(v, d), target, ignore_index=ignore_index, **{**options, **fixed}
    )


def gradients(loss: Tensor, problem: Problem, upstream: Tensor | None = None) -> list[Tensor]:
    """Return the gradients of the parameters; ``upstream`` defaults to distinct numbers per token."""
    if upstream is None:
        steps = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype, device=loss.device)
        upstream = steps.view_as(loss)
    return list(torch.autograd.grad(loss, problem.parameters, upstream, retain_graph=True))


def assert_equal(actual: Any, expected: Any, tolerance: float = 1e-11) -> None:
    """Compare float64 results: the tolerance is rounding, a few thousand units in the last place."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
