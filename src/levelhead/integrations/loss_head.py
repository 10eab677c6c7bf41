"""The head of a patched model, which computes the loss, and the call that tells it how.

Why the head computes the loss. Inside the call of the head, and only there, FSDP and ZeRO have
gathered its weight. So the model's forward stashes the labels, the head answers with the loss in
place of logits, and `loss_function`, which the model's own forward calls next, hands that loss
back. Whatever else the forward does (a router loss, say) stays its own. A model that computes its
loss by itself (BART, T5) is run without labels, and the loss set in its output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..ops import linear_cross_entropy
from ..ops.checks import is_dtensor
from .heads import intercepts_linear
from .probe import HeadTransform

IGNORE_INDEX = -100  # of transformers' losses


class Objective(Protocol):
    """A loss of tokens other than the smoothed cross-entropy; see `objective.py`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What it needs of a batch: names of tensors (B, ...) that the model's forward is given."""
        ...

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """The loss of each token, (..., T), 0 where there is none; called as set_objective says."""
        ...


@dataclass
class LossCall:
    """A forward with labels under way: what its head needs, and the loss the head leaves here."""

    transform: HeadTransform
    smoothing: float | Tensor
    factor: float  # on the loss
    target: Tensor  # (..., T) int64, the token to predict at each position
    num_items: int | Tensor | None
    keep_logits: bool
    objective: Objective | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    handed_back: bool = False

    def loss_function(self, logits: Tensor, labels: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """The loss the head left here, in place of one computed from `logits`."""
        if labels.shape != self.target.shape:
            raise RuntimeError(
                f"the model changed the labels from shape {tuple(self.target.shape)} to "
                f"{tuple(labels.shape)} on the way to its loss; patch_model cannot follow that"
            )
        return self.hand_back(logits)

    def compute(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
    ) -> Tensor:
        """The loss, (), of the logits of `hidden` (..., T, D)."""
        if self.objective is not None:
            losses = self.objective(
                hidden,
                weight,
                target,
                linear_bias=bias,
                softcap=self.transform.softcap,
                logit_scale=self.transform.logit_scale,
                **{name: column.to(hidden.device) for name, column in self.columns.items()},
            )
            return (losses * self._token_weight(hidden, target)).sum()
        return linear_cross_entropy(
            hidden,
            weight,
            target,
            linear_bias=bias,
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.smoothing,
            reduction="sum",
            softcap=self.transform.softcap,
            logit_scale=self.transform.logit_scale,
            # The op takes its gradient in the forward pass and rounds it once to the parameter's
            # dtype; a division of its result would rescale, and round, that gradient once more.
            token_weight=self._token_weight(hidden, target),
        )

    def _token_weight(self, hidden: Tensor, target: Tensor) -> Tensor:
        """`factor / num_items` in the shape of `target`; None stands for the valid tokens."""
        count = (target != IGNORE_INDEX).sum() if self.num_items is None else self.num_items
        if isinstance(count, Tensor):
            count = count.to(target.device)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        items = torch.ones(target.shape, dtype=dtype, device=target.device) * count
        # No valid token means loss 0, where 0 / 0 would poison every rank with NaN.
        return self.factor / items.where(items > 0, 1)

    def hand_back(self, logits: Tensor) -> Tensor:
        """The loss, for `logits` that are what the model made of the head's output."""
        # The stand-in is (1, 1, 1), or a bias (V,) was added to it. Logits that are kept are not asked for
        # their size, which torch.export would take for a constant.
        if self.loss is None or not (self.keep_logits or logits.shape[:-1].numel() == 1):
            raise RuntimeError(
                "the loss was asked for, but the patched head did not compute it: the head was "
                "replaced or wrapped after patch_model (by an adapter, quantisation or "
                "resize_token_embeddings). Undo that, or call unpatch_model and patch_model again; "
                "to train the head beside an adapter, list it in modules_to_save"
            )
        self.handed_back = True
        # Adds nothing, but leads the backward pass through whatever became of the head's output:
        # FSDP and ZeRO gather the head's weight in hooks on that tensor.
        # Of its one entry most ranks have none if a tensor-parallel head left its output in parts.
        part: Tensor = logits.to_local() if is_dtensor(logits) else logits  # type: ignore[attr-defined]
        return self.loss + 0.0 * part.reshape(-1)[:1].float().sum()


# The forward under way, if any. A module variable because a deepcopy of the model may copy
# the head apart from it; not thread-safe, which is why nn.DataParallel is refused.
_call: LossCall | None = None


def current_call() -> LossCall | None:
    """The forward under way, if any."""
    return _call


def run(call: LossCall | None, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `forward` as `call`; None hides an outer call from the heads of models inside it."""
    outer = _exchange(call)
    try:
        return forward(*args, **kwargs)
    finally:
        _exchange(outer)


def _exchange(call: LossCall | None) -> LossCall | None:
    """Make `call` the forward under way; return the one that was."""
    if not torch.compiler.is_compiling():
        return _set(call)
    # In torch.utils.checkpoint around the model the compiler refuses to trace a change of what is outside, because it
    # would not repeat it with the recomputed forward. There is nothing to repeat: `run` changes it back.
    from torch._dynamo.utils import _disable_side_effect_safety_checks_for_current_subtracer

    outer: LossCall | None = _disable_side_effect_safety_checks_for_current_subtracer(_set, call)
    return outer


def _set(call: LossCall | None) -> LossCall | None:
    global _call
    outer, _call = _call, call
    return outer


class LossHead(nn.Linear):
    """The head of a patched model: in a training call its output is the loss, shape (1, 1, 1)."""

    _levelhead_original: type = nn.Linear

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's argument name)
        """Logits (..., V) for hidden states (..., D) outside a training call, its loss within."""
        call = _call
        if call is None:
            return self._logits(input)
        if call.loss is not None:
            raise RuntimeError(
                "the head was called twice in one training forward, but patch_model knows the "
                "labels of one call only. Use unpatch_model to train this model"
            )
        call.loss = _head_loss(self, input, call)
        if call.keep_logits:
            return self._logits(input)
        # As many dimensions as logits have; no view, because models scale logits in place.
        loss = call.loss.reshape(1, 1, 1).clone()
        if is_dtensor(input):  # torch's tensor parallelism: its hooks want in return what they gave
            whole: Any = input
            loss = whole.from_local(loss, whole.device_mesh, whole.placements)
        return loss

    def _logits(self, input: Tensor) -> Tensor:  # noqa: A002
        # Tensor parallelism sets a forward on the instance, which patch_model has put aside.
        own: Callable[[Tensor], Tensor] = vars(self).get("_levelhead_forward", super().forward)
        return own(input)


@functools.cache
def loss_head(original: Any) -> Any:
    """`LossHead` for a head of class `original`, `torch.nn.Linear` or what FSDP2 made of it."""
    if issubclass(LossHead, original):
        return LossHead
    namespace = {"_levelhead_original": original}
    return type(LossHead.__name__, (LossHead, original), namespace)


def _head_loss(head: nn.Linear, hidden: Tensor, call: LossCall) -> Tensor:
    """The smoothed cross-entropy of the logits that `head` would give for `hidden` (..., T, D)."""
    target = call.target.to(hidden.device)
    if hidden.shape[:-1] != target.shape:
        raise ValueError(
            f"labels of shape {tuple(target.shape)} do not fit hidden states of shape "
            f"{tuple(hidden.shape)}: there must be one label per position"
        )
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
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
    return call.compute(hidden, weight, bias, target)
