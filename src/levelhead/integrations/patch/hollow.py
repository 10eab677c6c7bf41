"""Run the forward of a model with stubs for its modules, to see what happens between head and loss.

The backbone returns given hidden states and the head returns given logits; the rest of the forward is the model's own.
No weight is read or written, so a model on the meta device will do.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .heads import original_class, refusal


@dataclass
class HollowRun:
    """What a forward gave its loss function, and what it returned.

    Attributes:
        logits: what became of the head's output.
        labels: what the loss function was given; None: the forward did not call it.
        vocab_size: what the loss function was given.
        options: further keyword arguments of the loss function.
        returned: the loss that the loss function returned, ().
        leaf: the tensor that `returned` was made of, to differentiate by.
        output: what the forward returned; None if it was stopped at its loss.
        inputs: what its modules were called with.
        asked: attributes of its modules that it read and that a call may set, such as a router loss.
        left: the attributes of the model afterwards.
    """

    logits: Any = None
    labels: Any = None
    vocab_size: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    returned: Tensor | None = None
    leaf: Tensor | None = None
    output: Any = None
    inputs: list[Any] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    left: dict[str, Any] = field(default_factory=dict)


class _AtLoss(Exception):  # noqa: N818 (no error: the forward has come to its loss)
    """Stop a forward at its loss function."""


def run_hollow(
    model: Any,
    path: str,
    z: Tensor,
    hidden: Tensor,
    labels: Tensor,
    *,
    withheld: bool = False,
    past_loss: bool = False,
) -> HollowRun:
    """Run the forward of `model`, in training mode, with stubs in place of its modules.

    Args:
        model: a language model, patched or not; what runs is its own forward.
        path: where its head is.
        z: what its head returns, (B, T, V).
        hidden: what its other modules return, (B, T, D).
        labels: (B, T).
        withheld: run it without labels, as `withhold_labels` does.
        past_loss: go on after the loss function, which returns a number; else stop there.

    Raises:
        ValueError: the forward fails.
    """
    found = HollowRun()

    def loss_function(
        logits: Any = None, labels: Any = None, vocab_size: Any = None, *args: Any, **options: Any
    ) -> Tensor:
        if found.labels is not None:
            raise ValueError("it asks for its loss twice")
        if args:
            raise ValueError(f"its loss function is given {len(args)} positional arguments more")
        found.logits, found.labels, found.vocab_size = plain(logits), labels, vocab_size
        found.options = options
        if not past_loss:
            raise _AtLoss
        found.leaf = torch.full((), 2.5, dtype=found.logits.dtype, requires_grad=True)
        found.returned = found.leaf * 1  # a leaf could not be added to in place
        return found.returned

    answer = hidden.as_subclass(_Hidden)
    shell = _hollow(model, path.split("."), z, answer, found)
    original_class(model).loss_function.fset(shell, loss_function)
    mask = torch.ones_like(labels)
    mask[-1, ::2] = 0  # a loss must not read the mask: a label on padding counts like any other
    ids = torch.zeros_like(labels)
    if not is_builtin(original_class(model).forward):
        # What it makes of its labels may depend on the ids. Models of transformers get zeros: ids of image tokens
        # would ask for images.
        ids = labels.clamp(min=0)
    given: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels.clone(),
    }
    if "position_ids" in inspect.signature(type(shell).forward).parameters:
        length = labels.shape[-1]  # two packed sequences
        given["position_ids"] = (torch.arange(length) % -(-length // 2)).expand_as(labels)
    if withheld:
        withhold_labels(model, given)
    try:
        # A forward that draws random numbers must not change those that training draws.
        with torch.random.fork_rng([]):
            forward = type(shell).forward
            forward = getattr(forward, "_torchdynamo_orig_callable", forward)  # if it is compiled
            found.output = forward(shell, **accepted(type(shell), given))
        if found.labels is None:
            found.logits = plain(output_field(found.output, "logits"))
        found.left = vars(shell)
    except _AtLoss:
        pass
    except Exception as error:
        raise refusal(
            model,
            "its forward failed when patch_model ran it on text alone, with stubs for its modules "
            f"({type(error).__name__}: {error})",
            "Its forward must give the logits of all tokens and the labels to self.loss_function",
        ) from error
    return found


def accepted(cls: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that the forward of a class takes by name."""
    parameters = inspect.signature(cls.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return given
    return {name: value for name, value in given.items() if name in parameters}


def output_field(output: Any, name: str) -> Any:
    """Return the loss or the logits of what a forward returned: an output class, a dictionary or a tuple."""
    if is_mapping(output):
        return output.get(name)
    if type(output) in (tuple, list):
        position = ("loss", "logits").index(name)
        return output[position] if len(output) > position else None
    return getattr(output, name, None)


def output_fields(output: Any) -> dict[str, Any]:
    """Return all that a forward returned, by name; entries of a tuple after loss and logits, by position."""
    if isinstance(output, Mapping):
        return dict(output)
    if type(output) is tuple:
        names = ("loss", "logits", *map(str, range(2, len(output))))
        return dict(zip(names, output, strict=False))
    if hasattr(output, "_asdict"):
        return dict(output._asdict())
    return {f.name: getattr(output, f.name, None) for f in dataclasses.fields(output)}


def version(tensor: Any) -> int | None:
    """Return how often `tensor` was changed in place; None where torch does not count that."""
    if torch.compiler.is_compiling() or not isinstance(tensor, Tensor) or tensor.is_inference():
        return None
    return tensor._version


def is_mapping(output: Any) -> bool:
    """Return whether what a forward returned is a plain dictionary, and not an output class of transformers."""
    return isinstance(output, dict) and not hasattr(type(output), "to_tuple")


def is_builtin(function: Any) -> bool:
    """Return whether a function, and every function it wraps, is part of transformers."""
    packages = []
    while function is not None:
        # Not its __module__, which functools.wraps takes from what it decorates.
        name = getattr(function, "__globals__", {}).get("__name__")
        packages.append(str(name).partition(".")[0])
        function = getattr(function, "__wrapped__", None)
    return packages[-1:] == ["transformers"] and {*packages} <= {"transformers", "torch"}


_OTHERS = sys.stdlib_module_names | {
    *("torch", "transformers", "numpy", "accelerate", "deepspeed", "levelhead")
}


def is_of_users(thing: Any) -> bool:
    """Return whether a class or a function is the user's: in neither Python nor the libraries that train a model."""
    is_class = isinstance(thing, type)
    name = thing.__module__ if is_class else thing.__globals__.get("__name__")
    return str(name).partition(".")[0] not in _OTHERS


def withhold_labels(model: Any, given: dict[str, Any]) -> None:
    """Take the labels from the arguments of a forward, and do what the forward would do with them before its loss."""
    labels = given.pop("labels", None)
    given.pop("shift_labels", None)
    inputs = (given.get("decoder_input_ids"), given.get("decoder_inputs_embeds"))
    if getattr(model.config, "is_encoder_decoder", False) and inputs == (None, None):
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    given.setdefault("use_cache", False)


def plain(tensor: Any) -> Any:
    """Return what a stub answered as an ordinary tensor."""
    return tensor.as_subclass(Tensor) if isinstance(tensor, Tensor) else tensor


class _Hidden(Tensor):
    """Hidden states that also stand for the output of a backbone.

    Such an output gives its hidden states by name and as item 0; its optional fields are None.
    """

    @property
    def last_hidden_state(self) -> Tensor:
        return self

    @property
    def hidden_states(self) -> tuple[Tensor, ...]:
        return (self,)

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):  # copy and the like must not take None for a method
            raise AttributeError(name)


