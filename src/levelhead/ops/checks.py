"""What the public functions refuse, before any kernel runs: what was asked, what came, what is valid, what to do."""

import importlib.util
import numbers
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.masked import MaskedTensor

IGNORE_INDEX = -100  # the target of a token without a loss, of torch and transformers
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Not infinity: a compiler takes every number for smaller, and would let infinity pass.
_LARGEST = sys.float_info.max
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensor(name: str, tensor: Any) -> None:
    """Refuse what is no dense tensor; and torch.jit.trace."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {tensor!r:.60}; {_cure(tensor)}")
    if tensor.is_nested:
        raise TypeError(
            f"{name} must have one shape for all sequences, got a nested tensor; give the tokens of all sequences in "
            f"one row, as {name}.values() of a jagged one has them, or pad with torch.nested.to_padded_tensor, and "
            "target with ignore_index"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {tensor.layout}; use {name}.to_dense()")
    if isinstance(tensor, MaskedTensor):
        raise TypeError(
            f"{name} must be a plain tensor, got a MaskedTensor; use {name}.to_tensor(value), with ignore_index for "
            "targets"
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise TypeError(
            "levelhead cannot be recorded by torch.jit.trace, which knows no argument that is a list of bool; use "
            "torch.export.export or torch.compile"
        )


def _cure(value: Any) -> str:
    if isinstance(value, torch.fx.Proxy):
        return (
            'so that torch.fx.symbolic_trace does not look inside, name the function: torch.fx.wrap("linear_cross_'
            'entropy") beside `from levelhead import linear_cross_entropy`, and others likewise; or use '
            "torch.export.export"
        )
    if hasattr(value, "__array__"):
        return "use torch.from_numpy"
    return "use torch.tensor" if isinstance(value, list | tuple) else "give a tensor"


def check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """Refuse tensors that do not make a linear layer."""
    named: dict[str, Any] = {"input": input, "linear_weight": linear_weight}
    if linear_bias is not None:
        named["linear_bias"] = linear_bias
    for name, tensor in named.items():
        check_tensor(name, tensor)
        if tensor.dtype not in _FLOATS:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            )
        if tensor.device != input.device:
            raise ValueError(
                f"{name} is on {tensor.device} but input is on {input.device}; move one of them"
            )
    if linear_weight.dim() != 2 or linear_weight.shape[0] == 0:
        raise ValueError(
            "linear_weight must have shape (V, D) with at least one vocabulary entry, "
            f"got {tuple(linear_weight.shape)}"
        )
    if input.dim() == 0 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            f"input must have shape (..., D) with D = {linear_weight.shape[1]} as in linear_weight "
            f"{tuple(linear_weight.shape)}, got {tuple(input.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise ValueError(
            f"linear_bias must have shape (V,) = ({linear_weight.shape[0]},), "
            f"got {tuple(linear_bias.shape)}"
        )
    _check_dtypes(input, linear_weight, linear_bias)


def _check_dtypes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    dtypes = {t.dtype for t in (linear_weight, linear_bias) if t is not None}
    if dtypes == {input.dtype}:
        return
    others = " and ".join(sorted(map(str, dtypes)))
    if not autocast_is_on(input.device.type):
        raise TypeError(
            f"input is {input.dtype} but linear_weight and linear_bias are {others}; "
            "cast them to one dtype, or use torch.autocast"
        )
    if torch.float64 in dtypes | {input.dtype}:
        raise TypeError(
            f"input is {input.dtype} but linear_weight and linear_bias are {others}; "
            "autocast leaves float64 alone, so cast them to one dtype"
        )


def any_dtensor(*tensors: object) -> bool:
    """Return whether one of the tensors is a DTensor, without importing what defines it."""
    return any(map(is_dtensor, tensors))


def is_dtensor(tensor: object) -> bool:
    """Return whether a tensor is a DTensor, without importing what defines it."""
    # Where nothing has imported it, nothing can be one.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor inside the wrappers of torch.func's transforms, of which a compiler has none."""
    if torch.compiler.is_compiling():
        return tensor
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def is_sharded(linear_weight: Tensor) -> bool:
    """Return whether a head is a DTensor that is not the same on all ranks."""
    linear_weight = unwrapped(linear_weight)
    return is_dtensor(linear_weight) and not all(
        placement.is_replicate()
        for placement in linear_weight.placements  # type: ignore[attr-defined]
    )


def check_transforms(linear_weight: Tensor) -> None:
    """Refuse a sharded head under torch.func."""
    if is_sharded(linear_weight) and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "levelhead does not run under a transform of torch.func (grad, vmap, jvp, functionalize, ...) where "
            "linear_weight is a sharded DTensor, whose ranks exchange statistics. Use loss.backward() or "
            "torch.autograd.grad, or gather the head with linear_weight.full_tensor()"
        )


