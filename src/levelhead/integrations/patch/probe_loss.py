"""Check that the loss of a model is the cross-entropy of its tokens and nothing else; refuse it if not."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import original_class, path_of_head, refusal
from .hollow import (
    HollowRun,
    is_builtin,
    is_mapping,
    is_of_users,
    normal,
    output_field,
    output_fields,
    plain,
    run_hollow,
)

_REMEDY = "The patch would replace its loss by one that differs; train it without the patch"

# A probe of code that is part of transformers has this many tokens. One of any other code has this many logits, so that
# with up to 2048 vocabulary entries every entry is a label.
_TOKENS = 16
_LOGITS = 2**22

# Arguments of every loss function of transformers, whose meaning the patch knows.
_KNOWN = {"logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels"}


def shifts_labels(model: Any, path: str, head: nn.Linear, vocab_size: int) -> bool:
    """Whether the `loss_function` of a model shifts the labels.

    Raises:
        ValueError: other labels reach it than the model is given, or it is no cross-entropy.
    """
    function = loss_function(model)
    tokens = _TOKENS if is_builtin(function) else max(_TOKENS, _LOGITS // vocab_size)
    labels = _labels(model, vocab_size, tokens)
    few = labels[:, :_TOKENS]  # all labels would take V hidden states
    run = _run(model, path, head, few)
    if not isinstance(run.labels, Tensor) or not torch.equal(run.labels.cpu(), few):
        raise refusal(model, "the labels do not reach its loss_function unchanged", _REMEDY)
    logits = normal(*labels.shape, vocab_size, seed=3).float()

    def loss(logits: Tensor, labels: Tensor, num_items: int | None = None) -> Tensor:
        # Left out if it is None, as a call does: the function may have a default of its own.
        options = run.options | ({} if num_items is None else {"num_items_in_batch": num_items})
        try:
            got = function(logits=logits, labels=labels, vocab_size=vocab_size, **options)
            return torch.as_tensor(got)
        except Exception as error:
            reason = f"its loss_function failed on a probe ({type(error).__name__}: {error})"
            remedy = (
                "It must take logits, labels, vocab_size and num_items_in_batch=None by name, and **kwargs; "
                "or train this model without the patch"
            )
            raise refusal(model, reason, remedy) from error

    shift = _shifts(model, loss(logits, labels), logits, labels)
    want = _cross_entropy(logits, labels, shift, reduction="sum") / 4
    got = loss(logits, labels, 4)
    if not torch.allclose(got.double(), want, rtol=1e-5):
        reason = (
            f"its loss_function gives {got:.6g} for 4 items where the cross-entropy is {want:.6g}"
        )
        raise refusal(model, reason, _REMEDY)
    if not is_builtin(function):
        few = _labels(model, vocab_size, _TOKENS)
        _check_far(model, lambda z: (loss(z.float(), few), z), few, shift, vocab_size, vocab_size)
    return shift


def shifts_labels_itself(model: Any, path: str, head: nn.Linear, vocab_size: int) -> bool:
    """Whether a model that computes its loss without `loss_function` shifts the labels.

    Raises:
        ValueError: the loss is no cross-entropy, or more than that depends on the labels.
    """
    builtin = is_builtin(original_class(model).forward)
    tokens = _TOKENS if builtin else max(_TOKENS, _LOGITS // vocab_size)
    labels = _labels(model, vocab_size, tokens)
    run = _run(model, path, head, labels)
    loss = plain(output_field(run.output, "loss"))
    if run.output is not None:
        _check_known(model, run.output)
    if not isinstance(loss, Tensor) or not isinstance(run.logits, Tensor):
        reason = "its loss does not go through loss_function, and its output has no loss and logits"
        raise refusal(model, reason, _REMEDY)
    seq2seq = getattr(model.config, "is_encoder_decoder", False)
    if seq2seq and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        reason = (
            "it makes the inputs of its decoder from the labels inside its forward, and has no "
            "prepare_decoder_input_ids_from_labels with which patch_model could"
        )
        raise refusal(model, reason, _REMEDY)
    shift = _shifts(model, loss, run.logits, labels)
    few = _labels(model, vocab_size, _TOKENS)
    own, again = (_run(model, path, head, few) for _ in range(2))
    withheld = _run(model, path, head, few, withheld=True)
    _check_same_inputs(model, own.inputs, withheld.inputs)
    if not isinstance(withheld.logits, Tensor) or not torch.equal(withheld.logits, own.logits):
        raise refusal(
            model,
            "it computes its loss itself, and without labels its logits are not where they are with them",
            "Return an output class, or (loss, logits) with None for the loss if there are no labels",
        )
    if not builtin:
        _check_same_state(model, own, withheld, again)
        hidden = normal(*few.shape, head.in_features, seed=7)

        def far(z: Tensor) -> tuple[Any, Any]:
            found = run_hollow(model, path, z, hidden, few)
            return plain(output_field(found.output, "loss")), found.logits

        _check_far(model, far, few, shift, vocab_size, head.out_features)
    return shift


def _check_far(
    model: Any,
    loss: Callable[[Tensor], tuple[Any, Any]],
    labels: Tensor,
    shift: bool,
    vocab_size: int,
    width: int,
) -> None:
    """Refuse a loss of the user's that is the cross-entropy for ordinary logits only, or has another gradient.

    It may bound logits or losses, or leave out tokens that are far off or already right. `loss` maps the output of a
    head, (B, T, `width`), to the loss and the logits that it was computed from.
    """
    target = F.pad(labels, (0, 1), value=-100)[:, 1:] if shift else labels
    right = F.one_hot(target.clamp(min=0), width)
    z = normal(*labels.shape, width, seed=8)
    for numbers in (100 * z, z + (math.log(vocab_size) + 5) * right):
        leaf = numbers.requires_grad_()
        got, logits = loss(leaf)
        want = _cross_entropy(logits, labels, shift, "mean")
        near = torch.allclose(got.double(), want, rtol=1e-4, atol=1e-4)  # float32 of logits of 20
        if not near or not got.requires_grad:
            reason = f"its loss is {got:.6g} where the cross-entropy is {want:.6g}"
            raise refusal(model, reason, _REMEDY)
        (wanted,) = torch.autograd.grad(want, leaf, retain_graph=True)
        (slope,) = torch.autograd.grad(got, leaf, allow_unused=True)
        if slope is None or (slope - wanted).abs().max() > 1e-3 * wanted.abs().max():
            raise refusal(model, "the gradient of its loss is not that of a cross-entropy", _REMEDY)


def returns_loss(model: Any, head: nn.Linear) -> bool:
    """Return whether a model always returns the loss that its loss function gives, and adds nothing to it.

    Code of transformers may add its router losses, which do not depend on the logits.

    Raises:
        ValueError: what it adds, or something else in its output, depends on the logits. In training there are none.
    """
    path = path_of_head(model)
    with torch.inference_mode(False), torch.device("cpu"), torch.enable_grad():
        labels = torch.tensor([[1, -100, 0], [-100, 0, 1]])
        z = normal(*labels.shape, head.out_features, seed=4).requires_grad_()
        # Logits that are right for every label, shifted or not, move an accuracy that the model may compute.
        right = [F.one_hot(y.clamp(min=0), head.out_features) for y in (labels, labels.roll(-1, 1))]
        hidden = normal(*labels.shape, head.in_features, seed=5)
        run = run_hollow(model, path, z, hidden, labels, past_loss=True)
        _check_known(model, run.output)
        loss = output_field(run.output, "loss")
        if run.leaf is None or not isinstance(loss, Tensor) or not loss.requires_grad or loss.dim():
            reason, remedy = "its forward does not return what its loss_function gives", _REMEDY
            if type(run.output) is tuple and any(x is run.returned for x in run.output[1:]):
                reason, remedy = (
                    "the loss does not come first in its tuple",
                    "Return (loss, logits)",
                )
            raise refusal(model, reason, remedy)
        factor, slope = torch.autograd.grad(loss, (run.leaf, z), allow_unused=True)
        if factor is None or factor != 1:
            got = 0.0 if factor is None else factor.item()
            raise refusal(model, f"it multiplies its loss by {got:.6g}", _REMEDY)
        moved = []
        for other in (-z.detach(), *(9.0 * z.detach().abs().amax() * hot for hot in right)):
            again = run_hollow(model, path, other, hidden, labels, past_loss=True)
            moved += _differences(_fields(run) | run.left, _fields(again) | again.left)
        if moved:  # what differs between equal runs, such as a time, does not depend on the logits
            again = run_hollow(model, path, z, hidden, labels, past_loss=True)
            anyway = _differences(_fields(run) | run.left, _fields(again) | again.left)
            moved = [name for name in moved if name not in anyway]
        if slope is not None and slope.any():
            moved.insert(0, "loss")
    if moved:
        raise refusal(
            model,
            f"it makes more of its logits than its loss: its {moved[0]} depends on them, and in training "
            "there are none",
            "Leave that out (set the coefficient of a term of the loss to 0), or train it without the patch",
        )
    return loss is run.returned and not is_builtin(original_class(model).forward)


def _run(
    model: Any, path: str, head: nn.Linear, labels: Tensor, *, withheld: bool = False
) -> HollowRun:
    z = normal(*labels.shape, head.out_features, seed=6)
    hidden = normal(*labels.shape, head.in_features, seed=7)
    return run_hollow(model, path, z, hidden, labels, withheld=withheld)


def _labels(model: Any, vocab_size: int, tokens: int) -> Tensor:
    """Return labels for a probe, (2, T): special tokens, the first and last ids, random ones, and some ignored."""
    generator = torch.Generator().manual_seed(0)
    special = [token for token in _special_tokens(model.config) if 0 <= token < vocab_size]
    first = list(dict.fromkeys([*special, 0, 1, vocab_size - 1]))
    others = torch.randperm(vocab_size, generator=generator)[: max(tokens - len(first), 2)]
    ids = torch.cat([torch.tensor(first), others])
    most = -(-2 * len(ids) // 3)  # rows differ in length, so that a mean over rows of means shows
    labels = torch.full((2, most + 2), -100)
    labels[0, 1 : most + 1] = ids[:most]  # shifted labels do not use position 0
    labels[1, 2 : len(ids) - most + 2] = ids[most:]
    return labels


def few_labels(vocab_size: int) -> Tensor:
    """Return labels 0 and 1, and some ignored, (2, T): fewer for a large vocabulary, whose logits take memory."""
    index = torch.arange(2 * min(64, max(8, 2**18 // vocab_size)))
    return torch.where(index % 3 == 1, -100, index % 2).view(2, -1)


def _special_tokens(config: Any) -> list[int]:
    """The ids that a config, and those within it, give to tokens."""
    found = []
    for name, value in vars(config).items():
        if hasattr(value, "to_diff_dict"):
            found += _special_tokens(value)
        elif isinstance(value, int) and name.endswith(("_token_id", "_token_index")):
            found.append(value)
    return found


def loss_function(model: Any) -> Any:
    """Return the loss function that a model would use without the patch."""
    return original_class(model).loss_function.fget(model)


def loss_source(model: Any) -> tuple[Any, str | None]:
    """Return what decides on the loss function of a model: one that was set on it, and its `loss_type`."""
    # Not vars(model).get: compiled code would have no guard on that.
    set_on_it = model._loss_function if hasattr(model, "_loss_function") else None
    return set_on_it, model.loss_type if hasattr(model, "loss_type") else None


def loss_options(function: Any) -> frozenset[str] | None:
    """Return the arguments of a loss function that change it in a way the patch does not know; None: any may."""
    if not is_builtin(function):
        return None
    # Arguments that a loss function of transformers does not name do not reach its cross-entropy.
    return frozenset(inspect.signature(function).parameters.keys() - _KNOWN)


def takes_shift_labels(function: Any) -> bool:
    """Return whether a loss function uses `shift_labels` in place of labels that it shifts."""
    return "shift_labels" in inspect.signature(function).parameters


def forward_arguments(model: Any) -> frozenset[str] | None:
    """Return the arguments that do not change the loss of a model that computes it itself; None: no argument does.

    Code of transformers is known. For a class of the user's, they are the arguments of the class of
    transformers that it is derived from.
    """
    cls = original_class(model)
    if is_builtin(cls.forward):
        return None
    names = {"num_items_in_batch", "return_dict", "output_attentions", "output_hidden_states"}
    for base in cls.__mro__:
        if "forward" in vars(base) and is_builtin(base.forward):
            return frozenset(names | set(inspect.signature(base.forward).parameters))
    return frozenset(names | {"input_ids", "attention_mask", "position_ids", "labels", "use_cache"})


def _check_known(model: nn.Module, output: Any) -> None:
    """Refuse a forward whose output is of no kind in which the loss can be set."""
    is_tuple = type(output) is tuple or hasattr(output, "_replace")
    if not (is_tuple or is_mapping(output) or dataclasses.is_dataclass(output)):
        reason = f"its forward returns a {type(output).__name__}"
        raise refusal(model, reason, "Return an output class, a dictionary or a tuple")


def _fields(run: HollowRun) -> dict[str, Any]:
    """Return what a forward returned, by name, without its logits."""
    fields = output_fields(run.output)
    return {name: value for name, value in fields.items() if name != "logits"}


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of the entries in which two dictionaries of numbers, tensors and containers differ."""
    return [name for name in one if name not in other or not _same(one[name], other[name], 8)]


