"""What the Trainer of transformers takes beyond a patched model: a schedule of its smoothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import TrainerCallback

from .patch import patch_state


class SmoothingSchedule(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Changes the smoothing of a patched model as training goes on, without recompiling it.

    Works in every trainer that takes the callbacks of transformers. From the beginning of training
    the smoothing is a 0-dim tensor on the model's device, which each step fills anew; the other
    options of `patch_model` stay. Training that resumes from a checkpoint goes on where the schedule
    was. The value is logged as `smoothing`; after training the last one stays in place.

    Args:
        schedule: the smoothing in [0, 1] for the share of the training steps that have been taken:
            0 in the first step, 1 - 1 / max_steps in the last one.

    Raises:
        ValueError: at the beginning of training, if the model is not patched; at the beginning of
            a step, if `schedule` gives a value outside [0, 1].

    Example:
        >>> warm_up = SmoothingSchedule(lambda progress: 0.1 * min(1, progress / 0.05))
        >>> decay = SmoothingSchedule(lambda progress: 0.05 * (1 + math.cos(math.pi * progress)))
        >>> Trainer(model=patch_model(model), args=args, train_dataset=data, callbacks=[decay])
    """

    def __init__(self, schedule: Callable[[float], float]) -> None:
        self._schedule = schedule
        self._smoothing: Any = None  # () float32, the one the model holds
        self._value = 0.0  # of the tensor, which would cost a synchronisation to read

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Give the patched model, maybe inside wrappers, a tensor for its smoothing."""
        del args, state, control, kwargs
        patched = [module for module in model.modules() if patch_state(module) is not None]
        if not patched:
            raise ValueError(
                f"SmoothingSchedule found no patched model in the {type(model).__name__} to be "
                "trained; call levelhead.patch_model(model) before the trainer is built"
            )
        self._smoothing = torch.zeros((), device=patched[0].device)
        for module in patched:
            options: Any = patch_state(module)
            vars(module)["_levelhead"] = replace(options, smoothing=self._smoothing)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the smoothing of the optimiser step that begins."""
        del args, control, kwargs
        progress = state.global_step / state.max_steps
        self._value = float(self._schedule(progress))
        if not 0 <= self._value <= 1:
            raise ValueError(
                f"the schedule of SmoothingSchedule gave {self._value} for progress {progress:.6g}; "
                "a smoothing must lie in [0, 1]"
            )
        self._smoothing.fill_(self._value)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the smoothing to what is logged about a training step."""
        del args, control, kwargs
        if logs is not None and "loss" in logs:
            logs["smoothing"] = self._value
            # Trainer has put a copy of the logs there before it calls back.
            state.log_history[-1]["smoothing"] = self._value
