"""Find the layers that act as the output head of a model, and check that its loss can be computed in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ...ops.checks import is_dtensor

# The dtypes that the operators multiply. A float8 weight is a quantised one without its scales.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Where Accelerate keeps the forward that its hooks call, and where it puts it when they are removed.
BOUND_FORWARDS = ("_old_forward", "forward")


def refusal(model: nn.Module, reason: str, remedy: str) -> ValueError:
    """Return the error for a model that cannot be patched: the reason, and what to do."""
    return ValueError(f"patch_model cannot serve {type(model).__name__}: {reason}. {remedy}.")


def original_class(model: Any) -> Any:
    """Return the class of `model` without the patch."""
    return getattr(type(model), "_levelhead_original", type(model))


def class_path(instance: object) -> str:
    """Return the class of `instance` with its module: many classes are called Linear."""
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def language_model(model: nn.Module) -> nn.Module:
    """Return the module that returns the loss: `model` itself, or the one inside its wrappers.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is none that has an output head.
    """
    check_module(model)
    outermost = dict(_outermost(model))
    if not outermost:
        raise refusal(model, "it has no loss_function", "Pass a Hugging Face language model")
    # A wrapper may hold a language model beside others, such as a vision tower or a value head.
    owners = {path: m for path, m in outermost.items() if _embeddings(m) is not None}
    if len(owners) > 1:
        reason = f"it holds several language models, at {' and '.join(map(repr, owners))}"
        raise refusal(model, reason, "Pass the one to train")
    model = next(iter((owners or outermost).values()))
    if not isinstance(getattr(type(model), "loss_function", None), property):
        reason = "its class defines a loss_function of its own"
        raise refusal(
            model, reason, "Set it on the model before patch_model: model.loss_function = ..."
        )
    if _embeddings(model) is None:
        remedy = "Pass the Hugging Face language model that owns the head and returns the loss"
        raise refusal(model, "it has no output embeddings", remedy)
    return model


def _outermost(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the models with a loss function that are in no other such model, by path.

    A language model inside a larger model does not compute that model's loss.
    """
    if hasattr(
        type(model), "loss_function"
    ):  # on the class: wrappers forward what an instance is asked for
        yield path, model
        return
    for name, child in model.named_children():
        yield from _outermost(child, f"{path}.{name}" if path else name)


def check_module(model: Any) -> None:
    """Refuse what people give in place of a model: its name, its class, its weights, its trainer."""
    if isinstance(model, nn.Module):
        return
    kind = type(model).__name__
    if isinstance(getattr(model, "model", None), nn.Module):
        raise TypeError(f"a language model is needed, got the {kind} of one; pass its .model")
    names = isinstance(model, (str, Path))
    what = f"the class {model.__name__}" if isinstance(model, type) else kind
    raise TypeError(
        f"a language model is needed, got {repr(str(model)) if names else what}; load one first, as "
        "AutoModelForCausalLM.from_pretrained(name) does, and pass that"
    )