def _same(one: Any, other: Any, depth: int) -> bool:
    if one is other or not depth or isinstance(one, nn.Module):
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.is_meta:
            return one.shape == other.shape
        return bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, (bool, int, float)) and isinstance(other, (bool, int, float)):
        return one == other
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        parts = (_same(a, b, depth - 1) for a, b in zip(one, other, strict=False))
        return len(one) == len(other) and all(parts)
    if is_of_users(type(one)) and not isinstance(one, dict):
        one, other = getattr(one, "__dict__", {}), getattr(other, "__dict__", {})
    if isinstance(one, dict):
        parts = (_same(part, other.get(name), depth - 1) for name, part in one.items())
        return len(one) == len(other) and all(parts)
    return True


def _check_same_state(
    model: nn.Module, own: HollowRun, withheld: HollowRun, again: HollowRun
) -> None:
    """Refuse a model of the user's that does more with its labels than its loss: the patch would not do it."""
    asked = sorted(own.asked - withheld.asked)
    if asked:
        raise refusal(
            model,
            f"it computes its loss itself, and reads {asked[0]} for that, where a call may leave something",
            "Give its logits and labels to self.loss_function and add the rest to what that returns, or train it "
            "without the patch",
        )
    left = _differences(own.left, withheld.left)
    left = [name for name in left if name not in _differences(own.left, again.left)]
    if left:
        raise refusal(
            model,
            f"it computes its loss itself, and with labels it also changes its {left[0]}, which the patch would not do",
            "Give its logits and labels to self.loss_function, or train it without the patch",
        )


