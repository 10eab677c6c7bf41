"""What a model does between its output head and its loss, found by running it.

Causal language models scale (Cohere, Granite), cap (Gemma) or cut (padded vocabularies) the output
of their head before the loss, each under config fields of its own. A table of those fields is wrong
the day a model is added, and wrong in silence. So the model's own forward runs once with every
child replaced by a stub: the backbone answers zeros, the head answers known numbers, and what
arrives at the loss tells the rest. No weight is touched (a model on the meta device will do), and
whatever is not a scale, a cap and a cut is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadTransform:
    """The logits of the loss as a function of the head's output z: `cap(logit_scale * z)`, cut.

    Attributes:
        logit_scale: factor on the output of the head, its bias included.
        softcap: c of `cap(x) = c * tanh(x / c)`; None: no cap.
        vocab_size: how many leading vocabulary entries reach the loss; None: all of them.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Logits of the loss, (..., vocab_size), for the output of the head, (..., V)."""
        z = self.logit_scale * z[..., : self.vocab_size]
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def refusal(model: nn.Module, reason: str, remedy: str) -> ValueError:
    """The error for a model that cannot be patched: why not, and what to do."""
    return ValueError(f"patch_model cannot serve {type(model).__name__}: {reason}. {remedy}.")


def output_head(model: nn.Module) -> nn.Linear:
    """The output head of `model`, if the loss can be taken inside its forward.

    Raises:
        ValueError: there is no head, or a call of it is not just `torch.nn.Linear.forward`.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module):
        raise refusal(
            model,
            "it has no output embeddings",
            "Pass a Hugging Face causal language model, before wrapping it for parallel training",
        )
    path = next((name for name, module in model.named_modules() if module is head), "?")
    if path not in model._modules:
        raise refusal(
            model,
            f"its head {path} is not a direct child",
            "Patch the module that owns the head and returns the loss, before wrapping it",
        )
    if type(head) is not nn.Linear:
        raise refusal(
            model,
            f"its head {path} is a {type(head).__name__}, not a plain torch.nn.Linear",
            "Keep the head out of quantisation and adapters, for example through "
            "llm_int8_skip_modules or target_modules",
        )
    for name, module in (("its", model), (f"the {path}", head)):
        if "forward" in vars(module):
            raise refusal(
                model,
                f"{name} forward was replaced on the instance",
                "Patch before accelerate.prepare, offloading or tensor parallelism",
            )
    return head


def probe_head(model: nn.Module) -> HeadTransform:
    """What lies between the output head of `model` and its loss.

    The recovered numbers are exact where those of the model's config have at most six digits, and
    as precise as the model's own arithmetic elsewhere.

    Args:
        model: a causal language model; its weights are neither read nor written.

    Raises:
        ValueError: `output_head` refuses the model, its loss is not the cross-entropy of the next
            tokens, or the logits of that loss are not `HeadTransform(...)(head(hidden))`.
    """
    head = output_head(model)
    with torch.device("cpu"), torch.enable_grad():
        labels = torch.tensor([[1, -100, 0], [0, 1, -100]])
        z = _head_outputs(*labels.shape, head.out_features)
        call = _call_of_loss(model, head, z, labels)
        _check_loss_function(model, call, labels)
        _check_logits(model, call, z)
        return _explain(model, call.logits, z)


def _head_outputs(*shape: int) -> Tensor:
    """What the stub head answers: float64 of both signs and of magnitudes 1e-12 to 1e9.

    The small ones show the scale, the large ones the cap; no two are alike, so no token and no
    vocabulary entry can be moved or treated apart unseen.
    """
    generator = torch.Generator().manual_seed(0)  # a refusal must not come and go with the seed
    u = torch.rand(2, *shape, dtype=torch.float64, generator=generator)
    return torch.where(u[0] < 0.5, -1.0, 1.0) * 10 ** (21 * u[1] - 12)


@dataclass
class _LossCall(Exception):  # noqa: N818 (no error: the probe got what it wanted)
    """The arguments a forward gives to its loss function."""

    logits: Any
    labels: Any
    vocab_size: Any
    options: dict[str, Any]


