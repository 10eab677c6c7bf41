"""The hidden states that reach the output head of a model, and statistics of the logits they give.

A forward is stopped at the head, so that no logits are made. What is kept is one hidden state for each
token with a label: its width times its dtype, 8 KiB a token for 4096 units in bfloat16, where its logits
would take 512 KiB of float32 for a vocabulary of 128k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import LogitStats, linear_logit_stats
from ..ops.checks import is_dtensor
from .head_stats import find_head
from .heads import language_model, output_heads
from .hollow import withhold_labels
from .loss_call import IGNORE_INDEX
from .probe import HeadTransform


@dataclass(frozen=True, eq=False)
class OutputHead:
    """The head of a model: its logits are `transform` of `F.linear(hidden, weight, bias)`.

    Attributes:
        weight: (V, D), the parameter itself, less the entries that never reach the loss.
        bias: (V,) or None.
        transform: What the model does with the output.
    """

    weight: Tensor
    bias: Tensor | None
    transform: HeadTransform

    def logit_stats(self, hidden: Tensor, picks: Tensor, temperature: float = 1.0) -> LogitStats:
        """`levelhead.linear_logit_stats` of the model's logits divided by `temperature`."""
        transform = self.transform.at_temperature(temperature)
        return linear_logit_stats(
            hidden,
            self.weight,
            picks,
            linear_bias=self.bias,
            softcap=transform.softcap,
            logit_scale=transform.logit_scale,
        )


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """What reached the head of a model at the tokens that have a label.

    Attributes:
        hidden: Hidden states, (N, D), in the model's dtype and on its device.
        target: The token to predict from each, (N,) int64.
    """

    hidden: Tensor
    target: Tensor


def output_head(model: nn.Module) -> OutputHead:
    """The head of a language model, patched or not.

    Raises:
        ValueError: The model has none of which the logits are a function that is known.
    """
    found = find_head(model)
    head = found.modules[0]
    copies = len(found.modules) > 1
    if copies or is_dtensor(head.weight):
        reason = "it has copies of its head" if copies else "its head is a DTensor"
        raise ValueError(
            f"the hidden states of {type(found.model).__name__} cannot be collected: {reason}. Merge "
            "its adapters, and load it on one device"
        )
    size = found.transform.vocab_size
    bias = None if head.bias is None else head.bias[:size]
    return OutputHead(head.weight[:size], bias, found.transform)


def collect(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, max_tokens: int | None = None
) -> HeadInputs:
    """Runs a model without its head, in eval mode, and keeps what would reach it.

    Args:
        model: A language model.
        batches: Arguments of its forward, among them `labels` (B, T), in which -100 marks tokens that
            do not count; moved to the device of the model.
        max_tokens: Stops after so many tokens with a label; None: keeps those of all batches.

    Raises:
        ValueError: The model has no head that is known, there is no token with a label, or a hidden
            state is NaN or infinite.
    """
    shift = output_head(model).transform.shift
    hidden: list[Tensor] = []
    target: list[Tensor] = []
    tokens = 0
    for batch in batches:
        labels = batch["labels"]
        states = head_input(model, batch)
        labels = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if shift else labels
        labels = labels.to(states.device)
        counts = labels != IGNORE_INDEX
        hidden.append(states[counts])
        target.append(labels[counts].long())
        tokens += len(target[-1])
        if max_tokens is not None and tokens >= max_tokens:
            break
    if not tokens:
        raise ValueError("no token has a label; pass labels that are not all -100")
    inputs = HeadInputs(torch.cat(hidden)[:max_tokens], torch.cat(target)[:max_tokens])
    if not inputs.hidden.isfinite().all():
        raise ValueError("the model gives hidden states that are NaN or infinite")
    return inputs


def head_input(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What reaches the head, (..., T, D), when `model` is called with `batch` in eval mode."""
    inner = language_model(model)
    device = next(inner.parameters()).device
    given: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.items()}
    withhold_labels(inner, given)
    with _stopping_at(output_heads(inner)), _evaluating(model), torch.no_grad():
        try:
            model(**given)
        except _Reached as reached:
            return reached.hidden
    raise ValueError(
        f"the forward of {type(inner).__name__} did not call its head; pass the model that owns it"
    )


class _Reached(Exception):  # noqa: N818 (no error: the forward has done what it was run for)
    """Ends a forward at its head."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@contextmanager
def _stopping_at(heads: list[nn.Linear]) -> Iterator[None]:
    def stop(_head: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Reached(args[0])

    hooks = [head.register_forward_pre_hook(stop) for head in heads]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
