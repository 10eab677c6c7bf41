"""What a model does between its output head and its loss, found by running it.

Language models scale (Cohere, Granite), cap (Gemma) or cut (padded vocabularies) the output of
their head before the loss, each under config fields of its own; some shift the labels, some do not,
and some compute their loss by themselves. A table of these would be wrong, without a word, on the day a
model is added. So the model's own forward runs with every module replaced by a stub, except those
that hold the head: the head returns known numbers, and what arrives at the loss tells what was done
to them. No weight is touched (a model on the meta device will do). What is not a scale, a cap and a
cut is refused. probe_loss.py looks at the loss itself.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .heads import linear_heads, original_class, path_of_head, refusal
from .hollow import HollowRun, is_builtin, normal, run_hollow
from .probe_loss import (
    few_labels,
    forward_arguments,
    loss_function,
    loss_options,
    loss_source,
    returns_loss,
    shifts_labels,
    shifts_labels_itself,
    takes_shift_labels,
)
from .reads import reads, watched, when_compiled


@dataclass(frozen=True)
class HeadTransform:
    """The loss as a function of the head's output z: of the logits `cap(logit_scale * z)`, cut.

    Attributes:
        logit_scale: factor on the output of the head, its bias included.
        softcap: c of `cap(x) = c * tanh(x / c)`; None: no cap.
        vocab_size: how many leading vocabulary entries reach the loss; None: all of them.
        shift: whether the label of a position is the target of the one before it, as in causal
            models; False: its own, as in those with an encoder.
        own_loss: whether the model computes its loss itself, not through `loss_function`.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    shift: bool = True
    own_loss: bool = False

    def __call__(self, z: Tensor) -> Tensor:
        """Logits of the loss, (..., vocab_size), for the output of the head, (..., V)."""
        z = self.logit_scale * z[..., : self.vocab_size]
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def at_temperature(self, temperature: Any) -> HeadTransform:
        """Return the transform to these logits, cap included, divided by `temperature`, a number or a tensor ()."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return replace(self, logit_scale=self.logit_scale / temperature, softcap=softcap)


@dataclass(frozen=True)
class Probed:
    """What the probe has found out about a model.

    Attributes:
        transform: what it does with the output of its head.
        head_path: where its head is.
        watched: values that the findings may depend on and that may change later; see `watched`.
        code: its forward and its loss function.
        reads: values that a loss of the user's may read; see `reads`. None: the loss is transformers' own.
        compiled_reads: the reads that a compiler can watch, and the place of one that it cannot.
        loss_source: where its loss function comes from, as of `loss_source`.
        loss_options: arguments of the loss function that change the loss in a way the patch does not know; None:
            any may.
        takes_shift_labels: whether its loss function uses `shift_labels` if it is given them.
        returns_loss: whether its forward always returns what the loss function gave, unchanged.
        forward_arguments: for a model that computes its loss itself, the arguments that do not change it;
            None: no argument does.
    """

    transform: HeadTransform
    head_path: str
    watched: dict[str, dict[str, Any]]
    code: tuple[Any, Any]
    reads: dict[str, Any] | None
    compiled_reads: tuple[list[tuple[bool, str, Any]], str | None]
    loss_source: tuple[Any, str | None]
    loss_options: frozenset[str] | None
    takes_shift_labels: bool
    returns_loss: bool
    forward_arguments: frozenset[str] | None


def probe(model: Any) -> Probed:
    """Look at what lies between the head of `model` and its loss, and after.

    Raises:
        ValueError: the patch could not reproduce it.
    """
    # Code around this may be compiled, and a compiler cannot trace stubs. `torch.compiler.disable` imports Dynamo,
    # which takes a second, so it is used only if Dynamo is loaded.
    compiled = "torch._dynamo" in sys.modules
    run: Any = torch.compiler.disable(_probe) if compiled else _probe  # type: ignore[no-untyped-call]
    return cast(Probed, run(model))


def _probe(model: Any) -> Probed:
    code = code_of(model)
    before = [None if is_builtin(function) else reads(model, function) for function in code]
    transform = probe_head(model)
    found = before[not transform.own_loss]
    if found is not None and found != read_by(model, transform, code):
        raise refusal(
            model,
            "the code of its loss changes what it reads, such as a count of its calls, and the patch does not call it",
            "Change that outside of the loss, or train this model without the patch",
        )
    function = code[1]
    return Probed(
        transform,
        path_of_head(model),
        watched(model),
        code,
        found,
        when_compiled(found or {}),
        loss_source(model),
        loss_options(function),
        takes_shift_labels=not transform.own_loss and takes_shift_labels(function),
        returns_loss=not transform.own_loss and returns_loss(model, linear_heads(model)[0]),
        forward_arguments=forward_arguments(model) if transform.own_loss else None,
    )


def read_by(model: Any, transform: HeadTransform, code: tuple[Any, Any]) -> dict[str, Any]:
    """Return what the code of the loss, the forward or the loss function, may read; see `reads`."""
    return reads(model, code[not transform.own_loss])


def code_of(model: Any) -> tuple[Any, Any]:
    """Return the forward of the class of a model, and its loss function: both can be replaced there."""
    return original_class(model).forward, loss_function(model)


def probe_head(model: nn.Module) -> HeadTransform:
    """What lies between the output head of `model` and its loss.

    The recovered numbers are exact where those of the model's config have at most six digits, and
    as precise as the model's own arithmetic elsewhere.

    Args:
        model: a language model, patched or not; its weights are neither read nor written.

    Raises:
        ValueError: the head is no plain linear layer, the loss is not the cross-entropy of its
            tokens, or the logits of that loss are not `HeadTransform(...)(head(hidden))`.
    """
    (head, *_), path = linear_heads(model), path_of_head(model)
    with torch.inference_mode(False), torch.device("cpu"), torch.enable_grad():
        labels = few_labels(head.out_features)
        z = _head_outputs(*labels.shape, head.out_features)
        hidden = normal(*labels.shape, head.in_features, seed=0)
        run = run_hollow(model, path, z, hidden, labels)
        own_loss = run.labels is None
        _check_logits(model, run, z)
        scale, softcap, vocab_size = _explain(model, run.logits, z)
        transform = HeadTransform(scale, softcap, vocab_size)

        small = normal(*labels.shape, head.out_features, seed=2).requires_grad_()
        other = normal(*labels.shape, head.in_features, seed=1).requires_grad_()
        _check_hidden(model, transform, run_hollow(model, path, small, other, labels), small)
        shift = (shifts_labels_itself if own_loss else shifts_labels)(
            model, path, head, vocab_size or head.out_features
        )
    return replace(transform, shift=shift, own_loss=own_loss)


def _head_outputs(*shape: int) -> Tensor:
    """Return what the stub of the head returns: float64 of both signs and of magnitudes 1e-12 to 1e9.

    The small ones show the scale, the large ones the cap. No two are alike, so a token or a vocabulary
    entry that is moved, or treated apart, shows.
    """
    generator = torch.Generator().manual_seed(0)  # or a refusal would come and go
    u = torch.rand(2, *shape, dtype=torch.float64, generator=generator)
    return torch.where(u[0] < 0.5, -1.0, 1.0) * 10 ** (21 * u[1] - 12)


def _check_hidden(model: nn.Module, transform: HeadTransform, run: HollowRun, z: Tensor) -> None:
    """Refuse logits that depend on the hidden states in another way than through the head."""
    want = transform(z)
    rounding = 16 * torch.finfo(run.logits.dtype).eps * want.abs().amax()
    if not ((run.logits - want).abs() <= rounding).all():
        raise refusal(
            model,
            "its logits depend on more than the output of its head, such as the hidden states",
            "Only a scale, a softcap and a cut of the vocabulary after the head can be patched",
        )
    (wanted,) = torch.autograd.grad(want.sum(), z)
    if run.logits.requires_grad:
        run.logits.sum().backward()  # reentrant checkpoints do not support torch.autograd.grad
    slope = z.grad
    if slope is None or (slope - wanted).abs().max() > 1e-3 * wanted.abs().max():
        raise refusal(
            model,
            "the gradient of its logits does not reach the output of its head as it is",
            "Train this model without the patch",
        )


def _check_logits(model: nn.Module, call: HollowRun, z: Tensor) -> None:
    """Refuse logits that cannot be a function of the head's output z alone, entry by entry."""
    logits = call.logits
    remedy = "Only a scale, a softcap and a cut of the vocabulary after the head can be patched"
    if not isinstance(logits, Tensor) or logits.shape[:-1] != z.shape[:-1]:
        shape = tuple(getattr(logits, "shape", ()))
        reason = f"a head output of shape {tuple(z.shape)} reaches its loss as {shape}"
        raise refusal(model, reason, remedy)
    if logits.shape[-1] > z.shape[-1] or call.vocab_size not in (None, logits.shape[-1]):
        reason = (
            f"its head has {z.shape[-1]} entries, of which {logits.shape[-1]} reach a loss over "
            f"{call.vocab_size}"
        )
        raise refusal(model, reason, "Make the vocabulary sizes of its config and its head agree")
    if logits.dtype not in (torch.float32, torch.float64):
        raise refusal(model, f"its logits are rounded to {logits.dtype} before the loss", remedy)
    if logits.requires_grad:
        raise refusal(model, "a trainable parameter acts between its head and its loss", remedy)


