"""The head of a patched model, which computes the loss in a training call.

Why the head: FSDP and ZeRO gather its weight for its call, and only for that. So the model's forward keeps the labels,
the head computes the loss and returns a stand-in for the logits, (1, 1, V), and `loss_function`, which the model's own
forward calls next, returns that loss. Everything else in the forward (a router loss, say) stays the model's own. A
model that computes its loss itself (BART, T5) runs without labels, and the loss is set in its output.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.checks import IGNORE_INDEX, autocast_is_on, is_dtensor
from .heads import intercepts_linear
from .hollow import version
from .labels import check_labels
from .loss_call import LossCall, Shown, some_tokens, under_way
from .stand_in import mark

# Heads that have warned of a call past the forward of their model.
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class LossHead(nn.Linear):
    """The head of a patched model: in a training call it computes the loss and returns the logits of one token."""

    _levelhead_original: type = nn.Linear

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's argument name)
        """Return logits (..., V) for hidden states (..., D); in a training call a stand-in, and compute the loss."""
        call = under_way()
        if not isinstance(call, LossCall):
            if call is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                _warn_of_logits(self)
            return self._logits(input, self.weight)
        if call.loss is not None:
            raise RuntimeError(
                "the head was called twice in one training forward, but patch_model knows the "
                "labels of one call only. Use unpatch_model to train this model"
            )
        call.check_mode()
        weight = (
            self.weight
        )  # read once, like nn.Linear: a parametrised weight is computed at each read
        call.loss = _head_loss(input, weight, self.bias, call)
        if call.keep_logits:
            logits = self._logits(input, weight)
            # A copy: models scale logits in place.
            sent = None if is_dtensor(logits) else some_tokens(logits)
            call.answer = logits, version(logits), sent
            return logits
        if is_dtensor(input):  # the hooks of torch's tensor parallelism expect a DTensor back
            whole: Any = input
            loss: Tensor = call.loss.reshape(1, 1, 1).clone()
            loss = whole.from_local(loss, whole.device_mesh, whole.placements)
            call.answer = loss, version(loss), None
            return loss
        sent, never = _numbers(len(weight), call.loss.device, self._dtype_of(input))
        # As many dimensions as logits have. `where` with False everywhere puts it behind the loss in the graph, so that
        # hooks run, and passes no gradient on.
        stand_in = torch.where(never, call.loss.to(sent.dtype), sent)
        call.answer = stand_in, version(stand_in), sent[0]
        return mark(stand_in)

    def _dtype_of(self, input: Tensor) -> torch.dtype:  # noqa: A002
        """Return the dtype of the logits of `input`."""
        device = input.device.type
        return torch.get_autocast_dtype(device) if autocast_is_on(device) else input.dtype

    def extra_repr(self) -> str:
        """Return the sizes of the layer and, if its model is being printed, the options of the patch."""
        shown = under_way()
        return super().extra_repr() + (f", {shown.options}" if isinstance(shown, Shown) else "")

    def _logits(self, input: Tensor, weight: Tensor) -> Tensor:  # noqa: A002
        # Tensor parallelism sets a forward on the instance, which patch_model has put aside.
        own: Callable[[Tensor], Tensor] | None = vars(self).get("_levelhead_forward")
        return F.linear(input, weight, self.bias) if own is None else own(input)


def _numbers(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return numbers of both signs and of magnitudes 0.01 to 3000, (1, 1, size), and False, ().

    A scale, cap, mask or cut of the logits changes some of them, and so shows.
    """
    if torch.compiler.is_compiling():
        return _new_numbers(size, device, dtype)
    return _kept_numbers(size, device, dtype)


def _new_numbers(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    index = torch.arange(size, device=device, dtype=torch.float32)
    magnitude = 10 ** (5.5 * (0.6180339 * index).frac() - 2)
    numbers = torch.where(index % 2 < 1, magnitude, -magnitude).to(dtype)
    return numbers.view(1, 1, -1), torch.zeros((), dtype=torch.bool, device=device)


@functools.lru_cache(maxsize=8)
def _kept_numbers(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return _new_numbers(size, device, dtype)


def _warn_of_logits(head: nn.Module) -> None:
    if head not in _warned:
        _warned.add(head)
        warnings.warn(
            "the head of a patched model was called outside the model's forward, with gradients "
            "enabled: it gave logits, and a loss made of them is not smoothed. Call the model with "
            "labels, or use unpatch_model",
            stacklevel=3,
        )


@functools.cache
def loss_head(original: Any) -> Any:
    """Return `LossHead` for a head of class `original`: `torch.nn.Linear`, or the subclass that FSDP2 makes of it."""
    if issubclass(LossHead, original):
        return LossHead
    namespace = {"_levelhead_original": original}
    return type(LossHead.__name__, (LossHead, original), namespace)


def _head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LossCall) -> Tensor:
    """Return the smoothed cross-entropy of the logits that the head would give for `hidden` (..., T, D)."""
    target = call.target.to(hidden.device)
    if hidden.shape[:-1] != target.shape:
        raise ValueError(
            f"labels of shape {tuple(target.shape)} do not fit hidden states of shape "
            f"{tuple(hidden.shape)}: there must be one label per position. Make the labels fit, or, if the "
            "model changes the shape of either, use unpatch_model"
        )
    if intercepts_linear(weight):
        raise RuntimeError(
            f"the weight of the patched head is a {type(weight).__name__} now, which multiplies in "
            "its own way: it was quantised after patch_model. Keep the head out of quantisation"
        )
    vocab_size = call.transform.vocab_size
    if vocab_size is not None:
        if is_dtensor(weight):
            raise RuntimeError(
                f"the loss takes {vocab_size} of the {len(weight)} entries of a tensor-parallel "
                "head, which patch_model cannot cut without gathering it. Train this model without "
                "tensor parallelism of its head"
            )
        weight = weight[:vocab_size]
        bias = None if bias is None else bias[:vocab_size]
    try:
        return call.compute(hidden, weight, bias, target)
    except (IndexError, TypeError):
        given = "labels" if call.shift_labels is None else "shift_labels"
        shifted = call.own.shift and call.shift_labels is None
        check_labels(target, len(weight), IGNORE_INDEX, name=given, shifted=shifted)
        raise
