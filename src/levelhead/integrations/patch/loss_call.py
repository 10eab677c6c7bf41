"""A forward of a patched model under way: what its head must compute, and checks that the loss is what was promised.

The head computes the loss, and the model's own forward goes on with it. What the model does on the way can change from
call to call: it may edit its labels, scale its logits by an argument, or give its loss an option. Each would make the
loss another one. So the call checks what arrives. Where looking takes no host synchronisation (eager on a CPU) a
difference raises; elsewhere it makes the loss NaN.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _functorch as functorch

from ...ops import linear_cross_entropy
from ...ops.checks import IGNORE_INDEX, can_look, is_dtensor
from .hollow import version
from .probe import HeadTransform
from .stand_in import ChangedError, StandIn, is_compiled, mark, no_logits

# How far the logits may be from what the probe found, relative: float32 operations may be done in another order.
_LOGITS_TOLERANCE = 1e-3

# What every loss function of transformers takes, and the patch does as well.
LOSS_OPTIONS = frozenset({"num_items_in_batch", "ignore_index", "shift_labels"})
# Arguments that only say what a forward returns, and that some forwards pass on to their loss function. The mask and
# the bounds of packed sequences are not among them: a loss may depend on those.
_OUTPUT_OPTIONS = frozenset(
    {
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "use_cache",
        "return_dict",
    }
)


class Objective(Protocol):
    """A loss per token other than the smoothed cross-entropy; see `set_objective`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of the tensors (B, ...) that it needs from a batch."""
        ...

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """Return the loss of each token, (..., T), 0 where it is ignored; `set_objective` says how it is called."""
        ...


@dataclass
class LossCall:
    """A forward with labels under way: what its head needs, and the loss that the head computed."""

    transform: HeadTransform  # of the loss
    own: HeadTransform  # what the model itself does with the output of its head
    smoothing: float | Tensor
    factor: float | Tensor  # on the loss
    target: Tensor  # (..., T) int64, the token to predict at each position, -100 for none
    num_items: int | Tensor | None
    labels: Tensor  # what the model's own forward is given, like the next two
    shift_labels: Tensor | None
    ignore_index: int
    honoured: (
        frozenset[str] | None
    )  # options of the model's loss that the patch does not know; None: any
    kept: bool  # whether the model returns the loss of its loss function unchanged
    keep_logits: bool
    objective: Objective | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    # What the head returned: the tensor, its version, and its numbers for some tokens, (N, V).
    answer: Any = None
    logits: Any = None  # what the model made of `answer`
    returned: Tensor | None = None  # the loss that the model's loss function returned
    handed_version: int | None = None  # the version of `returned` at that time

    def __post_init__(self) -> None:
        self._labels = _Given(self.labels)
        # Without shift_labels the model may make them itself. They must equal `target`, which no one else can change.
        self._shift_labels = None if self.shift_labels is None else _Given(self.shift_labels)
        self._mode = _mode()

    def loss_function(
        self, logits: Tensor, labels: Any, vocab_size: Any = None, *args: Any, **options: Any
    ) -> Tensor:
        """Return the loss that the head computed, in place of one computed from `logits`."""
        if self.returned is not None:
            raise ChangedError(
                "the model asked for its loss twice in one training forward, but patch_model knows "
                "the labels of one only. Use unpatch_model to train this model"
            )
        self._check_options(args, options)
        same = [self._labels.reaches("labels", labels), self._same_items(options)]
        shifted = options.get("shift_labels")
        if shifted is not None:
            want = self._shift_labels or _Given(self.target)
            same.append(want.reaches("shift_labels", shifted))
        elif self.shift_labels is not None:
            raise ChangedError(_edited("shift_labels", "by not passing them on"))
        return self.hand_back(logits, *same, vocab_size=vocab_size)

    def _check_options(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Refuse options that change the model's own loss in a way the patch does not know."""
        if options.get("ignore_index", IGNORE_INDEX) != self.ignore_index:
            raise ChangedError(
                f"the model gives its loss ignore_index={options.get('ignore_index', IGNORE_INDEX)} "
                f"where its forward was given {self.ignore_index}. Set labels that do not count to "
                f"{IGNORE_INDEX} in the data instead"
            )
        others = sorted(
            name
            for name, value in options.items()
            if value is not None
            and name not in LOSS_OPTIONS
            and name not in _OUTPUT_OPTIONS
            and (self.honoured is None or name in self.honoured)
        )
        if others or args:
            what = ", ".join(others) or f"{len(args)} positional arguments more"
            raise ChangedError(
                f"the model's loss function is called with {what}, which may change the loss, and "
                "patch_model does not know how. Leave that out, or use unpatch_model to train with it"
            )

    def _same_items(self, options: dict[str, Any]) -> bool | Tensor:
        """Return whether the loss function got the `num_items_in_batch` that the forward got."""
        given, arrived = self.num_items, options.get("num_items_in_batch")
        if arrived is given:
            return True
        same = given is not None and arrived is not None and arrived == given
        if isinstance(same, Tensor) and not can_look(same):
            return same.all()
        if not same:
            raise ChangedError(
                f"the forward was given num_items_in_batch={given} and gives its loss {arrived}, which "
                "divides by another number then. Let it hand its **kwargs on to self.loss_function"
            )
        return True

    def check_mode(self) -> None:
        """Refuse a head inside torch.utils.checkpoint, which would run it again when its call is over."""
        if torch.compiler.is_compiling():
            return
        (had_gradients, outer), (has_gradients, checkpoint) = self._mode, _mode()
        if had_gradients > has_gradients or checkpoint not in (None, outer):
            raise ChangedError(
                "the head runs in torch.utils.checkpoint, or with gradients disabled, within a forward "
                "that does not: in the backward pass it would run again, without its labels. Leave the "
                "head out of it; there are no logits that a checkpoint could save"
            )

    def compute(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
    ) -> Tensor:
        """Return the loss, (), for `hidden` (..., T, D)."""
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
        """Return `factor / num_items` in the shape of `target`; without num_items, the number of valid tokens."""
        count = (target != IGNORE_INDEX).sum() if self.num_items is None else self.num_items
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        if isinstance(count, Tensor):
            items = count.to(target.device, dtype)
        else:
            items = torch.ones((), dtype=dtype, device=target.device) * count
        # No valid token means loss 0, where 0 / 0 would poison every rank with NaN.
        items = items.masked_fill(items <= 0, 1)
        return (self.factor / items).expand(target.shape)

    def hand_back(
        self, logits: Tensor, *same: bool | Tensor, vocab_size: int | None = None
    ) -> Tensor:
        """Return the loss, after checking `logits`, which the model made of the head's output.

        Args:
            logits: the head's answer, after the model's own scale, cap and cut.
            same: whether other things are as expected; a tensor () that is False makes the loss NaN.
            vocab_size: the vocabulary size that the loss function was given; None: none.
        """
        if self.loss is None:
            raise ChangedError(
                "the loss was asked for, but the patched head did not compute it: the head was "
                "replaced, wrapped or given another forward after patch_model (by an adapter, quantisation or "
                "resize_token_embeddings), or it ran in another thread. Undo that, or call patch_model again; "
                "to train the head beside an adapter, list it in modules_to_save"
            )
        self.logits = logits
        with torch._C.DisableTorchFunctionSubclass():
            return self._hand_back(logits, same, vocab_size)

    def _hand_back(
        self, logits: Tensor, same: tuple[bool | Tensor, ...], vocab_size: int | None
    ) -> Tensor:
        # The stand-in is (1, 1, V). The size of logits that are kept is not compared: torch.export would take the
        # number of tokens for a constant.
        if not self.keep_logits and logits.shape[:-1].numel() != 1:
            raise ChangedError(
                f"the head answered for one token, and logits of shape {tuple(logits.shape)} reach the "
                f"loss: the model treats some tokens apart from the others. {_CURE}"
            )
        if self.answer[0].requires_grad and not logits.requires_grad:
            raise ChangedError(
                "the logits that reach the loss have no gradient, and those that the head gives have: something "
                f"detaches them. {_CURE}"
            )
        # A tensor-parallel head returns one number, since its logits lie on several ranks.
        whole = self.answer[2] is not None
        if whole and isinstance(vocab_size, int) and vocab_size != logits.shape[-1]:
            raise ChangedError(
                f"the loss is over {vocab_size} vocabulary entries, and {logits.shape[-1]} reach it. Make "
                "the vocabulary sizes of the model's config and its head agree"
            )
        # Adding 0 times the logits leads the backward pass through the head's output: FSDP and ZeRO gather the head's
        # weight in hooks on that tensor. If a tensor-parallel head left its output in parts, most ranks hold no entry.
        part: Tensor = logits.to_local() if is_dtensor(logits) else logits  # type: ignore[attr-defined]
        anchor = 0.0 * part.reshape(-1)[:1].sum()
        for expected in (self._as_probed(logits, part), *same):
            if isinstance(expected, Tensor):
                anchor = anchor.masked_fill(~expected, torch.nan)
        self.lead_through(anchor)
        loss: Any = self.loss
        self.returned = loss + anchor
        self.handed_version = version(self.returned)
        if self.keep_logits:
            return self.returned
        mark(logits)
        # Compiled code and torch.jit.script do not follow stand-ins. So the logits become NaN, and with them all that
        # the model makes of them from here on. No gradient flows from here to the head, so none becomes NaN. Anomaly
        # detection would still complain, and torch.vmap does not allow it.
        answer, compiling = self.answer[0], torch.compiler.is_compiling()
        if not compiling and (torch.is_anomaly_enabled() or _is_batched(part)):
            return self.returned
        if compiling and self._is_plain() and logits is not answer and logits.dtype == answer.dtype:
            return (
                self.returned
            )  # a view from an earlier graph, as of a hook of ZeRO-3: no compiler changes it
        for tensor in (logits,) if logits is answer else (logits, answer):
            if type(tensor) in (Tensor, StandIn):  # no DTensor, and not while torch.export records
                tensor.data.fill_(torch.nan)
        return self.returned

    def _is_plain(self) -> bool:
        """Return whether the model's logits are the output of its head, unchanged."""
        own = self.own
        return own.logit_scale == 1 and own.softcap is None and own.vocab_size is None

    def lead_through(self, anchor: Tensor) -> None:
        """Add `anchor`, (), to results other than the loss; it is 0, or NaN if the loss is."""

    def _as_probed(self, logits: Tensor, part: Tensor) -> bool | Tensor:
        """Return whether the model did with the head's output what the probe found; one token shows it."""
        answer, before, sent = self.answer
        own = self.own
        untouched = logits is answer and version(logits) == before
        if self._is_plain() and untouched and not torch.compiler.is_compiling():
            return True
        if sent is None:
            return True
        want = own(sent.to(torch.promote_types(sent.dtype, torch.float32)))
        size = want.shape[-1]
        if part.shape[-1] != size:
            raise ChangedError(
                f"{part.shape[-1]} of {sent.shape[-1]} vocabulary entries reach the loss, where "
                f"patch_model found {size}. {_CURE}"
            )
        got = some_tokens(part) if self.keep_logits else part.detach().reshape(1, size)
        tolerance = max(_LOGITS_TOLERANCE, 8 * torch.finfo(sent.dtype).eps)
        finite = want.isfinite()
        near = ((got - want).abs() <= tolerance * want.abs().clamp(min=tolerance)) | ~finite
        # Over a whole vocabulary rounding goes up as often as down. So a factor on all entries shows even where it is
        # smaller than the rounding of one.
        want = want.where(finite, 0)
        square = want.square().sum()
        factor = (want * got.where(finite, 0)).sum() / square
        limit = max(_LOGITS_TOLERANCE, torch.finfo(sent.dtype).eps / 2)
        scaled = ((factor - 1).abs() > limit) & (square > 0)
        if _is_batched(part) or not can_look(part):
            return near.all() & ~scaled
        if near.all() and scaled:
            raise ChangedError(
                f"the output of the head reaches the loss multiplied by {factor.item():.6g}: an argument of this "
                f"call, a hook or something in the model acts on its logits. {_CURE}"
            )
        if not near.all():
            at = tuple((~near).nonzero()[0].tolist())
            raise ChangedError(
                f"the output {sent[at].item():.6g} of the head for vocabulary entry {at[1]} reaches "
                f"the loss as {got[at].item():.6g}, where patch_model found "
                f"{want[at].item():.6g}: an argument of this call, a hook or something in the model "
                f"acts on its logits. {_CURE}"
            )
        return True

    def check_returned(self, loss: Any) -> None:
        """Refuse a loss to which the model has added a term that depends on its logits."""
        if isinstance(loss, StandIn):
            raise no_logits("its loss depends on them")
        untouched = loss is self.returned and version(loss) == self.handed_version
        if untouched or self.keep_logits or self.loss is None or not isinstance(loss, Tensor):
            return
        is_nan = can_look(loss) and bool(loss.isnan().any()) and not bool(self.loss.isnan())
        if is_nan:
            raise no_logits("its loss depends on them")
        if self.kept and is_compiled():
            raise ChangedError(
                "the model changes its loss after loss_function, which it did not do when it was patched, "
                "and in compiled code nobody sees whether by a term made of its logits, of which there "
                "are none. Leave that out, run the model without torch.compile, where other terms are "
                "served, or call it with skip_logits=False"
            )


