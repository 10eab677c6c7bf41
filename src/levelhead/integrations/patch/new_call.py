"""What a call of a patched model must do about its loss, and what it is refused for before it begins."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.checks import IGNORE_INDEX
from .callers import refuse_missing_logits, refuse_other_losses
from .heads import class_path, inner_heads
from .loss_call import LossCall, NoLoss
from .loss_head import LossHead
from .probe import code_of, probe, read_by
from .probe_loss import loss_source
from .reads import watched
from .state import PatchState, patch_state, set_patch_state


def trains(model: nn.Module) -> bool:
    """Return whether a call of `model` is one to train on: gradients are enabled, or the mode is training."""
    return model.training or torch.is_grad_enabled()


def new_call(
    model: Any,
    given: dict[str, Any],
    *,
    skip_logits: bool | None = True,
    columns: Mapping[str, Tensor] | None = None,
    kind: type[LossCall] = LossCall,
) -> LossCall | NoLoss:
    """Return what a forward with these arguments must do about its loss, and refuse calls that cannot be served."""
    state = patch_state(model)
    if state is None:
        return NoLoss.LEFT_ALONE
    labels: Any = given.get("labels")
    shift_labels: Any = given.get("shift_labels")
    training = trains(model)
    if labels is None and shift_labels is None:
        if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            refuse_other_losses(model)
            _warn_of_missing_labels(model)
        return NoLoss.WITHOUT_LABELS
    ignore_index = given.get("ignore_index", IGNORE_INDEX)
    _check_types(labels=labels, shift_labels=shift_labels)
    if type(ignore_index) is not int:
        raise TypeError(
            f"ignore_index must be an int, got {ignore_index!r}; {IGNORE_INDEX} is the default"
        )
    if skip_logits is None:
        skip_logits = training or not state.eval_logits
        if skip_logits and not training and not torch.compiler.is_compiling():
            refuse_missing_logits(model)
    alone = not training and not skip_logits and state.eval_smoothing == 0
    if alone and labels is not None:
        return NoLoss.LEFT_ALONE
    if training and not model.training:
        _warn_of_eval_mode(model)
    state = check_call(model, state, given)
    objective = state.objective if training else None
    columns = dict(columns or {})
    if objective is not None and len(columns) < len(objective.columns):
        raise ValueError(
            f"the objective of the patched {type(model).__name__} needs {objective.columns} in every "
            f"training batch, and this one has {tuple(columns)}; pass them to the model beside its "
            "labels (Trainer does with remove_unused_columns=False)"
        )
    target = _target(labels, shift_labels, state.transform.shift, ignore_index)
    if labels is None:
        labels = target  # without labels a model does not ask for its loss
    return kind(
        transform=state.training_transform() if training else state.transform,
        own=state.transform,
        smoothing=state.smoothing if training else state.eval_smoothing,
        factor=state.temperature if training else 1.0,
        target=target,
        num_items=given.get("num_items_in_batch"),
        labels=labels,
        shift_labels=shift_labels,
        ignore_index=ignore_index,
        honoured=state.probed.loss_options,
        kept=state.probed.returns_loss,
        keep_logits=not skip_logits,
        objective=objective,
        columns=columns,
    )


def _check_types(**labels: Any) -> None:
    """Refuse labels that are not tensors."""
    for name, value in labels.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a tensor of ids, got {type(value).__name__}; torch.as_tensor makes one"
            )


def _target(labels: Any, shift_labels: Any, shift: bool, ignore_index: int) -> Tensor:
    """Return the token to predict at each position, -100 for none."""
    target: Tensor = labels if shift_labels is None else shift_labels
    if shift and shift_labels is None:
        target = F.pad(target, (0, 1), value=IGNORE_INDEX)[..., 1:]
    if ignore_index != IGNORE_INDEX:
        target = target.masked_fill(target.long() == ignore_index, IGNORE_INDEX)
    return target


def check_call(model: Any, state: PatchState, given: dict[str, Any]) -> PatchState:
    """Return the patch of a model, probed again if something it depends on has changed; refuse what it cannot serve."""
    name = type(model).__name__
    if "_is_replica" in vars(model):
        raise RuntimeError(
            "a patched model does not run under torch.nn.DataParallel, which averages the losses of "
            "its replicas without regard to how many labels each has; use "
            "torch.nn.parallel.DistributedDataParallel"
        )
    for head in inner_heads(model, state.probed.head_path):
        if not isinstance(head, LossHead):
            raise RuntimeError(
                f"the head of the patched {name} is of class {class_path(head)} now: it was replaced or "
                "wrapped after patch_model (by an adapter, quantisation or "
                "resize_token_embeddings), and the loss would be another. Undo that, or call "
                "patch_model again; to train the head beside an adapter, list it "
                "in modules_to_save"
            )
    own, kind = loss_source(model)
    if own is not state.probed.loss_source[0] or kind != state.probed.loss_source[1]:
        raise RuntimeError(
            f"the loss_function of the patched {name} was replaced after patch_model, whose loss is "
            "another one. Call patch_model again to have it looked at, or use unpatch_model to train "
            "with it"
        )
    # A compiler cannot trace the probe; it guards on what the model's own forward reads.
    if torch.compiler.is_compiling():
        _check_compiled(model, state)
    else:
        state = _looked_at_again(model, state)
    known = state.probed.forward_arguments
    if known is not None:
        # Not by subtraction: torch 2.11 cannot trace that, and this is traced.
        unknown = sorted(name for name in given if name not in known)
        if unknown:
            raise RuntimeError(
                f"the patched {name} computes its loss itself, and {unknown[0]} may change it in a way "
                "that patch_model does not know. Leave it out, or use unpatch_model"
            )
    if state.transform.own_loss and given.get("ignore_index", IGNORE_INDEX) != IGNORE_INDEX:
        raise RuntimeError(
            f"the patched {name} computes its loss itself, without ignore_index. Set labels that do not "
            f"count to {IGNORE_INDEX}"
        )
    if not state.probed.takes_shift_labels and given.get("shift_labels") is not None:
        raise RuntimeError(
            f"the patched {name} computes its loss from labels, and shift_labels would not change it. "
            "Pass labels alone, or use unpatch_model"
        )
    return state


def _check_compiled(model: Any, state: PatchState) -> None:
    """Refuse a loss of the user's whose code reads a value that has changed, or one that no compiler can watch."""
    plain, other = state.probed.compiled_reads
    for in_config, name, value in plain:
        if getattr(model.config if in_config else model, name, None) != value:
            other = name
    if other is not None:
        raise RuntimeError(
            f"the loss of the patched {type(model).__name__} is not transformers' own, and in compiled code "
            f"nothing tells whether {other}, which it can read, has changed. Call patch_model again if it "
            "has; else let the loss read numbers of the model or its config alone, or do not compile it"
        )


