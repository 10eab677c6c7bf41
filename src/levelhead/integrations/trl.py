"""Smoothed labels in TRL's `SFTTrainer`, which would train past the head of a patched model.

Its constructor gives the model a forward of its own, and its loss comes from that alone:
`model(..., fused_lm_head=True)` runs the backbone, multiplies by the head's weight itself, and
returns the log-probability of each label with the metrics of each token. So a patched model lets
`adapt` decide what becomes of such a forward. For an `SFTTrainer` it is one that answers the same
question from one run of the model's own forward, with minus the smoothed loss of each token as its
log-probability: loss, `num_items_in_batch`, gradient accumulation and metrics stay TRL's code.

Why nothing need be called after `SFTTrainer(...)`. An adapter that has to be asked for is one that
can be forgotten, and the model is told at the right moment anyway; `patch_trainer` is for a model
that the trainer itself has loaded, by its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..ops import linear_logit_stats
from ..ops.checks import check_target_range
from ..ops.loss import token_loss
from .callers import other_loss, trainer_of_trl, trainers_at_work
from .forward import forward_with_loss
from .heads import language_model, original_class
from .loss_call import IGNORE_INDEX, LossCall
from .patch import patch_model
from .patched import loss_call, patch_state

TrainerT = TypeVar("TrainerT")


def patch_trainer(trainer: TrainerT, smoothing: float | Tensor = 0.1, **options: Any) -> TrainerT:
    """Make an `SFTTrainer` train its model on label-smoothed cross-entropy.

    For a model that the trainer has loaded by its name, or to set the options anew; one that was
    patched before it was given to the trainer needs no more. A step then takes one forward pass
    where `label_smoothing_factor` takes two, and `entropy`, `mean_token_accuracy`, `num_tokens` and
    `aux_loss` are logged as ever. The loss of an evaluation is not smoothed unless
    `eval_smoothing` says so.

    Args:
        trainer: a `trl.SFTTrainer`, before `train`; its model is changed in place.
        smoothing: as of `levelhead.patch_model`.
        **options: further keyword arguments of `levelhead.patch_model`.

    Returns:
        The same object.

    Raises:
        TypeError: `trainer` is no `SFTTrainer`, or one of TRL's own with another loss (GKD, GOLD).
        ValueError: its `loss_type` is "dft", or `patch_model` refuses its model or an option.
        RuntimeError: it has trained in mixed precision already.

    Example:
        >>> trainer = SFTTrainer(name, arguments, train_dataset=data)  # a name, as "Qwen/Qwen3-0.6B"
        >>> trainer = patch_trainer(trainer, smoothing=0.1)  # and then trainer.train()
    """
    if trainer_of_trl(trainer) != "SFTTrainer":
        raise TypeError(
            f"patch_trainer needs a trl.SFTTrainer, got {type(trainer).__name__}; for the Trainer "
            "of transformers, patch_model(model) is all it takes"
        )
    sft: Any = trainer
    _check_loss_type(sft)
    model = language_model(sft.model)
    if "_original_forward" in vars(model):  # accelerate has put its autocast around TRL's
        raise RuntimeError(
            "patch_trainer comes too late: accelerate has prepared the model of this trainer. Call "
            "it between SFTTrainer(...) and trainer.train()"
        )
    forward = vars(model).pop("forward")  # the fused one; patch_model refuses a model that has one
    try:
        patch_model(model, smoothing, **options)
    except (TypeError, ValueError):
        vars(model)["forward"] = forward
        raise
    vars(model)["forward"] = _answering(model, forward)
    return trainer


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
    _check_loss_type(trainer)
    return _answering(model, forward)


def _check_loss_type(trainer: Any) -> None:
    if trainer.args.loss_type == "dft":
        raise ValueError(
            'SFTTrainer\'s loss_type="dft" weighs each token by its own probability, which has no '
            'smoothed counterpart. Use loss_type="nll", or unpatch_model'
        )


def _answering(model: nn.Module, forward: Any) -> Any:
    """A forward of `model` that answers `fused_lm_head=True` as long as the model is patched."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    fused: Callable[..., Any] = forward.__func__

    def answer(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if patch_state(self) is None:
            return fused(self, *args, fused_lm_head=fused_lm_head, **kwargs)
        if not fused_lm_head:
            return type(self).forward(self, *args, **kwargs)
        return _per_token(self, dict(zip(names, args, strict=False)) | kwargs)

    # As in patch.py: generate and Trainer read the signature, accelerate must not unwrap the rest.
    answer.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    return MethodType(answer, model)


def _per_token(model: Any, given: dict[str, Any]) -> Any:
    """TRL's output for a forward of the patched `model` with these arguments, labels among them."""
    from trl.trainer.utils import FusedCausalLMOutput

    given["use_cache"] = False
    call = loss_call(model, given, kind=_PerTokenCall)
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
