"""Does `patch_model` do right by this model, on this batch, here?

The truth is the model's own forward without the patch, whose loss gets what label smoothing adds
for the logits it returns. Shift, scale, softcap, router losses and the virtual tokens of an adapter
stay the model's own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.checks import IGNORE_INDEX
from .api import patch_model, unpatch_model
from .heads import language_model
from .loss_head import LossHead
from .options import check_smoothing
from .state import PatchState, patch_state, set_patch_state

_SUM_ROUNDINGS = 1024  # what a sum of a million terms may lose: the square root of their number
_LOSS_SCALE = 2.0**16  # where torch.amp.GradScaler starts


@dataclass(frozen=True)
class PatchCheck:
    """How far a patched training step is from the dense one; `str()` of it is the verdict.

    Attributes:
        ok: whether every error lies within its budget.
        model: the class of the model.
        smoothing: the label smoothing that was checked.
        dtype: the coarsest floating-point type at work.
        loss: of the patched model, in nats.
        dense_loss: of the same model without the patch, with dense label smoothing.
        loss_error: their difference over the largest logit or the loss, whichever is larger.
        factor: the patched gradients as a multiple of the dense ones, all parameters together.
        gradient_error: the largest difference of one entry of a gradient over the largest entry of
            all gradients; infinite for NaN, and where only one of the steps has a gradient.
        parameter: the name of the parameter that has the entry.
        budget: how large `loss_error` may be, and how far `factor` may be from 1.
        gradient_budget: how large `gradient_error` may be.
    """

    ok: bool
    model: str
    smoothing: float
    dtype: torch.dtype
    loss: float
    dense_loss: float
    loss_error: float
    factor: float
    gradient_error: float
    parameter: str
    budget: float
    gradient_budget: float

    def __str__(self) -> str:
        verdict, trains = ("ok", "trains") if self.ok else ("WRONG", "does not train")
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"check_patch: {verdict}. The patched {self.model} {trains} as the unpatched one does "
            f"with dense label smoothing {self.smoothing:.4g}, to the rounding of {dtype}.\n"
            f"  loss       {self.loss:.7g}, dense {self.dense_loss:.7g}: "
            f"error {self.loss_error:.1e}, allowed {self.budget:.1e}\n"
            f"  gradients  {self.factor:.6f} times the dense ones: "
            f"error {abs(self.factor - 1):.1e}, allowed {self.budget:.1e}\n"
            f"  worst one  {self.parameter}: "
            f"error {self.gradient_error:.1e}, allowed {self.gradient_budget:.1e}"
        )


def check_patch(
    model: nn.Module, batch: Mapping[str, Any], *, smoothing: float | None = None
) -> PatchCheck:
    """Compare patched and unpatched loss and gradients of `model` on `batch`; print the verdict.

    Two steps, forward and backward, from the same random state (dropout falls alike): the model's
    own with dense label smoothing, then the patched one. Each module stays in the mode it is in,
    training or eval: what is checked is the model as it would be trained now. No optimiser steps.
    Gradients, buffers, random state and the patch are afterwards what they were; a model without a
    patch is patched for the check only. It takes the memory of an unpatched step and of the
    gradients once more, so a small batch will do.

    The budgets come from arithmetic. Let r be the spacing of the numbers next to 1 in the coarsest
    floating-point type at work (of a parameter, of the head's output, or of float32 products as
    `torch.set_float32_matmul_precision` permits them), and s that in float32, in which the losses
    are computed; a sum of a million terms may lose 1024 s.

    - An entry of a gradient is rounded in the head and in each layer below it, at random: it may
      differ by 4 r + 1024 s of the largest entry of all gradients.
    - Over all entries such errors cancel. What is left is a rounding that the tokens share, as that
      of the gradient of the label's logit: all gradients together may differ by a factor of
      1 ± (r + 1024 s). This is the sharpest test of a wrong smoothing or scale.
    - Rounding moves a logit by at most r/2 of it, and the loss by twice that: it may differ by
      r + 1024 s of the largest logit or of the loss, whichever is larger.

    What is smaller hides. A smoothing of 0.11 in place of 0.1 changes the gradients by a factor of
    some 0.989, which bfloat16 (r = 0.0078) just shows; float32 shows 0.1002.

    Where float16 is at work, the loss is scaled before the backward pass as a GradScaler does.

    Args:
        model: what `patch_model` accepts, patched or not.
        batch: what the model is called with, on its device, with `labels` (or `shift_labels`).
        smoothing: the label smoothing to check with, in [0, 1]; None: the patch's own, else 0.1.

    Returns:
        The numbers behind the verdict.

    Raises:
        TypeError: `model` is no module, or `smoothing` no number.
        ValueError: `patch_model` refuses the model; it trains on an objective of its own; the batch
            has no label to learn; the dense step gives no finite gradient; a parameter has hooks
            that act when its gradient is ready.
        RuntimeError: the patched model refuses the call.

    Example:
        >>> check_patch(model, next(iter(loader))).ok
        check_patch: ok. The patched LlamaForCausalLM trains as the unpatched one does ...
        True
    """
    if batch.get("labels") is None and batch.get("shift_labels") is None:
        raise ValueError(
            f"check_patch needs a batch with labels, got one of {sorted(batch)}; add `labels` of "
            "the shape of `input_ids`, with -100 where there is nothing to learn"
        )
    if smoothing is not None:
        check_smoothing("smoothing", smoothing)
    inner = language_model(model)
    before = patch_state(inner)
    if before is not None and before.objective is not None:
        raise ValueError(
            f"check_patch compares with label smoothing, but the {type(inner).__name__} trains on "
            f"the objective {type(before.objective).__name__}; call set_objective(model, None) first"
        )
    if before is None:
        patch_model(model)
    patch: Any = before or patch_state(inner)
    if smoothing is not None:
        patch = replace(patch, smoothing=smoothing)
    try:
        with _left_as_it_was(model), torch.enable_grad():
            result = _compare(model, inner, patch, dict(batch))
    finally:
        set_patch_state(inner, patch if before is None else before)
        if before is None:
            unpatch_model(model)
    sys.stdout.write(f"{result}\n")
    return result


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Give `model` back its gradients and buffers."""
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"the parameter {name} has hooks that act when its gradient is ready, as of an "
                "optimiser that steps in the backward pass, or of DeepSpeed; call check_patch "
                "before they are attached"
            )
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _compare(
    model: nn.Module, inner: nn.Module, patch: PatchState, batch: dict[str, Any]
) -> PatchCheck:
    dense = _dense_step(model, inner, patch, batch)
    set_patch_state(inner, patch)
    with _same_random_numbers(model):
        loss = model(**batch)[0]
    got = _gradients(model, loss * dense.scale)
    parameter, gradient_error, factor = _differences(got, dense.gradients)

    r = _spacing(dense.dtype)
    sums = _SUM_ROUNDINGS * torch.finfo(torch.float32).eps
    budget, gradient_budget = r + sums, 4 * r + sums
    loss_error = abs(loss.item() - dense.loss) / max(abs(dense.loss), dense.largest_logit)
    return PatchCheck(
        # A NaN is within no budget.
        ok=loss_error <= budget and abs(factor - 1) <= budget and gradient_error <= gradient_budget,
        model=type(inner).__name__,
        smoothing=float(patch.smoothing),
        dtype=dense.dtype,
        loss=loss.item(),
        dense_loss=dense.loss,
        loss_error=loss_error,
        factor=factor,
        gradient_error=gradient_error,
        parameter=parameter,
        budget=budget,
        gradient_budget=gradient_budget,
    )