class _Stub:
    """Answers a call with `answer()`, and all else like the module it stands for."""

    def __init__(self, module: nn.Module, answer: Callable[[], Any]) -> None:
        self._module = module
        self._answer = answer

    def __call__(self, *_args: object, **_kwargs: object) -> Any:
        return self._answer()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return _Stub(value, self._answer) if isinstance(value, nn.Module) else value


class _BackboneOutput:
    """Stands for the output class of every backbone: hidden states, and None for all else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):  # copy and its like must not take None for a method
            raise AttributeError(name)


def _call_of_loss(model: nn.Module, head: nn.Linear, z: Tensor, labels: Tensor) -> _LossCall:
    """The call that the forward of `model` makes to its loss function when its head answers z."""

    def stop(
        logits: Any = None, labels: Any = None, vocab_size: Any = None, **options: Any
    ) -> None:
        raise _LossCall(logits, labels, vocab_size, options)

    remedy = "Its forward must give the logits of all tokens and the labels to self.loss_function"
    unused = refusal(model, "its loss does not go through loss_function", remedy)
    if not isinstance(getattr(type(model), "loss_function", None), property):
        raise unused
    shell = _hollow(model, head, z)
    shell.loss_function = stop
    padding = torch.tensor([[1, 1, 1], [0, 1, 1]])  # must not change what the loss sees
    try:
        shell.forward(
            input_ids=torch.zeros_like(labels), attention_mask=padding, labels=labels.clone()
        )
    except _LossCall as call:
        return call
    except Exception as error:
        reason = f"its forward failed on a probe ({type(error).__name__}: {error})"
        raise refusal(model, reason, remedy) from error
    raise unused


def _hollow(model: nn.Module, head: nn.Linear, z: Tensor) -> Any:
    """`model` in training mode with stubs for children; all else it shares with the original."""
    hidden = torch.zeros(*z.shape[:-1], head.in_features, dtype=z.dtype)

    def stub(child: nn.Module | None) -> _Stub | None:
        if child is None:
            return None
        return _Stub(child, z.clone if child is head else lambda: _BackboneOutput(hidden))

    shell = object.__new__(type(model))
    stubs = {name: stub(child) for name, child in model._modules.items()}
    vars(shell).update(vars(model), _modules=stubs, training=True)
    return shell


def _check_loss_function(model: Any, call: _LossCall, labels: Tensor) -> None:
    """Refuse a model whose loss, as it calls it, is not the cross-entropy of the next tokens."""
    remedy = "patch_model would replace its loss by one that differs; train it without the patch"
    if not isinstance(call.labels, Tensor) or not torch.equal(call.labels.cpu(), labels):
        raise refusal(model, "the labels do not reach its loss_function unchanged", remedy)
    logits = torch.randn(*labels.shape, 5, generator=torch.Generator().manual_seed(0))
    target = labels[:, 1:].flatten()
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), target, reduction="sum")
    for num_items, want in ((None, total / (target != -100).sum()), (4, total / 4)):
        options = call.options | {"num_items_in_batch": num_items}
        try:
            loss = model.loss_function(logits=logits, labels=labels, vocab_size=5, **options)
            same = torch.allclose(loss, want)
        except Exception as error:
            reason = f"its loss_function failed on a probe ({type(error).__name__}: {error})"
            raise refusal(model, reason, remedy) from error
        if not same:
            reason = f"its loss_function gives {loss:.6g} where the cross-entropy is {want:.6g}"
            raise refusal(model, reason, remedy)


def _check_logits(model: nn.Module, call: _LossCall, z: Tensor) -> None:
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


def _explain(model: nn.Module, logits: Tensor, z: Tensor) -> HeadTransform:
    """The transform that maps z to `logits`, up to the rounding of their type."""
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
        reason = (
            f"the output {z[at]:.6g} of its head reaches the loss as {logits[at]:.6g} (batch row "
            f"{row}, position {position}, vocabulary entry {entry}), which no scale and softcap "
            "common to all entries explain"
        )
        raise refusal(model, reason, "Train this model without the patch")
    return HeadTransform(scale, softcap, vocab_size)


def _tidy(value: float, rounding: float) -> float:
    """A six-digit number, or the reciprocal of one, within `rounding` of `value`; else `value`."""
    if not 0 < value < float("inf"):
        return value
    for candidate in (float(f"{value:.6g}"), 1 / float(f"{1 / value:.6g}")):
        if abs(candidate - value) <= rounding * value:
            return candidate
    return value
