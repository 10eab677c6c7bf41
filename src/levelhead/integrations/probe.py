"""What a model does between its output head and its loss, found by running it.

Language models scale (Cohere, Granite), cap (Gemma) or cut (padded vocabularies) the output of
their head before the loss, each under config fields of its own; some shift the labels, some do not,
and some compute their loss by themselves. A table of all that is wrong the day a model is added,
and wrong in silence. So the model's own forward runs with every module replaced by a stub, except
those that hold the head: the backbone answers zeros, the head answers known numbers, and what
arrives at the loss tells the rest. No weight is touched (a model on the meta device will do), and
whatever is not a scale, a cap and a cut before a cross-entropy is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import output_heads, path_of_head, refusal


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

    def at_temperature(self, temperature: float) -> HeadTransform:
        """The transform to the same logits divided by `temperature`, after the cap."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return replace(self, logit_scale=self.logit_scale / temperature, softcap=softcap)


def probe_head(model: nn.Module) -> HeadTransform:
    """What lies between the output head of `model` and its loss.

    The recovered numbers are exact where those of the model's config have at most six digits, and
    as precise as the model's own arithmetic elsewhere.

    Args:
        model: a language model; its weights are neither read nor written.

    Raises:
        ValueError: `output_heads` refuses the model, its loss is not the cross-entropy of its
            tokens, or the logits of that loss are not `HeadTransform(...)(head(hidden))`.
    """
    (head, *_), path = output_heads(model), path_of_head(model)
    with torch.device("cpu"), torch.enable_grad():
        labels = torch.tensor([[1, -100, 0], [-100, 0, 1]])
        z = _head_outputs(*labels.shape, head.out_features)
        hidden = torch.zeros(*labels.shape, head.in_features, dtype=z.dtype).as_subclass(_Hidden)
        call = _call_of_loss(model, path, z, hidden, labels)
        if call.labels is None:
            small = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
            own = _call_of_loss(model, path, small, hidden, labels)
            shift = _check_own_loss(model, own, labels)
            withheld = _call_of_loss(model, path, small, hidden, labels, withheld=True)
            _check_same_inputs(model, own.inputs, withheld.inputs)
        else:
            shift = _check_loss_function(model, call, labels)
        _check_logits(model, call, z)
        scale, softcap, vocab_size = _explain(model, call.logits, z)
    return HeadTransform(scale, softcap, vocab_size, shift, own_loss=call.labels is None)


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
    """The arguments a forward gives to its loss function, or what it returns without calling one."""

    logits: Any
    labels: Any = None
    vocab_size: Any = None
    options: Any = None
    loss: Any = None
    inputs: Any = None  # what its modules were called with

    def __post_init__(self) -> None:
        if isinstance(self.logits, Tensor):
            self.logits = self.logits.as_subclass(Tensor)


class _Hidden(Tensor):
    """Hidden states, and an answer to whatever else a model asks of what its modules return.

    A backbone's output gives its hidden states by name and as item 0; all that is optional in it is
    None. A part of the head gets the tensor itself.
    """

    @property
    def last_hidden_state(self) -> Tensor:
        return self

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):  # copy and its like must not take None for a method
            raise AttributeError(name)


class _Stub:
    """Answers a call with `answer`, keeping its `inputs`, and all else like the module it stands for.

    What has no parameters and is called with logits is no part of a backbone: it runs.
    """

    def __init__(self, module: Any, answer: Tensor, inputs: list[Any]) -> None:
        self._module = module
        self._answer = answer
        self._inputs = inputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given_logits = args and type(args[0]) is Tensor and args[0].is_floating_point()
        if given_logits and next(self._module.parameters(), None) is None:
            return self._module(*args, **kwargs)
        self._inputs.append((args, kwargs))
        return self._answer.clone()

    def __getattr__(self, name: str) -> Any:
        return self._stub(getattr(self._module, name))

    def __getitem__(self, index: Any) -> Any:
        return self._stub(self._module[index])

    def __len__(self) -> int:
        return len(self._module)

    def _stub(self, value: Any) -> Any:
        is_module = isinstance(value, nn.Module)
        return _Stub(value, self._answer, self._inputs) if is_module else value


def _call_of_loss(
    model: nn.Module,
    path: str,
    z: Tensor,
    hidden: Tensor,
    labels: Tensor,
    withheld: bool = False,
) -> _LossCall:
    """What the forward of `model` makes of z, the output of its head, on the way to its loss."""

    def stop(
        logits: Any = None, labels: Any = None, vocab_size: Any = None, **options: Any
    ) -> None:
        raise _LossCall(logits, labels, vocab_size, options)

    inputs: list[Any] = []
    shell = _hollow(model, path.split("."), z, hidden, inputs)
    shell.loss_function = stop
    given: dict[str, Any] = {
        "input_ids": torch.zeros_like(labels),
        # Must not change what the loss sees: a label on padding counts as any other.
        "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 0]]),
        "labels": labels.clone(),
    }
    if withheld:
        withhold_labels(model, given)
    try:
        output = shell.forward(**given)
        return _LossCall(output.logits, loss=output.loss, inputs=inputs)
    except _LossCall as call:
        return call
    except Exception as error:
        raise refusal(
            model,
            "its forward failed when patch_model ran it on text alone, with stubs for its modules "
            f"({type(error).__name__}: {error})",
            "Its forward must give the logits of all tokens and the labels to self.loss_function",
        ) from error