@dataclass(frozen=True)
class _DenseStep:
    """A step without the patch; its gradients are those of `scale * loss`."""

    loss: float
    largest_logit: float
    dtype: torch.dtype
    gradients: dict[str, Tensor | None]
    scale: float


def _dense_step(
    model: nn.Module, inner: nn.Module, patch: PatchState, batch: dict[str, Any]
) -> _DenseStep:
    set_patch_state(inner, None)  # until the patched step: the classes alone do nothing
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    # Seen at the head, not asked of autocast: accelerate enters that within the model's forward.
    hooks = [
        module.register_forward_hook(lambda _module, _args, output: dtypes.add(output.dtype))
        for module in inner.modules()
        if isinstance(module, LossHead)
    ]
    try:
        loss, largest_logit = _dense_loss(model, patch, batch)
        scale = _LOSS_SCALE if torch.float16 in dtypes else 1.0
        gradients = _gradients(model, loss * scale)
        while scale > 1 and not _finite(gradients):
            scale /= 16
            gradients = _gradients(model, _dense_loss(model, patch, batch)[0] * scale)
    finally:
        for hook in hooks:
            hook.remove()
    if not _finite(gradients) or not any(g is not None and g.any() for g in gradients.values()):
        raise ValueError(
            f"the unpatched {type(inner).__name__} has a loss of {loss.item():.6g} on this batch, "
            "and no finite gradient to compare with; give a batch with labels other than "
            f"{IGNORE_INDEX}, and a model that is trainable and holds finite numbers"
        )
    dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return _DenseStep(loss.item(), largest_logit, dtype, gradients, scale)