class _Stub:
    """Stand for a module: return `answer` when called, note the call in `found`, and pass on attributes.

    A module without parameters that is called with logits is no part of a backbone: it runs.
    """

    def __init__(self, module: Any, answer: Tensor, found: HollowRun, path: str) -> None:
        self._module = module
        self._answer = answer
        self._found = found
        self._path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given_logits = args and type(args[0]) is Tensor and args[0].is_floating_point()
        if given_logits and next(self._module.parameters(), None) is None:
            return self._module(*args, **kwargs)
        self._found.inputs.append((args, kwargs))
        batch, length, width = self._answer.shape
        out = getattr(self._module, "out_features", width)
        if isinstance(out, int) and out != width:  # a second head
            return normal(batch, length, out, seed=9)
        given = kwargs.get("inputs_embeds", args[0] if args else None)
        if isinstance(given, Tensor) and given.dim() == 3:
            length = given.shape[1]
        if length == self._answer.shape[1]:
            return self._answer.clone()
        return normal(batch, length, width, seed=9).as_subclass(_Hidden)  # with a soft prompt

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name, None)
        fixed = (nn.Module, nn.Parameter, int, str, torch.device, torch.dtype)
        if not isinstance(value, fixed) and not hasattr(value, "to_diff_dict"):
            self._found.asked.add(f"{self._path}.{name}")
        return self._stub(getattr(self._module, name), name)

    def __getitem__(self, index: Any) -> Any:
        return self._stub(self._module[index], str(index))

    def __len__(self) -> int:
        return len(self._module)

    def _stub(self, value: Any, name: str) -> Any:
        if not isinstance(value, nn.Module):
            return value
        return _Stub(value, self._answer, self._found, f"{self._path}.{name}")


