"""What becomes of a forward that TRL sets on a patched model, past whose head it would train.

`SFTTrainer` gives its model a forward of its own, and its loss comes from that alone: `model(..., fused_lm_head=True)`
runs the backbone, multiplies by the head's weight itself, and returns the log-probability of each label with the
metrics of each token. A patched model takes in its place one that answers the same question from one run of the model's
own forward, with minus the smoothed loss of each token as its log-probability: loss, `num_items_in_batch`, gradient
accumulation and metrics stay TRL's code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import linear_logit_stats
from ...ops.checks import IGNORE_INDEX, check_target_range
from ...ops.loss import token_loss
from .callers import other_loss, trainer_of_trl, trainers_at_work
from .forward import forward_with_loss
from .heads import original_class
from .loss_call import LossCall
from .new_call import new_call
from .state import patch_state


def adapt(model: nn.Module, forward: Any) -> Any:
    """What a patched `model` takes for its forward where TRL sets `forward`, as its fused head.

    Args:
        model: a patched model.
        forward: the method that `trl.trainer.utils.add_fused_lm_head` has made for it.

    Returns:
        The method to set in its place, which answers `fused_lm_head=True` as long as the model is patched.

    Raises:
        ValueError: the `loss_type` of the `SFTTrainer` is "dft".
        RuntimeError: it is not an `SFTTrainer` that sets it. Others want log-probabilities or
            hidden states for losses that are no cross-entropy.
    """
    # That whose constructor sets the forward, or whose step does: TRL does not tell the model.
    trainer, _ = next(trainers_at_work(), (None, None))
    name = trainer_of_trl(trainer)
    if name != "SFTTrainer":
        raise other_loss(model, name or "add_fused_lm_head")
    check_loss_type(trainer)
    return answering(model, forward)


def check_loss_type(trainer: Any) -> None:
    """Refuse a loss of `SFTTrainer` that has no smoothed counterpart."""
    if trainer.args.loss_type == "dft":
        raise ValueError(
            'SFTTrainer\'s loss_type="dft" weighs each token by its own probability, which has no '
            'smoothed counterpart. Use loss_type="nll", or unpatch_model'
        )


def answering(model: nn.Module, forward: Any) -> Any:
    """A forward of `model` that answers `fused_lm_head=True` as long as the model is patched."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    fused: Callable[..., Any] = forward.__func__

    def answer(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if patch_state(self) is None:
            return fused(self, *args, fused_lm_head=fused_lm_head, **kwargs)
        if not fused_lm_head:
            return type(self).forward(self, *args, **kwargs)
        return _per_token(self, dict(zip(names, args, strict=False)) | kwargs)

    # As in patched.py: generate and Trainer read the signature, accelerate must not unwrap the rest.
    answer.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    return MethodType(answer, model)


def _per_token(model: Any, given: dict[str, Any]) -> Any:
    """TRL's output for a forward of the patched `model` with these arguments, labels among them."""
    from trl.trainer.utils import FusedCausalLMOutput

    given["use_cache"] = False
    call = new_call(model, given, kind=_PerTokenCall)
    if not isinstance(call, _PerTokenCall):
        raise ValueError("a forward with fused_lm_head=True needs labels")
    output = forward_with_loss(model, call, original_class(model).forward, given)
    # TRL has no entry for the last position, unless it was given the labels shifted.
    width = None if given.get("shift_labels") is not None else -1
    return FusedCausalLMOutput(
        loss=output.loss,
        log_probs=-call.losses[..., :width],
        entropy=call.entropy[..., :width],
        is_top1=call.is_top1[..., :width],
        label_mask=(call.target != IGNORE_INDEX)[..., :width],
        aux_loss=output.get("aux_loss"),
    )


@dataclass
class _PerTokenCall(LossCall):
    """A forward that also leaves the loss of each token, and TRL's metrics of what it trains on."""

    losses: Any = None  # (..., T), zero where ignored, like the two below
    entropy: Any = None  # nats, no gradient
    is_top1: Any = None

    def compute(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
    ) -> Tensor:
        """The smoothed loss of `hidden` (..., T, D), as TRL sums it; each token's goes to `losses`."""
        counts = target != IGNORE_INDEX
        # TRL reads a number off the device each step anyway; a graph cannot have such a shape.
        compact = not torch.compiler.is_compiling()
        ids = target[counts] if compact else target
        check_target_range(target, len(weight), IGNORE_INDEX)
        stats = linear_logit_stats(
            hidden[counts] if compact else hidden,
            weight,
            ids,
            linear_bias=bias,
            softcap=self.transform.softcap,
            logit_scale=self.transform.logit_scale,
        )

        def place(values: Tensor) -> Tensor:
            if not compact:
                return values.masked_fill(~counts, 0)
            # Connected to the model even without a single label, where the gradient is zero.
            return values.new_zeros(counts.shape).masked_scatter(counts, values)

        smoothing: Any = self.smoothing
        losses = token_loss(
            stats.max, stats.relative_logsumexp, stats.picked, stats.relative_mean, smoothing, 0.0
        )
        # The statistics take a target that is no id for one that picks nothing.
        losses = losses.masked_fill((ids < 0) | (ids >= len(weight)), torch.nan)
        self.losses = place(self.factor * losses)
        self.entropy = place(stats.entropy.detach())
        self.is_top1 = place(stats.argmax == ids)
        items = torch.as_tensor(counts.sum() if self.num_items is None else self.num_items)
        loss: Tensor = self.losses.sum() / items.to(target.device).clamp(min=1)
        return loss

    def lead_through(self, anchor: Tensor) -> None:
        """Lead the loss of each token, too, through the head's output."""
        self.losses = self.losses + anchor
