"""Statistics of a model's logits, taken where its hidden states enter its head.

A hook in front of the head sees the hidden states of any forward and can compute the statistics
there, from the head's own weight: FSDP and ZeRO have gathered it then, and no logits are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..ops import LogitStats, linear_logit_stats
from .heads import intercepts_linear, language_model, output_heads
from .patched import patch_state
from .probe import HeadTransform, probe_head


@dataclass(frozen=True)
class Head:
    """The output head of a language model.

    Attributes:
        model: the model that owns it, inside its wrappers.
        modules: the linear layers that act as the head: one, or one for each of its copies.
        transform: what the model does with their output.
    """

    model: nn.Module
    modules: list[nn.Linear]
    transform: HeadTransform


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


def head_stats(module: Any, hidden: Tensor, picks: Tensor, transform: HeadTransform) -> LogitStats:
    """Statistics of the model's logits, without the logits, in a call of its head or before it.

    Args:
        module: the linear layer that acts as the head.
        hidden: what it is called with, (..., D).
        picks: vocabulary ids, (...) or (..., K), as of `linear_logit_stats`.
        transform: what the model does with the output of its head.

    Raises:
        RuntimeError: the weight was quantised since the head was found.
    """
    if intercepts_linear(module.weight):
        raise RuntimeError(
            f"the weight of the head is a {type(module.weight).__name__} now, which multiplies in "
            "its own way. Keep the head out of quantisation"
        )
    weight, bias = module.weight, module.bias
    if transform.vocab_size is not None:
        weight = weight[: transform.vocab_size]
        bias = None if bias is None else bias[: transform.vocab_size]
    return linear_logit_stats(
        hidden,
        weight,
        picks.to(hidden.device),
        linear_bias=bias,
        softcap=transform.softcap,
        logit_scale=transform.logit_scale,
    )