def _check_same_inputs(model: nn.Module, own: list[Any], withheld: list[Any]) -> None:
    """Refuse a model that makes more of its labels than `withhold_labels` does."""

    def tensors(calls: list[Any]) -> list[dict[Any, Tensor]]:
        named = ({**dict(enumerate(args)), **kwargs} for args, kwargs in calls)
        return [{k: v for k, v in call.items() if isinstance(v, Tensor)} for call in named]

    a, b = tensors(own), tensors(withheld)
    if len(a) != len(b) or any(
        x.keys() != y.keys() or not all(torch.equal(x[name], y[name]) for name in x)
        for x, y in zip(a, b, strict=True)
    ):
        raise refusal(
            model,
            "it computes its loss itself, and more than its decoder_input_ids depends on the labels",
            "Train this model without the patch",
        )


def _shifts(model: nn.Module, loss: Tensor, logits: Tensor, labels: Tensor) -> bool:
    if loss.numel() != 1:
        raise refusal(model, f"its loss is of shape {tuple(loss.shape)} and no number", _REMEDY)
    if loss.requires_grad:
        raise refusal(model, "a trainable parameter acts on its loss", _REMEDY)
    wants = [_cross_entropy(logits, labels, shift, "mean").item() for shift in (True, False)]
    for shift, want in zip((True, False), wants, strict=True):
        if torch.allclose(loss.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-5):
            return shift
    reason = (
        f"its loss is {loss:.6g} where the cross-entropy is {wants[0]:.6g} (with shifted labels) "
        f"or {wants[1]:.6g}"
    )
    raise refusal(model, reason, _REMEDY)


def _cross_entropy(logits: Tensor, labels: Tensor, shift: bool, reduction: str) -> Tensor:
    logits = logits.double()
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)
