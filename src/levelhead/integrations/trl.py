"""Smoothed labels in TRL's `SFTTrainer`.

A model that was patched before it is given to the trainer needs nothing of this file: it takes TRL's forward for one
that smooths as it is set (see patch/trl_forward.py), since an adapter that has to be asked for can be forgotten.
`patch_trainer` is for a model that the trainer itself has loaded, by its name.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

from .patch.api import patch_model
from .patch.callers import trainer_of_trl
from .patch.heads import language_model
from .patch.trl_forward import answering, check_loss_type

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
    check_loss_type(sft)
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
    vars(model)["forward"] = answering(model, forward)
    return trainer