class _Head(_Stub):
    """Stand for the head, which must be given the hidden states of all tokens, in their places."""

    def __call__(self, hidden: Any, *_args: Any, **_kwargs: Any) -> Any:
        given, whole = getattr(hidden, "shape", ()), self._answer.shape
        if given[:-1] != whole[:-1]:
            raise ValueError(
                f"its head is called with hidden states of shape {tuple(given)}, which are not those "
                f"of {whole[0]} rows of {whole[1]} tokens"
            )
        return self._answer.clone()


def _hollow(module: nn.Module, path: list[str], z: Tensor, hidden: Tensor, found: HollowRun) -> Any:
    """Copy `module`, in training mode, with stubs for its children except those on the path to the head."""
    children: dict[str, Any] = {}
    for name, child in module._modules.items():
        if name in ("loss_function", "_loss_function"):
            continue  # a loss function that is a module: torch keeps it as a child
        if child is None:
            children[name] = None
        elif name != path[0]:
            children[name] = _Stub(child, hidden, found, name)
        elif len(path) == 1:
            children[name] = _Head(child, z, HollowRun(), name)
        else:
            children[name] = _hollow(child, path[1:], z, hidden, found)
    shell = object.__new__(original_class(module))
    state = {k: v for k, v in vars(module).items() if k not in _PARTS}
    # A copy: what a forward counts or collects in the model must not include the probe.
    vars(shell).update(_copied(state, {}, 5))
    vars(shell).update(
        _modules=children,
        _buffers={k: None if v is None else v.clone() for k, v in module._buffers.items()},
        # All with gradients: a parameter that is frozen now may be trained later.
        _parameters={
            k: None if p is None else p.detach().clone().requires_grad_(p.is_floating_point())
            for k, p in module._parameters.items()
        },
        training=True,
    )
    vars(shell).update({name: {} for name in vars(module) if name.endswith("_hooks")})
    vars(shell).pop("forward", None)  # set by Accelerate, and bound to the module itself
    if "config" in vars(shell):
        vars(shell)["config"] = _without_router_losses(vars(shell)["config"])
    return shell


_PARTS = ("_modules", "_buffers", "_parameters", "_levelhead")


def _copied(value: Any, memo: dict[int, Any], depth: int) -> Any:
    """Copy a container or an object of the user's, `depth` levels deep; tensors are cloned."""
    if id(value) in memo or not depth:
        return memo.get(id(value), value)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.clone()
    of_users = is_of_users(type(value)) and hasattr(value, "__dict__")
    known = isinstance(value, (dict, list, set, collections.deque))
    if not known and (not of_users or isinstance(value, nn.Module)):
        return value
    try:
        kept = memo[id(value)] = copy.copy(value)
    except Exception:  # it cannot be copied, and the probe may change it
        return value
    if isinstance(value, list):
        kept[:] = [_copied(part, memo, depth - 1) for part in value]
    elif isinstance(value, dict):
        for name, part in value.items():
            dict.__setitem__(kept, name, _copied(part, memo, depth - 1))
    elif of_users:
        vars(kept).update(_copied(vars(value), memo, depth))
    return kept


def _without_router_losses(config: Any) -> Any:
    """Copy a config and switch router losses off: they need a real backbone, and no logits."""
    config = copy.copy(config)
    for name, value in vars(config).items():
        if name == "output_router_logits":
            vars(config)[name] = False
        elif hasattr(value, "to_diff_dict"):
            vars(config)[name] = _without_router_losses(value)
    return config


def normal(*shape: int, seed: int) -> Tensor:
    """Draw standard normal numbers, float64, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)  # or a refusal would come and go
    return torch.randn(shape, generator=generator, dtype=torch.float64)