def autocast_is_on(device_type: str) -> bool:
    """Return whether autocast is on for a device; meta has none, and would raise."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return what switches autocast off for a device, where it is on: to do it for nothing takes microseconds."""
    on = autocast_is_on(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def _check_number(name: str, value: object, without: str) -> None:
    """Refuse what is no real number; ``without``: what to give for no such thing."""
    if type(value) in (float, int):
        return
    if isinstance(value, bool) or not isinstance(
        value, numbers.Real | torch.SymInt | torch.SymFloat
    ):
        if isinstance(value, str) or getattr(value, "shape", None) == ():
            cure = f"use float({value!r})"
        else:
            cure = f"{without} is none"
        raise TypeError(f"{name} must be a number, got {value!r}; {cure}")


def is_variable(option: Any) -> bool:
    """Return whether an option is a tensor, or a number that a compiler takes for a variable."""
    if not torch.compiler.is_compiling() or isinstance(option, Tensor):
        return isinstance(option, Tensor)
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return option is not None and not has_static_value(option)


def _shown(number: object) -> str:
    """Return a number's text, which a compiler does not have of a variable."""
    return "another number" if is_variable(number) else str(number)


def _numbers(name: str, value: object, input: Tensor, without: str, trained: str) -> list[float]:
    """Return an option's number, if it can be looked at without a host synchronisation; refuse what is none.

    Args:
        name: of the option.
        value: a number, or a tensor with one.
        input: hidden states, on whose device a tensor must be, or on the CPU.
        without: what to give for no such thing.
        trained: what to do where the option is to be trained.
    """
    if not isinstance(value, Tensor):
        _check_number(name, value, without)
        if not torch.compiler.is_compiling() and isinstance(value, numbers.Real):
            return [float(value)]  # NumPy's float16 does not compare with the largest float64
        return [value]  # type: ignore[list-item]
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(
            f"{name} must be a number or a dense tensor with one, got {kind}; give a number"
        )
    if value.numel() != 1:
        raise ValueError(
            f"{name} must be a number or a tensor with one, got shape {tuple(value.shape)}"
        )
    if value.dtype not in _FLOATS + _INTEGERS:
        raise TypeError(f"{name} must be a number, got {value.dtype}")
    _check_option_device(name, value, input)
    if is_differentiated(value):
        raise ValueError(
            f"{name} requires a gradient, which levelhead does not compute: it would not be trained. Give "
            f"{name}.detach() to hold it fixed; to train it, {trained}"
        )
    found: list[float] = unwrapped(value).flatten().tolist() if can_look(value) else []
    return found


def _check_option_device(name: str, value: Tensor, input: Tensor) -> None:
    """Refuse a tensor on another device than input; a number on the CPU can be read from anywhere."""
    if value.device != input.device and not (value.is_cpu and value.numel() == 1):
        raise ValueError(
            f"{name} is on {value.device} but input is on {input.device}; move it there, or give a number"
        )


def is_differentiated(tensor: Tensor) -> bool:
    """Return whether a tensor requires a gradient or has a tangent, at any level of torch.func's transforms."""
    if (tensor.requires_grad and torch.is_grad_enabled()) or has_tangent(tensor):
        return True
    if torch.compiler.is_compiling() or not functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return is_differentiated(functorch.get_unwrapped(tensor))


def has_tangent(tensor: Tensor) -> bool:
    """Return whether a tensor has a tangent of forward-mode differentiation."""
    # A batch has none of its own, and torch has no rule to ask it.
    batched = not torch.compiler.is_compiling() and functorch.is_batchedtensor(tensor)
    if forward_ad._current_level < 0 or batched:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def check_options(
    softcap: float | Tensor | None, logit_scale: float | Tensor, impl: str | None, input: Tensor
) -> None:
    """Refuse options out of their range."""
    dense = "compute the loss from logits with torch.nn.functional.cross_entropy"
    caps = [] if softcap is None else _numbers("softcap", softcap, input, "None", dense)
    by_hand = "multiply input and linear_bias by it"
    scales = _numbers("logit_scale", logit_scale, input, "1.0", by_hand)
    for cap in caps:
        if not 0 < cap <= _LARGEST:
            raise ValueError(f"softcap must be a positive number or None, got {_shown(cap)}")
    for scale in scales:
        if not 0 < scale <= _LARGEST:
            raise ValueError(f"logit_scale must be a positive number, got {_shown(scale)}")
    if impl not in (None, "chunked", "reference", "triton"):
        raise ValueError(
            f"unknown impl {impl!r}; expected None, 'chunked', 'triton' or 'reference'"
        )
    cannot = why_not_triton(input.device, input.dtype) if impl == "triton" else None
    if cannot is not None:
        raise ValueError(f"impl='triton' cannot run: {cannot}; use impl=None or 'chunked'")


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the Triton kernels cannot run on a device and dtype, None if they can."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
            return "input is on cpu, and Triton needs a GPU (or TRITON_INTERPRET=1, to debug)"
        if dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
        return None
    if device.type != "cuda":
        return f"input is on {device}, and only GPUs of NVIDIA and AMD are supported"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def check_loss_options(
    label_smoothing: float | Tensor,
    reduction: str,
    z_loss: float | Tensor,
    input: Tensor,
    target: Tensor,
) -> None:
    """Refuse options of the loss out of their range."""
    if not isinstance(reduction, str):
        raise TypeError(
            f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}; 'none' is a loss for each token"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; expected 'mean', 'sum' or 'none'")
    by_hand = "add it times the square of the logsumexp that linear_logit_stats returns"
    for factor in _numbers("z_loss", z_loss, input, "0.0", by_hand):
        if not 0 <= factor <= _LARGEST:
            raise ValueError(f"z_loss must be a number >= 0, got {_shown(factor)}")
    if not isinstance(label_smoothing, Tensor):
        _check_number("label_smoothing", label_smoothing, "0.0")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {_shown(label_smoothing)}")
        return
    check_tensor("label_smoothing", label_smoothing)
    if label_smoothing.dtype not in _FLOATS:
        raise TypeError(f"label_smoothing must be floating point, got {label_smoothing.dtype}")
    if label_smoothing.dim() and label_smoothing.shape != target.shape:
        raise ValueError(
            f"label_smoothing must be a number, a 0-dim tensor or of target's shape "
            f"{tuple(target.shape)}, got shape {tuple(label_smoothing.shape)}"
        )
    _check_option_device("label_smoothing", label_smoothing, input)


