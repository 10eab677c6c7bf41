"""Another training loss than the smoothed cross-entropy, in the same place: at the head, without logits.

The head of a patched model has its weight gathered (FSDP, ZeRO) inside its call, and computes the loss there. An
objective is what it computes in place of the smoothed cross-entropy: a function of the hidden states and
the head that gives a loss for each token. What else it needs are columns of the batch, which the patched forward
takes as keyword arguments and keeps from the model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from torch import nn

from .heads import language_model
from .loss_call import Objective
from .patched import patch_state

ModelT = TypeVar("ModelT", bound=nn.Module)


def set_objective(model: ModelT, objective: Objective | None) -> ModelT:
    """Make a patched model train on `objective`; None goes back to the smoothed cross-entropy.

    The loss of a training call with `labels` is then the sum of the objective's losses over the
    valid tokens, times the `temperature` of `patch_model`, over their number or
    `num_items_in_batch`. The temperature and the softcap of `patch_model` hold for it, its smoothing
    does not. Calls in eval mode without gradients are what
    they were.

    Args:
        model: what `patch_model` has patched, or a wrapper around it; changed in place.
        objective: called as `objective(input, linear_weight, target, linear_bias=..., softcap=...,
            logit_scale=..., **columns)` with hidden states `(..., T, D)` and the token to predict at
            each position, `(..., T)`, -100 for none; `columns` are the tensors of the batch that
            `objective.columns` names. Returns the loss of each token, `(..., T)`.

    Returns:
        The same object.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model is not patched.

    Example:
        >>> model = set_objective(patch_model(model), Distillation("renormalised"))
        >>> batch = {"input_ids": ids, "labels": ids, "teacher_ids": top.indices}
        >>> loss = model(**batch, teacher_log_probs=top.log_probs).loss
    """
    inner = language_model(model)
    state = patch_state(inner)
    if state is None:
        raise ValueError(
            f"set_objective needs a patched model, and {type(inner).__name__} is not; call "
            "levelhead.patch_model(model) first"
        )
    vars(inner)["_levelhead"] = replace(state, objective=objective)
    return model
