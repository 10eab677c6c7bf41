"""What users call: train a Hugging Face causal language model with smoothed labels and without its logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

from ...ops.checks import is_dtensor
from .heads import (
    BOUND_FORWARDS,
    check_module,
    is_own_forward,
    language_model,
    linear_heads,
    original_class,
    output_heads,
    path_of_head,
    refusal,
)
from .loss_call import Objective
from .loss_head import LossHead, loss_head
from .new_call import check_call
from .options import check_options
from .patched import patched_class
from .probe import probe
from .state import PatchState, patch_state, set_patch_state

ModelT = TypeVar("ModelT", bound=nn.Module)


def patch_model(
    model: ModelT,
    smoothing: float | Tensor = 0.1,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    eval_smoothing: float = 0.0,
    eval_logits: bool = True,
) -> ModelT:
    """Make `model` train on label-smoothed cross-entropy that never forms the logits.

    A call with `labels` (or `shift_labels`) is one to train on if its loss can be differentiated
    (gradients are enabled) or the model is in training mode. It then returns the loss that
    `torch.nn.functional.cross_entropy(..., label_smoothing=smoothing)` gives on the model's logits,
    with the same gradients, and no `logits` (with `skip_logits=False`, those too). It is the mean
    over the valid tokens, or their sum over `num_items_in_batch`, in nats and float32 (float64 for
    float64 models); a batch without any gives loss 0 and zero gradients. `ignore_index` and
    `logits_to_keep` mean what they mean to the model. Every other call (under `torch.no_grad()` in
    eval mode, generate, no labels) is what it was, unless the options say otherwise.

    A call in eval mode with gradients enabled warns once, since `from_pretrained` returns a model
    in that mode: to train, call `model.train()`; to evaluate, use `torch.no_grad()`.

    What would make the loss another one is refused: here, what the model does between its head and
    its loss, and with its loss afterwards; at the call, labels, logits or options of the loss that
    the model changes on the way, and a forward or a loss function that was set after the patch. On a
    device where looking would take a host synchronisation, and in compiled code, such a change of
    labels or logits makes the loss NaN.

    The patch adds no parameter, buffer or state_dict key. Patching again looks at the model again and
    sets the options.

    Args:
        model: a Hugging Face language model, or a wrapper around one (PEFT, DDP, FSDP, DeepSpeed,
            `torch.compile`), whose head is a plain `torch.nn.Linear`; changed in place.
        smoothing: the share of probability spread evenly over the vocabulary, in [0, 1]. A 0-dim
            Tensor is kept as it is: filled in place, it changes the smoothing from step to step
            without recompilation; what it is filled with is not checked.
        temperature: T > 0 of training: the logits are divided by T, the loss is multiplied by it. A
            0-dim Tensor may change from step to step, like the smoothing; it is not trained.
            T < 1 lets the head of a small model become confident, so that smoothing has an effect.
        softcap: bound of the logits in training, > 0, for a model that has none of its own; a number or a
            0-dim Tensor, as the temperature.
        eval_smoothing: smoothing of the loss of a call in eval mode without gradients, in [0, 1].
        eval_logits: False: such a call with labels gives no logits either, and takes no memory for
            them.

    Returns:
        The same object.

    Raises:
        TypeError: an option is of another type, or `model` is no module.
        ValueError: an option lies outside its range, or the model does with its head or its loss
            what the patch could not reproduce; the message says what, and what to do.

    References:
        Huang et al. 2025, https://arxiv.org/abs/2508.00264, for smoothing, temperature and softcap.

    Example:
        >>> model = patch_model(AutoModelForCausalLM.from_pretrained(name), smoothing=0.1).train()
        >>> model(input_ids=ids, labels=ids).loss.backward()
    """
    check_options(smoothing, temperature, softcap, eval_smoothing, eval_logits)
    inner = language_model(model)
    patched = patch_state(inner) is not None
    heads = linear_heads(inner) if patched else output_heads(inner)
    probed = probe(inner)
    if softcap is not None and probed.transform.softcap is not None:
        raise refusal(
            inner,
            f"it caps its logits at {probed.transform.softcap:g} already, and softcap={softcap:g} "
            "would come on top",
            "Leave softcap out",
        )
    for head in heads:
        if not isinstance(head, LossHead):
            _become(head, loss_head(original_class(head)))
            if "forward" in vars(head) and is_dtensor(head.weight):
                vars(head)["_levelhead_forward"] = vars(head).pop("forward")
    if not patched:
        _become(inner, patched_class(original_class(inner)))
    state = PatchState(probed, smoothing, temperature, softcap, eval_smoothing, eval_logits)
    set_patch_state(inner, state)
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Undo `patch_model` exactly, also inside a wrapper; without a patch, change nothing.

    Args:
        model: what `patch_model` was given; changed in place.

    Returns:
        The same object.

    Raises:
        TypeError: `model` is no module.
        ValueError: FSDP2 or the like has changed the class of the model since it was patched.
    """
    check_module(model)
    for module in model.modules():
        if patch_state(module) is not None:
            _unpatch(module)
    return model


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
    set_patch_state(inner, replace(state, objective=objective))
    return model


