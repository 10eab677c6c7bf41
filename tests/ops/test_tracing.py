"""What records a graph finds the operators in it, or is told what to use instead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functionalize, grad, linearize
from torch.fx.experimental.proxy_tensor import make_fx

import levelhead

D, V = 8, 37
LOSS = "levelhead.linear_cross_entropy.default"
STATS = "levelhead.linear_logit_stats.default"
BACKWARD = "levelhead.linear_logit_stats_backward.default"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _tensors(n: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(n)
    x, weight = torch.randn(n, D, generator=random), torch.randn(V, D, generator=random)
    return x, weight.requires_grad_(), torch.randint(V, (n,), generator=random)


def _mean(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return levelhead.linear_cross_entropy(x, weight, target, label_smoothing=0.1)


def _each(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return levelhead.linear_cross_entropy(x, weight, target, reduction="none").sum()


def _entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    stats = levelhead.linear_logit_stats(x, weight, target)
    return (stats.logsumexp - stats.expected).sum()


def _with_autograd(loss: Loss) -> Any:
    return lambda x, weight, target: torch.autograd.grad(loss(x, weight, target), weight)[0]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize(
    ("function", "operators"),
    [
        (_mean, [LOSS]),
        (_each, [STATS]),
        (_entropy, [STATS]),
        (_with_autograd(_mean), [LOSS]),
        (_with_autograd(_each), [STATS, BACKWARD]),
        (grad(_mean, 1), [STATS, BACKWARD]),
        (functionalize(_mean), [STATS]),  # it hides what needs a gradient
    ],
)
def test_make_fx(function: Any, operators: list[str], mode: str) -> None:
    graph = make_fx(function, tracing_mode=mode)(*_tensors(7))
    assert [str(n.target) for n in graph.graph.nodes if "levelhead" in str(n.target)] == operators
    other = _tensors(11 if mode == "symbolic" else 7)
    torch.testing.assert_close(graph(*other), function(*other))


@pytest.mark.parametrize("loss", [_mean, _each, _entropy])
def test_functionalize(loss: Loss) -> None:
    x, weight, target = _tensors(7)
    value = functionalize(loss)(x, weight, target)
    torch.testing.assert_close(value, loss(x, weight, target))
    found = torch.autograd.grad(value, weight)
    torch.testing.assert_close(found, torch.autograd.grad(loss(x, weight, target), weight))
    with pytest.raises(RuntimeError, match="Leave functionalize out: levelhead's operators change"):
        functionalize(grad(loss))(x, weight, target)


def test_the_module_is_one_node_of_a_symbolic_trace() -> None:
    module = levelhead.LinearCrossEntropyLoss(D, V, label_smoothing=0.1)
    graph = torch.fx.symbolic_trace(module)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert [call.target for call in calls] == [levelhead.linear_cross_entropy]
    x, _, target = _tensors(7)
    torch.testing.assert_close(graph(x, target), module(x, target))


TRACERS: dict[str, tuple[type[Exception], str, Callable[[Loss], Any]]] = {
    "torch.fx": (
        TypeError,
        r'name the function: torch\.fx\.wrap\("linear_cross_entropy"\)',
        torch.fx.symbolic_trace,
    ),
    "torch.jit": (
        TypeError,
        r"cannot be recorded by torch\.jit\.trace.* use torch\.export\.export or torch\.compile",
        lambda loss: torch.jit.trace(lambda x, t: loss(x, torch.ones(V, D), t), _tensors(7)[::2]),
    ),
    "linearize": (
        RuntimeError,
        "does not implement forward-mode differentiation",
        lambda loss: _linearised(loss, *_tensors(7)),
    ),
    "make_fx before dispatch": (
        RuntimeError,
        r"make_fx\(pre_dispatch=True\) cannot record a transform of torch\.func",
        lambda loss: make_fx(grad(loss), pre_dispatch=True)(*_tensors(7)),
    ),
}


def _linearised(loss: Loss, x: Tensor, *others: Tensor) -> Any:
    return linearize(lambda x: loss(x, *others), x)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("loss", [_mean, _each, _entropy])
def test_what_cannot_be_recorded_is_refused_with_the_way_out(loss: Loss, tracer: str) -> None:
    error, text, run = TRACERS[tracer]
    with pytest.raises(error, match=text):
        run(loss)
