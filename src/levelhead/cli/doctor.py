"""`levelhead doctor`: what this machine will use, and whether it computes the right thing."""

import argparse
import importlib.metadata
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import levelhead
from levelhead.measure.gate import error_budget
from levelhead.ops.library import implementation

from .errors import WrongResultError, missing_extra

_DESCRIPTION = """\
Says on one screen what levelhead uses on this machine: device, implementation, versions,
and how to install what is missing. Then checks itself: values and gradients of
linear_cross_entropy in every dtype, on a small random problem, against PyTorch's dense path
in float64. An error may be twice that of the dense path in the same dtype, plus one rounding.
"""
_EPILOG = """\
example:
  levelhead doctor

exit codes:
  0    all results are right
  1    some are wrong
  2    an optional package is missing; stderr says which
"""
_EXTRAS = {
    "triton": None,  # comes with levelhead itself, where there is one
    "transformers": "transformers",
    "accelerate": "accelerate",
    "deepspeed": "deepspeed",
    "peft": "peft",
    "trl": "trl",
    "datasets": "sft",
    "matplotlib": "plot",
}
# First and last release that the tests have run with. Nothing forbids another one; `doctor` remarks on it.
TESTED = {"torch": ("2.11", "2.15"), "triton": ("3.6", "3.9"), "transformers": ("5.17", "5.24")}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_N, _D, _V = 64, 96, 1003  # no multiples of what kernels like


def add_parser(verbs: Any) -> None:
    """Adds `doctor` to the verbs of the command."""
    parser = verbs.add_parser(
        "doctor",
        help="say what this machine will use, and check that it computes the right thing",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)


def run(_arguments: argparse.Namespace) -> None:
    """Looks, checks and says.

    Raises:
        CliError: `rich` is missing.
        WrongResultError: A value or gradient is wrong.
    """
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ModuleNotFoundError as error:
        raise missing_extra(error, "cli", {"rich"}) from error
    console = Console()
    device = _device()
    facts = Table(show_header=False)
    for label, value in (*_machine(device), *_packages()):
        facts.add_row(label, escape(value))
    console.print(facts)

    began = time.perf_counter()
    checks = Table("self-check", "loss", "gradients")
    results = [_check(dtype, softcap, device) for dtype in _DTYPES for softcap in (None, 5.0)]
    for result in results:
        checks.add_row(result.label, _verdict(result.loss), _verdict(result.gradients))
    console.print(checks)
    console.print(
        "Errors as shares of what they may be. "
        f"{time.perf_counter() - began:.1f} seconds, {_N} tokens, vocabulary {_V}."
    )
    for result in results:
        if result.failure:
            console.print(f"{result.label}: {escape(result.failure)}")
    wrong = [result.label for result in results if not result.right]
    if wrong:
        raise WrongResultError(
            f"linear_cross_entropy is wrong on this machine in {', '.join(wrong)}; do not train "
            "with it. Please report it, with the tables above"
        )


def _device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _machine(device: torch.device) -> Iterator[tuple[str, str]]:
    yield "levelhead", levelhead.__version__
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    yield "torch", _remarked("torch", torch.__version__)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        yield (
            "device",
            f"{device.type}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute "
            f"capability {properties.major}.{properties.minor}",
        )
    else:
        yield "device", f"{device.type}: {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield "implementation", _implementation(device)


