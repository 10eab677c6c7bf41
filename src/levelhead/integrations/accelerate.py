"""Smoothed labels with Accelerate: one verb that patches a model and prepares it, in any order.

`patch_model` before `accelerator.prepare` is all that most runs need, and what `prepare` does. It
adds what only someone who knows the accelerator can do. A model prepared for mixed precision has a
forward of its own, around the one it had then, past which a patch would have no effect: it is
made anew around the patched one. And Accelerate has FSDP2 round all that the model returns to
bfloat16, of which nothing but the loss was ever more precise: that is turned off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .patch.api import patch_model
from .patch.heads import language_model

if TYPE_CHECKING:
    from accelerate import Accelerator


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    *others: Any,
    smoothing: float | Tensor = 0.1,
    **options: Any,
) -> Any:
    """`accelerator.prepare(model, *others)`, with `model` trained on label-smoothed cross-entropy.

    Tested with DDP, FSDP2 and DeepSpeed, with mixed precision, and with torch.compile of the whole
    model or by regions. A step is that of the unpatched model with its logits smoothed by
    `torch.nn.functional.cross_entropy`; see `levelhead.patch_model`. A call with labels is such a
    step if the model is in training mode or gradients are enabled, in eval mode with a warning. The
    loss that a model prepared here reports is float32.

    Args:
        accelerator: of any configuration.
        model: what `levelhead.patch_model` takes. If this accelerator has prepared it already, it
            is patched as it is; under FSDP2 with mixed precision its loss then stays rounded.
        *others: what goes with it into `accelerator.prepare`: optimizer, data loaders, schedulers.
        smoothing: as of `levelhead.patch_model`.
        **options: further keyword arguments of `levelhead.patch_model`.

    Returns:
        What `accelerator.prepare` returns: the model alone, or a tuple in the order of arguments.

    Raises:
        TypeError: as `levelhead.patch_model`.
        ValueError: `patch_model` refuses the model or an option.

    Example:
        >>> accelerator = Accelerator()
        >>> model, optimizer, loader = prepare(accelerator, model, optimizer, loader, smoothing=0.1)
        >>> for batch in loader:
        ...     accelerator.backward(model(**batch).loss)
    """
    outer = language_model(model)
    # Regional compilation works on a second model, and unwrap_model gives back the first.
    first = [vars(module)["_orig_mod"] for module in model.modules() if "_orig_mod" in vars(module)]
    for inner in (outer, *map(language_model, first)):
        with _without_mixed_precision(accelerator, inner):
            patch_model(inner, smoothing, **options)
    if getattr(model, "_is_accelerate_prepared", False) and not others:
        return model
    _keep_the_loss_float32(accelerator)
    return accelerator.prepare(model, *others)


@contextmanager
def _without_mixed_precision(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Take Accelerate's autocast off the forward of `model`, and put it back around what is there.

    What the autocast was put around, if not the forward of the class, stays for patch_model to see.
    """
    attributes = vars(model)
    autocast = attributes.get("forward")
    original = attributes.get("_original_forward")
    if original is None or autocast is None:
        yield
        return
    if getattr(original, "__func__", None) is type(model).forward:
        del attributes["forward"]
    else:
        attributes["forward"] = original
    try:
        yield
    except (TypeError, ValueError):
        attributes["forward"] = autocast
        raise
    from accelerate.utils import convert_outputs_to_fp32, get_mixed_precision_context_manager

    context = get_mixed_precision_context_manager(
        accelerator.native_amp, accelerator.autocast_handler
    )
    patched: Any = model.forward
    attributes["_original_forward"] = patched
    attributes["forward"] = MethodType(convert_outputs_to_fp32(context(patched.__func__)), model)


def _keep_the_loss_float32(accelerator: Accelerator) -> None:
    """Have FSDP2 return what the model returns; it would round the loss to bfloat16 or float16."""
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.output_dtype != torch.float32:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)