def _looked_at_again(model: Any, state: PatchState) -> PatchState:
    """Return the patch of a model, probed again if something that its loss may depend on has changed."""
    before = state.probed
    if (
        (state.seen.is_same(model) or _is_as_probed(model, state))
        and code_of(model) == before.code
        and (before.reads is None or before.reads == read_by(model, state.transform, before.code))
    ):
        return state
    probed = probe(model)
    # A value that changes without effect, such as a count of steps, is no reason to probe again. A value that the code
    # of a loss reads stays one: it may have an effect later.
    no_matter = state.no_matter
    if replace(probed, watched={}) == replace(before, watched={}):
        old, new = _flat(before.watched, state), _flat(probed.watched, state)
        no_matter |= {n for n, v in new.items() if old.get(n, v) != v}
    looks = state.looks + (probed.reads != before.reads)
    if looks == _MANY_LOOKS:
        name = next(n for n, v in (probed.reads or {}).items() if (before.reads or {}).get(n) != v)
        warnings.warn(
            f"the patched {type(model).__name__} has been looked at anew {looks} times, which takes time: {name} "
            "changes, which the code of its loss may read. Keep it where that does not",
            stacklevel=4,
        )
    state = replace(state, probed=probed, no_matter=no_matter, looks=looks)
    set_patch_state(model, state)
    return state


def _is_as_probed(model: Any, state: PatchState) -> bool:
    """Return whether no number that matters has changed since the model was probed."""
    found, before = watched(model), state.probed.watched
    same = found == before or _flat(found, state) == _flat(before, state)
    if same:
        state.seen.take(model)
    return same


def _flat(found: dict[str, dict[str, Any]], state: PatchState) -> dict[tuple[str, str], Any]:
    """Return what was watched, by place and name, without what does not matter."""
    flat = {(place, name): v for place, kept in found.items() for name, v in kept.items()}
    return {name: v for name, v in flat.items() if name not in state.no_matter}


# A model whose loss reads a value that changes is probed again; after so many times a warning says so.
_MANY_LOOKS = 5

# Patched models that have warned of a training call without labels, and of one in eval mode.
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_warned_of_mode: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _warn_of_missing_labels(model: nn.Module) -> None:
    _warn_once(
        _warned,
        model,
        f"the patched {type(model).__name__} was called in training mode without labels, and "
        "gave logits without smoothing. If Trainer took the labels away, for its "
        "label_smoothing_factor or compute_loss_func, it computes the loss from all logits: "
        "leave those out, patch_model smooths by itself",
    )


def _warn_of_eval_mode(model: nn.Module) -> None:
    if torch.compiler.is_compiling():
        _warn_of_compiled_eval_mode(type(model).__name__)
    else:
        _warn_once(_warned_of_mode, model, _eval_mode(type(model).__name__))


def _warn_of_compiled_eval_mode(name: str) -> None:
    """Warn while a call is being compiled: the compiler runs this then, and not in later calls."""
    warnings.warn(_eval_mode(name), stacklevel=2)


# What torch.compiler.assume_constant_result does, without loading the compiler.
_warn_of_compiled_eval_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _eval_mode(name: str) -> str:
    return (
        f"the patched {name} was called with labels in eval mode, with gradients enabled: that "
        "counts as training, so its loss is smoothed, and there are no logits. To train, call model.train() first; "
        "to evaluate, use torch.no_grad()"
    )


def _warn_once(warned: weakref.WeakSet[nn.Module], model: nn.Module, message: str) -> None:
    if model not in warned:
        warned.add(model)
        warnings.warn(message, stacklevel=5)