def withhold_labels(model: Any, given: dict[str, Any]) -> None:
    """Take the labels from the arguments of a forward, but do what else it does because of them."""
    labels = given.pop("labels", None)
    given.pop("shift_labels", None)
    inputs = (given.get("decoder_input_ids"), given.get("decoder_inputs_embeds"))
    if getattr(model.config, "is_encoder_decoder", False) and inputs == (None, None):
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    given.setdefault("use_cache", False)


def _hollow(
    module: nn.Module, path: list[str], z: Tensor, hidden: Tensor, inputs: list[Any]
) -> Any:
    """`module` in training mode with stubs for all below it but those on the path to the head."""
    children: dict[str, Any] = {}
    for name, child in module._modules.items():
        if child is None:
            children[name] = None
        elif name != path[0]:
            children[name] = _Stub(child, hidden, inputs)
        elif len(path) == 1:
            children[name] = _Stub(child, z, [])
        else:
            children[name] = _hollow(child, path[1:], z, hidden, inputs)
    shell = object.__new__(type(module))
    hooks: dict[str, Any] = {name: {} for name in vars(module) if name.endswith("_hooks")}
    vars(shell).update(vars(module), **hooks, _modules=children, training=True)
    vars(shell).pop("forward", None)  # Accelerate's, bound to the module itself
    return shell


def _check_same_inputs(model: nn.Module, own: list[Any], withheld: list[Any]) -> None:
    """Refuse a model that makes more of its labels than `withhold_labels` does."""

    def tensors(calls: list[Any]) -> list[dict[Any, Tensor]]:
        named = ({**dict(enumerate(args)), **kwargs} for args, kwargs in calls)
        return [{k: v for k, v in call.items() if isinstance(v, Tensor)} for call in named]

    a, b = tensors(own), tensors(withheld)
    if len(a) != len(b) or any(
        x.keys() != y.keys() or not all(torch.equal(x[name], y[name]) for name in x)
        for x, y in zip(a, b, strict=True)
    ):
        raise refusal(
            model,
            "it computes its loss itself, and more than its decoder_input_ids depends on the labels",
            "Train this model without the patch",
        )


def _check_loss_function(model: Any, call: _LossCall, labels: Tensor) -> bool:
    """Whether the `loss_function` of a model, as it calls it, shifts the labels.

    Refuses a model whose loss is not the cross-entropy of its tokens.
    """
    remedy = "The patch would replace its loss by one that differs; train it without the patch"
    if not isinstance(call.labels, Tensor) or not torch.equal(call.labels.cpu(), labels):
        raise refusal(model, "the labels do not reach its loss_function unchanged", remedy)
    logits = torch.randn(*labels.shape, 5, generator=torch.Generator().manual_seed(0))

    def loss(num_items: int | None) -> Tensor:
        options = call.options | {"num_items_in_batch": num_items}
        try:
            got = model.loss_function(logits=logits, labels=labels, vocab_size=5, **options)
            return torch.as_tensor(got)
        except Exception as error:
            reason = f"its loss_function failed on a probe ({type(error).__name__}: {error})"
            raise refusal(model, reason, remedy) from error

    shift = _shifts(model, loss(None), logits, labels)
    want = _cross_entropy(logits, labels, shift, reduction="sum") / 4
    if not torch.allclose(loss(4), want):
        reason = f"its loss_function gives {loss(4):.6g} for 4 items where the cross-entropy is {want:.6g}"
        raise refusal(model, reason, remedy)
    return shift


def _check_own_loss(model: Any, call: _LossCall, labels: Tensor) -> bool:
    """Whether a model that computes its loss itself shifts the labels; refuses what is no cross-entropy."""
    remedy = "Train this model without the patch"
    if not isinstance(call.loss, Tensor) or not isinstance(call.logits, Tensor):
        reason = "its loss does not go through loss_function, and its output has no loss and logits"
        raise refusal(model, reason, remedy)
    seq2seq = getattr(model.config, "is_encoder_decoder", False)
    if seq2seq and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        reason = (
            "it makes the inputs of its decoder from the labels inside its forward, and has no "
            "prepare_decoder_input_ids_from_labels with which patch_model could"
        )
        raise refusal(model, reason, remedy)
    return _shifts(model, call.loss, call.logits, labels)


def _shifts(model: nn.Module, loss: Tensor, logits: Tensor, labels: Tensor) -> bool:
    wants = [_cross_entropy(logits, labels, shift, "mean").item() for shift in (True, False)]
    for shift, want in zip((True, False), wants, strict=True):
        if torch.allclose(loss.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-5):
            return shift
    reason = (
        f"its loss is {loss:.6g} where the cross-entropy is {wants[0]:.6g} (with shifted labels) "
        f"or {wants[1]:.6g}"
    )
    remedy = "The patch would replace its loss by one that differs; train it without the patch"
    raise refusal(model, reason, remedy)


def _cross_entropy(logits: Tensor, labels: Tensor, shift: bool, reduction: str) -> Tensor:
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)


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


def _explain(model: nn.Module, logits: Tensor, z: Tensor) -> tuple[float, float | None, int | None]:
    """Scale, softcap and cut that map z to `logits`, up to the rounding of their type."""
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
    """A six-digit number, or the reciprocal of one, within `rounding` of `value`; else `value`."""
    if not 0 < value < float("inf"):
        return value
    for candidate in (float(f"{value:.6g}"), 1 / float(f"{1 / value:.6g}")):
        if abs(candidate - value) <= rounding * value:
            return candidate
    return value