@dataclass(frozen=True)
class PatchInfo:
    """The options of a patch and what it found in the model; `str()` of it says both.

    Attributes:
        model: the class of the patched language model.
        head: where its output head is, within it.
        smoothing: of `patch_model`, a number or a float32 Tensor of shape (), as the next two.
        temperature: of training, a number or a float32 Tensor of shape ().
        softcap: of training, a number, a float32 Tensor of shape (), or None.
        eval_smoothing: of calls in eval mode without gradients.
        eval_logits: whether those give logits.
        objective: what `set_objective` trains on in place of the smoothed cross-entropy, or None.
        training: whether the language model itself is in training mode, whatever its wrappers say.
        logit_scale: found in the model: the factor on the output of its head.
        own_softcap: found in the model: the cap of its logits, or None.
        vocab_size: found in the model: how many entries of its head reach its loss; None: all.
        shift: found in the model: whether it shifts its labels.
        own_loss: found in the model: whether it computes its loss, in nats, without `loss_function`.
    """

    model: str
    head: str
    smoothing: float | Tensor
    temperature: float | Tensor
    softcap: float | Tensor | None
    eval_smoothing: float
    eval_logits: bool
    objective: Any
    training: bool
    logit_scale: float
    own_softcap: float | None
    vocab_size: int | None
    shift: bool
    own_loss: bool

    def __str__(self) -> str:
        loss = "a smoothed cross-entropy" if self.objective is None else f"{self.objective!r}"
        mode = "training" if self.training else "eval"
        vocabulary = "all" if self.vocab_size is None else f"the first {self.vocab_size}"
        return (
            f"patch_model: {self.model} trains on {loss}, computed at {self.head}. It is in {mode} mode.\n"
            f"  training    smoothing={self.smoothing}, temperature={self.temperature}, "
            f"softcap={self.softcap}\n"
            f"  evaluation  smoothing={self.eval_smoothing}, logits={self.eval_logits}\n"
            f"  the model   logit_scale={self.logit_scale:g}, softcap={self.own_softcap}, "
            f"{vocabulary} of its entries, labels {'' if self.shift else 'not '}shifted, loss of "
            f"{'its own' if self.own_loss else 'transformers'}"
        )


def patch_info(model: nn.Module) -> PatchInfo | None:
    """What `patch_model` has made of `model`.

    Args:
        model: a language model, or a wrapper around one.

    Returns:
        The options of the patch and what it found in the model; None if the model is not patched.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no language model in `model`.
        RuntimeError: the patched model would refuse a call, since it was changed after the patch.

    Example:
        >>> print(patch_info(patch_model(model, smoothing=0.1)))
        patch_model: LlamaForCausalLM trains on a smoothed cross-entropy, computed at lm_head. ...
    """
    inner = language_model(model)
    state = patch_state(inner)
    if state is None:
        return None
    found = check_call(inner, state, {}).transform
    return PatchInfo(
        model=type(inner).__name__,
        head=path_of_head(inner),
        smoothing=state.smoothing,
        temperature=state.temperature,
        softcap=state.softcap,
        eval_smoothing=state.eval_smoothing,
        eval_logits=state.eval_logits,
        objective=state.objective,
        training=inner.training,
        logit_scale=found.logit_scale,
        own_softcap=found.softcap,
        vocab_size=found.vocab_size,
        shift=found.shift,
        own_loss=found.own_loss,
    )


def _unpatch(model: Any) -> None:
    original = original_class(model)
    if type(model) is not patched_class(original):
        raise ValueError(
            f"unpatch_model cannot find {original.__name__} under {type(model).__name__}, a class "
            "that the model was given after patch_model; unpatch it before fully_shard"
        )
    heads = [module for module in model.modules() if isinstance(module, LossHead)]
    for head in heads:
        if type(head) is not loss_head(original_class(head)):
            raise ValueError(
                f"unpatch_model finds a head of class {type(head).__name__}, which it was given "
                "after patch_model; undo that first (a parametrisation, or fully_shard)"
            )
    for head in heads:
        _become(head, original_class(head))
        if "_levelhead_forward" in vars(head):
            vars(head)["forward"] = vars(head).pop("_levelhead_forward")
    _become(model, original)
    set_patch_state(model, None)


def _become(module: Any, cls: Any) -> None:
    """Change the class of a module, and with it the forward that Accelerate's hooks call."""
    bound = [name for name in BOUND_FORWARDS if is_own_forward(module, vars(module).get(name))]
    module.__class__ = cls
    for name in bound:
        vars(module)[name] = MethodType(cls.forward, module)
