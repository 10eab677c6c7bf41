"""Find the trainer that calls a patched model.

A trainer tells its model nothing about itself, so the call stack is the only place to see it. The stack is searched
only where a call would otherwise train without smoothing, or lack logits that the caller needs: a training step with
labels does not pay for it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn


def trainers_at_work() -> Iterator[tuple[Any, FrameType]]:
    """Yield the `transformers.Trainer` objects whose methods are running, innermost first, and their frames."""
    module = sys.modules.get("transformers.trainer")  # None: no Trainer exists
    frame = inspect.currentframe() if module is not None else None
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, module.Trainer):  # type: ignore[union-attr]
            yield trainer, frame
        frame = frame.f_back


def trainer_of_trl(trainer: object) -> str | None:
    """Return the name of the class of TRL that `trainer` is, or is derived from; None: it is not TRL's."""
    classes = (cls for cls in type(trainer).__mro__ if cls.__module__.partition(".")[0] == "trl")
    return next((cls.__name__ for cls in classes), None)


def refuse_other_losses(model: nn.Module) -> None:
    """Refuse a training call without labels by a trainer of TRL other than SFTTrainer.

    Raises:
        RuntimeError: the loss is one that TRL makes of the logits, and would not be smoothed.
    """
    trainer, _ = next(trainers_at_work(), (None, None))
    name = trainer_of_trl(trainer)
    if name is not None and name != "SFTTrainer":
        raise other_loss(model, name)


def other_loss(model: nn.Module, name: str) -> RuntimeError:
    """Return the error for a trainer of TRL whose loss cannot be smoothed."""
    return RuntimeError(
        f"the patched {type(model).__name__} cannot train with {name} of TRL, whose loss is not the "
        "cross-entropy of labels: it would not be smoothed. Use unpatch_model first; of the "
        "trainers of TRL, SFTTrainer is served"
    )


def refuse_missing_logits(model: nn.Module) -> None:
    """Refuse an evaluation without logits if Trainer needs them.

    Raises:
        RuntimeError: Trainer is to give them to `compute_metrics`, or to return them from `predict`.
    """
    for _, frame in trainers_at_work():
        # Only Trainer's own method: one of a user's, or one that generates, may need the loss alone.
        if frame.f_code is sys.modules["transformers.trainer"].Trainer.prediction_step.__code__:
            if not frame.f_locals.get("prediction_loss_only", True):
                raise RuntimeError(
                    f"the patched {type(model).__name__} has eval_logits=False, but Trainer wants "
                    "its logits, for compute_metrics or to return them as predictions. Call "
                    "patch_model(model, ..., eval_logits=True), or leave compute_metrics out and "
                    "set prediction_loss_only=True"
                )
            return