def _explain(model: nn.Module, logits: Tensor, z: Tensor) -> tuple[float, float | None, int | None]:
    """Return the scale, softcap and cut that map z to `logits`, up to the rounding of their type."""
    rounding = 16 * torch.finfo(logits.dtype).eps
    vocab_size = None if logits.shape[-1] == z.shape[-1] else logits.shape[-1]
    z, logits = z[..., :vocab_size], logits.cpu().double()
    small, large = z.abs().argmin(), z.abs().argmax()
    scale = _tidy((logits.take(small) / z.take(small)).item(), rounding)
    top = logits.take(large).item()
    linear = abs(top - scale * z.take(large).item()) <= rounding * abs(top)
    softcap = None if linear else _tidy(abs(top), rounding)

    error = (HeadTransform(scale, softcap)(z) - logits).abs()
    unexplained = (~(error <= rounding * logits.abs())).nonzero()  # NaN counts as unexplained
    if scale <= 0 or len(unexplained):
        row, position, entry = unexplained[0].tolist() if len(unexplained) else (0, 0, 0)
        at = (row, position, entry)
        if logits[at] < -1e30 < z[at]:
            reason = f"it masks vocabulary entry {entry} out before its loss"
            raise refusal(model, reason, "Train this model without the patch")
        reason = (
            f"the output {z[at]:.6g} of its head reaches the loss as {logits[at]:.6g} (batch row "
            f"{row}, position {position}, vocabulary entry {entry}), which no scale and softcap "
            "common to all entries explain"
        )
        raise refusal(model, reason, "Train this model without the patch")
    return scale, softcap, vocab_size


def _tidy(value: float, rounding: float) -> float:
    """Return a six-digit number, or the reciprocal of one, within `rounding` of `value`; else `value`."""
    if not 0 < value < float("inf"):
        return value
    for candidate in (float(f"{value:.6g}"), 1 / float(f"{1 / value:.6g}")):
        if abs(candidate - value) <= rounding * value:
            return candidate
    return value