_CURE = (
    "patch_model cannot follow that. If the model was changed, call patch_model again; if it is an "
    "argument or a hook, leave it out or use unpatch_model"
)


def some_tokens(logits: Tensor) -> Tensor:
    """Copy the logits of the first and of the last token, (2, V)."""
    logits = logits.detach().reshape(-1, logits.shape[-1])
    return torch.cat([logits[:1], logits[-1:]])


def _mode() -> tuple[bool, Any]:
    """Return whether gradients are enabled, and the innermost checkpoint under way; None in compiled code."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled(), None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    checkpoint = hooks and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"
    return torch.is_grad_enabled(), hooks[0] if checkpoint else None


def _is_batched(tensor: Tensor) -> bool:
    """Return whether torch.vmap has made `tensor` a batch, one for each sample."""
    if torch.compiler.is_compiling():
        return False
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


class _Given:
    """Labels that a forward was given, to check that they reach the loss unchanged."""

    def __init__(self, labels: Tensor) -> None:
        self._labels = labels
        self._before = version(labels)
        # A copy, because a change through .data or NumPy does not raise the version.
        self._copy = labels.clone() if can_look(labels) else labels

    def reaches(self, name: str, arrived: Any) -> bool | Tensor:
        """Return whether the same labels arrived; a Tensor () where looking would take a synchronisation."""
        given = self._labels
        if not isinstance(arrived, Tensor):
            raise ChangedError(_edited(name, f"from {_kind(given)} to {_kind(arrived)}"))
        if arrived.shape != given.shape:
            change = f"from shape {tuple(given.shape)} to {tuple(arrived.shape)}"
            raise ChangedError(_edited(name, change))
        if _is_batched(arrived):  # values cannot be read under torch.vmap
            return (arrived == self._copy).all()
        if can_look(arrived) and self._copy.device == arrived.device:
            if not torch.equal(arrived, self._copy):
                at = tuple((arrived != self._copy).nonzero()[0].tolist())
                change = f"at {list(at)} from {self._copy[at].item()} to {arrived[at].item()}"
                raise ChangedError(_edited(name, change))
            return True
        if arrived is not given:
            return (arrived == given.to(arrived.device)).all()
        now = version(given)
        if now not in (self._before, None):  # None: the forward alone is compiled
            raise ChangedError(_edited(name, "in place"))
        return True


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _edited(name: str, change: str) -> str:
    return (
        f"the model changed the {name} {change} on the way to its loss; patch_model cannot follow "
        "that. Make the change in the data, before the model is called, or use unpatch_model"
    )


class NoLoss(enum.Enum):
    """A forward under way that computes no loss of ours."""

    LEFT_ALONE = enum.auto()  # the model computes it as without the patch
    WITHOUT_LABELS = enum.auto()  # the model must not ask for a loss: the patch saw no labels


@dataclass(frozen=True)
class Shown:
    """No forward is under way: the model is being printed, with these options at its head."""

    options: str


UnderWay = LossCall | NoLoss | Shown | None


class _Thread(threading.local):
    """What is under way in this thread.

    Not a `contextvars` variable, which torch.compile does not trace, and not an attribute of the
    model: a deepcopy may copy its head apart from it.
    """

    def __init__(self) -> None:
        # In a list: at a graph break the compiler would lose a change of the attribute itself.
        self.call: list[UnderWay] = [None]


_thread = _Thread()


def under_way() -> UnderWay:
    """Return what the patched model that runs in this thread was called for; None: no one runs."""
    return _thread.call[0]


def run(call: UnderWay, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `forward` as `call`; calls may be nested."""
    outer = _exchange(call)
    try:
        return forward(*args, **kwargs)
    finally:
        _exchange(outer)


def _exchange(call: UnderWay) -> UnderWay:
    """Set what is under way; return what was."""
    if not torch.compiler.is_compiling():
        return _set(call)
    # In torch.utils.checkpoint around the model the compiler refuses to trace a side effect, because it would not
    # repeat it when it recomputes the forward. There is nothing to repeat: `run` undoes it.
    from torch._dynamo.utils import _disable_side_effect_safety_checks_for_current_subtracer

    outer: UnderWay = _disable_side_effect_safety_checks_for_current_subtracer(_set, call)
    return outer


def _set(call: UnderWay) -> UnderWay:
    cell = _thread.call
    outer, cell[0] = cell[0], call
    return outer
