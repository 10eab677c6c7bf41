"""Callbacks for the Trainer of transformers: a schedule of the smoothing, and calibration as it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import TrainerCallback

from ..heads.token_calibration import TokenCalibration, summary
from .patch.state import patch_state, set_patch_state


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
        >>> trainer = Trainer(patch_model(model), arguments, train_dataset=data, callbacks=[decay])
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
            set_patch_state(module, replace(options, smoothing=self._smoothing))

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


class CalibrationCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Measures on the evaluation data, as Trainer evaluates, whether the model knows what it knows.

    Over all labelled tokens, with p the model's distribution over the next token, it adds to the
    metrics of each evaluation, before Trainer picks the best model or another callback looks:

    - `eval_ece`: the expected calibration error of the confidence max_v p_v, in [0, 1];
    - `eval_mean_confidence`, in [0, 1];
    - `eval_token_accuracy`: the share of tokens that were the likeliest, in [0, 1];
    - `eval_entropy`: the mean of -sum_v p_v log p_v, in nats.

    Confidence above accuracy is over-confidence. The model is not run again and no logits are kept:
    the forward of the evaluation itself passes the hidden states by, and one product with the head
    takes the statistics in float32, summed in float64. The model may be patched, with or without
    `eval_logits`, or not. Sums are merged over all processes; rows that a data loader repeats to
    fill its last batch count once. `Trainer.predict` gets the same, under its own prefix.

    DDP, FSDP and ZeRO are served where they serve Trainer: the product happens in the call of the
    head, where its weight is whole. torch.compile breaks its graph there, in evaluation only.
    `torch.nn.DataParallel` is refused.

    Whatever computes the loss past the head, or without labels in the model's forward, leaves
    nothing to measure, and the first evaluation says so: Liger's fused loss, Trainer's
    label_smoothing_factor, losses of TRL's SFTTrainer on an unpatched model.

    Reporters that Trainer makes of `report_to` are called before it. To have it in their logs, put
    it first: `trainer.callback_handler.callbacks.insert(0, CalibrationCallback())`.

    Args:
        bins: number of bins of equal width for the ECE.

    Raises:
        TypeError: when Trainer is made, if what it is given is no module.
        ValueError: when Trainer is made or begins, if the logits of its model are not what its head
            gives, scaled and capped, as `patch_model` needs; if `bins` is below 1.
        RuntimeError: in an evaluation, if no label came by with the hidden states, or if evaluation
            began before the callback saw the model.

    References:
        Guo et al. On calibration of modern neural networks. ICML 2017,
        https://arxiv.org/abs/1706.04599

    Example:
        >>> best = {"metric_for_best_model": "eval_ece", "greater_is_better": False}
        >>> arguments = TrainingArguments(
        ...     folder, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, **best
        ... )
        >>> trainer = Trainer(
        ...     model,
        ...     arguments,
        ...     train_dataset=data,
        ...     eval_dataset=data,
        ...     callbacks=[CalibrationCallback()],
        ... )
    """

    def __init__(self, bins: int = 10) -> None:
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        self._bins = bins
        self._watch: TokenCalibration | None = None
        self._metrics: dict[str, float] = {}  # of the last evaluation
        self._start()

    def _start(self) -> None:
        self._steps = 0
        self._sums = torch.zeros(4, self._bins, dtype=torch.float64)

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Begin to watch the model."""
        del args, state, control, kwargs
        if model is None or (self._watch is not None and self._watch.model is model):
            return
        if self._watch is not None:
            self._watch.remove()
        self._watch = TokenCalibration(model, self._bins)

    on_train_begin = on_init_end  # of a callback that was added later, or of another model

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what the forward of this step has left."""
        del args, state, control, kwargs
        if self._watch is None:
            raise RuntimeError(
                "CalibrationCallback has not seen the model before this evaluation; give it to "
                "Trainer as callbacks=[CalibrationCallback()], or train first"
            )
        sums, self._watch.sums = self._watch.sums, None
        self._steps += 1
        if sums is not None:
            self._sums += sums

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add to the metrics of an evaluation, which Trainer logs at its end."""
        del control, kwargs
        if logs is not None and self._steps and _prefix(logs) is not None:
            self._finish(args)
            self._add_to(logs)
            # Trainer has put a copy of the logs there before it calls back.
            self._add_to(state.log_history[-1])

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Add to what Trainer goes on with, if its log was a copy of that."""
        del args, state, control, kwargs
        self._add_to(metrics)

    def on_predict(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Add to the metrics of a prediction, which is not logged."""
        del state, control, kwargs
        self._finish(args)
        self._add_to(metrics)

    def _finish(self, args: Any) -> None:
        """Merge the sums of all processes."""
        sums = self._sums
        if args.world_size > 1:
            sums = sums.to(args.device)
            torch.distributed.all_reduce(sums)
        self._start()
        if not sums[0].any():
            raise RuntimeError(
                "CalibrationCallback saw no label in this evaluation with the hidden states that it "
                "belongs to. Either the data have none, or Trainer takes them away to compute the "
                "loss itself (label_smoothing_factor, compute_loss_func), or something computes the "
                "loss past the head (use_liger_kernel, or TRL on an unpatched model); leave that out"
            )
        self._metrics = summary(sums)

    def _add_to(self, metrics: dict[str, float]) -> None:
        prefix = _prefix(metrics)
        metrics.update({f"{prefix}_{name}": value for name, value in self._metrics.items()})


def _prefix(metrics: dict[str, float]) -> str | None:
    """Under which Trainer has put the metrics of an evaluation, beginning with its time."""
    names = (name for name in metrics if name.endswith("_runtime"))
    return next((name.removesuffix("_runtime") for name in names), None)