def _implementation(device: torch.device) -> str:
    """The `impl` that linear_cross_entropy chooses, seen by calling it."""
    chosen: list[str] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function is torch.ops.levelhead.linear_cross_entropy.default:
                names = [argument.name for argument in function._schema.arguments]
                module = implementation(args[names.index("impl")], args[0])
                chosen.append(module.__name__.rpartition(".")[2])
            return function(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        _check(torch.float32, None, device)
    return chosen[0] if chosen else "none: it fails before it chooses one"


def _packages() -> Iterator[tuple[str, str]]:
    for package, extra in _EXTRAS.items():
        try:
            yield package, _remarked(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            hint = f"; run: pip install 'levelhead[{extra}]'" if extra else ""
            yield package, f"not installed{hint}"


def _remarked(package: str, version: str) -> str:
    """The version, and what the tests have run with where that is another one."""
    if package not in TESTED:
        return version
    first, last = TESTED[package]
    if _release(first) <= _release(version) <= _release(last):
        return version
    return f"{version}; not among those tested, {first} to {last}"


def _release(version: str) -> list[int]:
    """Major and minor number: patches change nothing that a test would see."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


@dataclass(frozen=True)
class _Problem:
    """A smoothed linear cross-entropy with known operands."""

    input: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,)
    target: Tensor  # (N,), some of them ignored
    softcap: float | None

    @classmethod
    def random(cls, dtype: torch.dtype, softcap: float | None, device: torch.device) -> "_Problem":
        """The same problem at every call, with logits of a few units."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        target = torch.randint(0, _V, (_N,), generator=generator)
        target[::5] = -100
        weight = normal(_V, _D) * 3 / _D**0.5
        operands = (normal(_N, _D), weight, normal(_V))
        x, weight, bias = (operand.to(device, dtype) for operand in operands)
        return cls(x, weight, bias, target.to(device), softcap)

    def exact(self) -> "_Problem":
        """The same operands in float64, on the CPU: not every accelerator has float64."""
        x, weight, bias = (o.cpu().double() for o in (self.input, self.weight, self.bias))
        return _Problem(x, weight, bias, self.target.cpu(), self.softcap)

    def fused(self) -> list[Tensor]:
        """Mean loss and its gradients, by levelhead."""

        def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return levelhead.linear_cross_entropy(
                x,
                weight,
                self.target,
                linear_bias=bias,
                label_smoothing=0.1,
                softcap=self.softcap,
            )

        return self._differentiate(loss)

    def dense(self) -> list[Tensor]:
        """Mean loss and its gradients, from the logits."""
        counted = (self.target != -100).sum()
        return self._differentiate(lambda *operands: self.losses(*operands).sum() / counted)

    def losses(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The loss of every token, from the logits, for operands in place of the problem's own."""
        z = F.linear(x, weight, bias)
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        z = z if z.dtype == torch.float64 else z.float()
        return F.cross_entropy(z, self.target, label_smoothing=0.1, reduction="none")

    def token_losses(self) -> Tensor:
        """The loss of every token, from the logits."""
        return self.losses(self.input, self.weight, self.bias)

    def _differentiate(self, loss: Callable[..., Tensor]) -> list[Tensor]:
        operands = [o.detach().requires_grad_() for o in (self.input, self.weight, self.bias)]
        value = loss(*operands)
        return [value.detach(), *torch.autograd.grad(value, operands)]


class _Result(NamedTuple):
    """The errors of a dtype, as shares of what they may be; NaN where it fails altogether."""

    label: str
    loss: float
    gradients: float
    failure: str = ""

    @property
    def right(self) -> bool:
        return self.loss <= 1 and self.gradients <= 1  # false for NaN


def _check(dtype: torch.dtype, softcap: float | None, device: torch.device) -> _Result:
    label = str(dtype).removeprefix("torch.") + ("" if softcap is None else ", softcap")
    problem = _Problem.random(dtype, softcap, device)
    exact = problem.exact()
    try:
        (got_loss, *got), (true_loss, *true) = problem.fused(), exact.dense()
        # A single number, as the mean is, may by chance have no error: the yardstick is a token's.
        of_token = _error(problem.token_losses(), exact.token_losses())
        loss = _share_of_budget(got_loss, true_loss, of_token)
        gradients = [
            _share_of_budget(gradient, truth, _error(dense, truth))
            for gradient, truth, dense in zip(got, true, problem.dense()[1:], strict=True)
        ]
    except Exception as error:  # whatever it is, the other dtypes are of interest still
        return _Result(label, math.nan, math.nan, f"{type(error).__name__}: {error}")
    return _Result(label, loss, torch.tensor(gradients).max().item())  # unlike max(), keeps NaN


def _share_of_budget(actual: Tensor, truth: Tensor, dense_error: float) -> float:
    largest, rounding = truth.abs().max().item(), torch.finfo(actual.dtype).eps
    return _error(actual, truth) / error_budget(dense_error, largest, rounding)


def _error(actual: Tensor, truth: Tensor) -> float:
    return (actual.cpu().double() - truth).abs().max().item()


def _verdict(share: float) -> str:
    return f"[green]right[/] {share:.2f}" if share <= 1 else f"[red]wrong[/] {share:.3g}"