def _dense_loss(model: nn.Module, patch: PatchState, batch: dict[str, Any]) -> tuple[Tensor, float]:
    """The loss of the unpatched model with dense label smoothing, and its largest logit."""
    labels: Any = batch.get("labels")
    target: Any = batch.get("shift_labels")
    ignored = batch.get("ignore_index", IGNORE_INDEX)
    if labels is None:
        batch = batch | {"labels": target}  # without labels no model gives a loss
    with _same_random_numbers(model):
        output = model(**batch | {"return_dict": True})
    logits = output.logits[..., : patch.transform.vocab_size]  # (..., T, V)
    if target is None:
        # Prompt tuning puts virtual tokens, without labels, in front.
        labels = F.pad(labels, (logits.shape[-2] - labels.shape[-1], 0), value=ignored)
        shifted = F.pad(labels, (0, 1), value=ignored)[..., 1:]
        target = shifted if patch.transform.shift else labels
    target = target.flatten().to(logits.device)
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    items = batch.get("num_items_in_batch")
    items = (target != ignored).sum() if items is None else items

    def cross_entropy(logits: Tensor, smoothing: float) -> Tensor:
        total = F.cross_entropy(
            logits, target, reduction="sum", ignore_index=ignored, label_smoothing=smoothing
        )
        return total.div(items)

    trained = logits / patch.temperature
    if patch.softcap is not None:
        trained = patch.softcap * torch.tanh(trained / patch.softcap)
    smoothed = patch.temperature * cross_entropy(trained, float(patch.smoothing))
    # What the model's own loss is more than that of its labels, a router loss, stays.
    loss: Tensor = output.loss + (smoothed - cross_entropy(logits, 0.0))
    return loss, logits.abs().max().item()


@contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Begin where the last such block began, and leave the random state as it was."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(list(devices), device_type=kind):
        yield


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    """The gradient of every trainable parameter, by name."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.grad = None
    # Not torch.autograd.grad, which reentrant checkpoints and data-parallel hooks do not go with.
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return gradients


def _finite(gradients: dict[str, Tensor | None]) -> bool:
    return all(g is None or bool(g.isfinite().all()) for g in gradients.values())


def _differences(
    got: dict[str, Tensor | None], want: dict[str, Tensor | None]
) -> tuple[str, float, float]:
    """Where the largest difference is, its share of the largest gradient, and the common factor."""
    largest = max(g.abs().max().item() for g in want.values() if g is not None)
    worst, error, product, square = "", -1.0, 0.0, 0.0
    for name, dense in want.items():
        ours = got[name]
        if ours is None or dense is None:
            given = dense if ours is None else ours
            difference = 0.0 if given is None or not given.any() else float("inf")
        else:
            wide = torch.promote_types(dense.dtype, torch.float32)
            x, y = ours.to(wide), dense.to(wide)
            difference = (x - y).abs().max().item() / largest
            product += (x * y).sum(dtype=torch.float64).item() / largest**2
            square += (y * y).sum(dtype=torch.float64).item() / largest**2
        difference = float("inf") if math.isnan(difference) else difference
        if difference > error:
            worst, error = name, difference
    return worst, error, product / square


def _spacing(dtype: torch.dtype) -> float:
    """The spacing of the numbers next to 1 that products in `dtype` are as precise as."""
    precision = torch.get_float32_matmul_precision()
    if dtype == torch.float32 and precision != "highest":
        # TensorFloat32 has the significand of float16; "medium" permits that of bfloat16.
        dtype = torch.float16 if precision == "high" else torch.bfloat16
    return torch.finfo(dtype).eps