def output_heads(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers that act as output head of `model`: one, or one for each copy.

    Raises:
        ValueError: the loss cannot be taken inside a call of the head, because that is not just
            `torch.nn.Linear.forward` on a floating-point weight.
    """
    heads, path = linear_heads(model), path_of_head(model)
    owners = [".".join(path.split(".")[:depth]) for depth in range(path.count(".") + 1)]
    # The forward that transformers sets on a tensor-parallel head only gathers logits, which the loss does not need.
    exempt = [
        head
        for head in heads
        if is_dtensor(raw_weight(head)) and head.forward.__module__.startswith("transformers.")
    ]
    for module in (*(model.get_submodule(owner) for owner in owners), *heads):
        if _is_replaced(module) and module not in exempt:
            name = f"the {path}" if module in heads else f"the {type(module).__name__}"
            raise refusal(
                model,
                f"{name} forward was replaced on the instance",
                "Patch before offloading, dispatching and other patches; for what accelerate has "
                "prepared see levelhead.integrations.accelerate, for an SFTTrainer's model "
                "levelhead.integrations.trl",
            )
    return heads


def linear_heads(model: nn.Module) -> list[nn.Linear]:
    """Return the same as `output_heads`, whatever forward was set on the layers or on the modules around them.

    Raises:
        ValueError: one is no plain linear layer.
    """
    path = path_of_head(model)
    return [_checked(model, head, path) for head in _inner_heads(model.get_submodule(path))]


def raw_weight(head: Any) -> Tensor:
    """Return the weight of `head`; if it is parametrised, the parameter behind it, since computing it may change it."""
    if is_parametrized(head, "weight"):
        head = head.parametrizations["weight"]
        return next(iter(head.parameters()))  # type: ignore[no-any-return]
    return head.weight  # type: ignore[no-any-return]


def _embeddings(model: nn.Module) -> nn.Module | None:
    """Return what `model` names as its output head."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) else None


def inner_heads(model: nn.Module, path: str) -> list[nn.Module]:
    """Return the layers at the path that `path_of_head` found before, inside wrappers; [] if there is none now."""
    head: Any = model
    for name in path.split("."):
        head = head._modules.get(name)
        if head is None:
            return []
    return list(_inner_heads(head))


def is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Return whether `forward` is the forward of the class of `module`, bound to it."""
    function = getattr(forward, "__func__", None)
    return getattr(forward, "__self__", None) is module and function is type(module).forward


def _is_replaced(module: nn.Module) -> bool:
    """Return whether `module` has a forward other than that of its class; Accelerate's hooks do not count."""
    attributes = vars(module)
    inner = attributes.get("_old_forward" if "_hf_hook" in attributes else "forward")
    return "forward" in attributes and not is_own_forward(module, inner)


def intercepts_linear(weight: Tensor) -> bool:
    """Return whether `weight` is of a class that may multiply in its own way, as quantised ones do."""
    if type(weight) in (Tensor, nn.Parameter):
        return False
    own = getattr(type(weight).__torch_function__, "__func__", None)
    default: Any = Tensor.__torch_function__
    return own not in (None, default.__func__)


def path_of_head(model: nn.Module) -> str:
    """Return the path of the output head in `model`, wrappers included; raise ValueError if there is none."""
    head = _embeddings(model)
    paths: list[str] = [name for name, module in model.named_modules() if module is head]
    if not paths:
        raise refusal(
            model,
            "its output embeddings are not among its modules",
            "Train this model without the patch",
        )
    return paths[0]


def _inner_heads(head: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers inside the wrappers that compilers, FSDP and PEFT's modules_to_save put around a head."""
    for wrapper in ("_orig_mod", "_fsdp_wrapped_module"):
        if wrapper in head._modules:
            head = head._modules[wrapper] or head
    copies = head._modules.get("modules_to_save")
    if isinstance(copies, nn.ModuleDict):
        for copy in (head.get_submodule("original_module"), *copies.values()):
            yield from _inner_heads(copy)
    else:
        yield head


def _checked(model: nn.Module, head: Any, path: str) -> nn.Linear:
    """Return the head if it is a plain linear layer; refuse it if not."""
    # A head may be patched already: compiled regions share it with their original.
    if getattr(original_class(head), "forward", None) is not nn.Linear.forward:
        raise refusal(
            model,
            f"its head {path} is of class {class_path(head)}, not a plain torch.nn.Linear",
            "Keep the head out of quantisation and adapters, for example through "
            "llm_int8_skip_modules or target_modules; to train it beside an adapter, list it in "
            "modules_to_save",
        )
    weight = raw_weight(head)
    plain = type(weight) in (Tensor, nn.Parameter) or is_dtensor(weight)
    if not plain or weight.dtype not in _DTYPES:
        raise refusal(
            model,
            f"the weight of its head {path} is of class {class_path(weight)} and dtype "
            f"{weight.dtype}, not plain floating-point numbers",
            "Keep the head out of quantisation, for example through modules_to_not_convert",
        )
    linear: nn.Linear = head
    return linear
