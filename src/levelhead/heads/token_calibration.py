"""The calibration of a language model on ordinary text, token by token, as it is evaluated anyway."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import IGNORE_INDEX
from .head import find_head


class TokenCalibration:
    """Sums over the labelled tokens of a model's forward calls in eval mode, in bins of confidence.

    Hooks see the labels enter the model and the hidden states enter its head. There, where FSDP and
    ZeRO have gathered its weight, one more product with the head gives the statistics of the
    labelled positions, without their logits: confidence max_v p_v, whether the likeliest token is
    the label, and entropy. Calls in training mode and calls without labels pass.

    Args:
        model: a language model whose head `patch_model` would take, patched or not, maybe wrapped.
        bins: number of bins of equal width.

    Attributes:
        model: the model.
        sums: of the last labelled call in eval mode, (4, bins) float64 on the CPU: per bin the
            tokens, and the sums of their confidence, correctness and entropy; None: no such call.

    Raises:
        ValueError: the logits of the model are not what its head gives, scaled and capped.
    """

    def __init__(self, model: nn.Module, bins: int) -> None:
        self.model = model
        self.sums: Tensor | None = None
        self._head = find_head(model)
        # Only the inner edges, rounded as those of levelhead.calibration are.
        self._edges = torch.arange(1, bins, dtype=torch.float64) / bins
        self._names = list(inspect.signature(type(self._head.model).forward).parameters)[1:]
        self._target: Tensor | None = None
        inner = self._head.model
        self._handles = [inner.register_forward_pre_hook(self._enter, with_kwargs=True)]
        self._at_head: list[Any] = []

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in (*self._handles, *self._at_head):
            handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            return
        self._note(module, args, kwargs)

    # Sums outlive the call, which a compiled graph cannot have; in training it is never reached.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "_is_replica" in vars(module):
            raise RuntimeError(
                "token calibration does not run under torch.nn.DataParallel, whose threads would "
                "share one call; use torch.nn.parallel.DistributedDataParallel"
            )
        given = dict(zip(self._names, args, strict=False)) | kwargs
        labels, target = given.get("labels"), given.get("shift_labels")
        if target is None and labels is not None:
            shift = self._head.transform.shift
            target = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if shift else labels
        if target is not None:
            ignored = given.get("ignore_index", IGNORE_INDEX)
            target = _of_this_rank(target.masked_fill(target == ignored, IGNORE_INDEX))
        self._target = target
        # Anew in each call, so that they come last: behind the hooks that gather the weight, which
        # ZeRO registers when it wraps a model.
        for handle in self._at_head:
            handle.remove()
        self._at_head = [
            head.register_forward_pre_hook(self._measure) for head in self._head.modules
        ]

    def _measure(self, module: nn.Linear, args: tuple[Any, ...]) -> None:
        if module.training:
            return
        self._add(module, args[0])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _add(self, module: nn.Linear, hidden: Tensor) -> None:
        target, self._target = self._target, None
        if target is None:
            return
        target = target.to(hidden.device)
        if hidden.shape[:-1] != target.shape:
            raise ValueError(
                f"labels of shape {tuple(target.shape)} do not fit hidden states of shape "
                f"{tuple(hidden.shape)}: there must be one label per position"
            )
        labelled = target != IGNORE_INDEX
        target = target[labelled]
        stats = self._head.logit_stats(hidden[labelled], target, module=module)
        columns = (stats.confidence, (stats.argmax == target).to(stats.max), stats.entropy)
        confidence, correct, entropy = torch.stack(columns).cpu().double()
        index = torch.bucketize(confidence, self._edges, right=True)
        rows = (torch.ones_like(confidence), confidence, correct, entropy)
        bins = len(self._edges) + 1
        self.sums = torch.stack([torch.bincount(index, row, minlength=bins) for row in rows])


def summary(sums: Tensor) -> dict[str, float]:
    """The metrics of sums (4, bins): those of disjoint sets of tokens add up to those of all."""
    count, confidence, correct, entropy = sums
    tokens = count.sum()
    return {
        "ece": ((confidence - correct).abs().sum() / tokens).item(),
        "mean_confidence": (confidence.sum() / tokens).item(),
        "token_accuracy": (correct.sum() / tokens).item(),
        "entropy": (entropy.sum() / tokens).item(),
    }


def _of_this_rank(target: Tensor) -> Tensor:
    """`target` without the rows that a data loader has repeated to give every rank as many.

    As `accelerate.Accelerator.gather_for_metrics` does: of the last batch, over all ranks, the
    first `remainder` rows count.
    """
    from accelerate.state import GradientState, PartialState

    state: Any = GradientState()
    if not state.end_of_dataloader or state.remainder <= 0:
        return target
    first = PartialState().process_index * len(target)
    kept = max(state.remainder - first, 0)
    target = target.clone()
    target[kept:] = IGNORE_INDEX
    return target