def check_ids(name: str, ids: Tensor, input: Tensor, *, several: bool) -> None:
    """Refuse ids whose dtype, device or shape does not fit input; ``several``: (..., K) fits too."""
    check_tensor(name, ids)
    if ids.dtype not in _INTEGERS:
        hint = "; class probabilities are not supported" if ids.dtype in _FLOATS else ""
        raise TypeError(f"{name} must hold integer ids, got {ids.dtype}{hint}")
    if ids.device != input.device:
        raise ValueError(f"{name} is on {ids.device} but input is on {input.device}; move one")
    tokens = input.shape[:-1]
    if ids.shape == tokens or (several and ids.dim() and ids.shape[:-1] == tokens):
        return
    shapes = f"{tuple(tokens)} or {tuple(tokens)} + (K,)" if several else f"{tuple(tokens)}"
    raise ValueError(
        f"{name} must have shape {shapes} for input {tuple(input.shape)}, got {tuple(ids.shape)}"
    )


def check_token_weight(token_weight: Tensor, target: Tensor) -> None:
    """Refuse weights that do not fit the targets."""
    check_tensor("token_weight", token_weight)
    if token_weight.dtype not in _FLOATS:
        raise TypeError(f"token_weight must be floating point, got {token_weight.dtype}")
    if token_weight.device != target.device:
        raise ValueError(
            f"token_weight is on {token_weight.device} but target is on {target.device}; move one"
        )
    if token_weight.shape != target.shape:
        raise ValueError(
            f"token_weight must have target's shape {tuple(target.shape)}, "
            f"got {tuple(token_weight.shape)}"
        )


def can_look(tensor: Tensor) -> bool:
    """Return whether values can be looked at without a host synchronisation: of CPU tensors that nothing traces."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and _has_values(tensor)


def check_target_range(target: Tensor, vocabulary: int, ignore_index: int) -> bool:
    """Refuse targets outside the vocabulary; return False where looking at them would need a host synchronisation."""
    check_ignore_index(ignore_index)
    if not can_look(target):
        return False
    # Of a batch, the whole. Beside a narrow dtype a number is wrapped around before it is compared.
    target = unwrapped(target).long()
    if not target.numel():
        return True
    ids = target.masked_fill(target == ignore_index, 0)
    least, most = ids.aminmax()
    if least.item() < 0 or most.item() >= vocabulary:
        outside = (ids < 0) | (ids >= vocabulary)
        position = tuple(outside.nonzero()[0].tolist())
        raise IndexError(
            f"target{list(position)} is {target[position].item()}, outside [0, {vocabulary}) and not "
            f"ignore_index = {ignore_index}; {int(outside.sum())} of {target.numel()} targets are"
        )
    return True


def check_ignore_index(ignore_index: int) -> None:
    """Refuse what no id can be compared with."""
    every = "where every target counts, any that is no id, such as -100"
    if type(ignore_index) is not int and (
        isinstance(ignore_index, bool)
        or not isinstance(ignore_index, numbers.Integral | torch.SymInt)
    ):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}; {every}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit int64, got {ignore_index}; {every}")


def _has_values(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be read: not those of a DTensor, nor while make_fx records."""
    plain = type(tensor).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
    return plain and torch._C._get_dispatch_mode(_PROXY) is None and not is_recorded_early()


def is_recorded_early() -> bool:
    """Return whether make_fx(pre_dispatch=True) records."""
    mode = torch._ops._get_dispatch_mode_pre_dispatch(_PROXY)  # type: ignore[no-untyped-call]
    return mode is not None
