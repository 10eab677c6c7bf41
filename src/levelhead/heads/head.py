"""The output head of a model: where it is, the hidden states that reach it, and statistics of the logits it gives.

A hook in front of the head sees the hidden states of any forward, and can compute the statistics there from the head's
own weight: FSDP and ZeRO have gathered it then, and no logits are needed. Or a forward is stopped at the head, and
what is kept is one hidden state for each token with a label: 8 KiB a token for 4096 units in bfloat16, where its logits
would take 512 KiB of float32 for a vocabulary of 128k.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..integrations.patch.heads import intercepts_linear, language_model, output_heads
from ..integrations.patch.hollow import withhold_labels
from ..integrations.patch.probe import HeadTransform, probe_head
from ..integrations.patch.state import patch_state
from ..ops import LogitStats, linear_logit_stats
from ..ops.checks import IGNORE_INDEX, is_dtensor


@dataclass(frozen=True, eq=False)
class Head:
    """The output head of a language model: its logits are `transform` of `F.linear(hidden, weight, bias)`.

    Attributes:
        model: the model that owns it, inside its wrappers.
        modules: the linear layers that act as the head: one, or one for each of its copies.
        transform: what the model does with their output.
    """

    model: nn.Module
    modules: list[nn.Linear]
    transform: HeadTransform

    @property
    def weight(self) -> Tensor:
        """(V, D), the parameter itself, less the entries that never reach the loss."""
        return self._of(self.modules[0])[0]

    @property
    def bias(self) -> Tensor | None:
        """(V,), as the weight, or None."""
        return self._of(self.modules[0])[1]

    def logit_stats(
        self,
        hidden: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        *,
        module: nn.Linear | None = None,
    ) -> LogitStats:
        """Statistics of the model's logits divided by `temperature`, without the logits.

        Args:
            hidden: what reaches the head, (..., D).
            target: vocabulary ids, (...) or (..., K), as of `levelhead.linear_logit_stats`.
            temperature: T > 0.
            module: which of the `modules` is being called; None: the first.

        Raises:
            RuntimeError: the weight was quantised since the head was found.
        """
        weight, bias = self._of(self.modules[0] if module is None else module)
        transform = (
            self.transform if temperature == 1 else self.transform.at_temperature(temperature)
        )
        return linear_logit_stats(
            hidden,
            weight,
            target.to(hidden.device),
            linear_bias=bias,
            softcap=transform.softcap,
            logit_scale=transform.logit_scale,
        )

    def _of(self, module: nn.Linear) -> tuple[Tensor, Tensor | None]:
        weight, bias, size = module.weight, module.bias, self.transform.vocab_size
        if intercepts_linear(weight):
            raise RuntimeError(
                f"the weight of the head is a {type(weight).__name__} now, which multiplies in "
                "its own way. Keep the head out of quantisation"
            )
        if size is None:
            return weight, bias
        return weight[:size], None if bias is None else bias[:size]


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """What reached the head of a model at the tokens that have a label.

    Attributes:
        hidden: hidden states, (N, D), in the model's dtype and on its device.
        target: the token to predict from each, (N,) int64.
    """

    hidden: Tensor
    target: Tensor


def find_head(model: nn.Module) -> Head:
    """The head of `model`, patched or not, maybe inside wrappers.

    Raises:
        ValueError: `patch_model` would refuse the model, for the same reason: its logits are not a
            plain linear layer's, scaled and capped.
    """
    try:
        inner = language_model(model)
        modules = output_heads(inner)
        state = patch_state(inner)
        transform = probe_head(inner) if state is None else state.transform
    except ValueError as error:
        raise ValueError(
            f"no statistics of the logits of {type(model).__name__}, for which its head must be what "
            f"patch_model takes: {error}"
        ) from error
    return Head(inner, modules, transform)


def single_head(model: nn.Module) -> Head:
    """The head of a model that is whole, in one copy and on one device.

    Raises:
        ValueError: `find_head` finds none, or it has copies, or is a DTensor.
    """
    head = find_head(model)
    copies = len(head.modules) > 1
    if copies or is_dtensor(head.modules[0].weight):
        reason = "it has copies of its head" if copies else "its head is a DTensor"
        raise ValueError(
            f"the hidden states of {type(head.model).__name__} cannot be collected: {reason}. Merge "
            "its adapters, and load it on one device"
        )
    return head


def collect(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, max_tokens: int | None = None
) -> HeadInputs:
    """Run a model without its head, in eval mode, and keep what would reach it.

    Args:
        model: a language model.
        batches: arguments of its forward, among them `labels` (B, T), in which -100 marks tokens that
            do not count; moved to the device of the model.
        max_tokens: stop after so many tokens with a label; None: keep those of all batches.

    Raises:
        ValueError: the model has no head that is known, there is no token with a label, or a hidden
            state is NaN or infinite.
    """
    shift = single_head(model).transform.shift
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


def logit_stats_at(
    model: nn.Module, head: Head, inputs: Mapping[str, Any], position: Tensor, target: Tensor
) -> LogitStats:
    """Statistics of a model's logits at one position of each row of a batch, without the logits.

    From a whole forward, whose head gives the logits of one token: wrappers (DDP, FSDP, DeepSpeed) want it to end. It
    runs eagerly, since compiled code calls no hook that was registered after it was compiled.

    Args:
        model: the model, or a wrapper around it.
        head: its head, as `find_head` gives it.
        inputs: what `model` is called with, of B rows.
        position: where, (B,) integer; negative ones count from the end.
        target: vocabulary ids, (B,) or (B, K), as of `levelhead.linear_logit_stats`.

    Raises:
        RuntimeError: the head is called otherwise than once with hidden states (B, T, D).
    """
    caught: list[LogitStats] = []

    def take(module: nn.Linear, args: tuple[Any, ...]) -> tuple[Tensor]:
        hidden = args[0]
        if hidden.dim() != 3 or len(hidden) != len(position):
            raise RuntimeError(
                f"the head of {type(head.model).__name__} was called with hidden states of shape "
                f"{tuple(hidden.shape)}, which are not those of {len(position)} prompts; scoring needs a "
                "model that calls its head once, with hidden states (B, T, D)"
            )
        rows = torch.arange(len(position), device=hidden.device)
        at = hidden[rows, position.to(hidden.device)]
        caught.append(head.logit_stats(at, target, module=module))
        return (hidden[:1, -1:],)

    # Registered now, so that they run after the hooks of ZeRO that gather the weight.
    handles: list[Any] = [module.register_forward_pre_hook(take) for module in head.modules]
    try:
        with torch.no_grad(), _eager():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if len(caught) != 1:
        raise RuntimeError(
            f"{type(head.model).__name__} called its head {len(caught)} times in one forward, where "
            "scoring understands one"
        )
    return caught[0]


def _eager() -> AbstractContextManager[Any]:
    """Run compiled code as it was written; without loading the compiler, where nothing is compiled."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def head_input(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What reaches the head, (..., T, D), when `model` is called with `batch` in eval mode."""
    inner = language_model(model)
    device = next(inner.parameters()).device
    given: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.items()}
    withhold_labels(inner, given)
    with _stopping_at(output_heads(inner)), _evaluating(model), torch.no_grad(), _eager():
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
