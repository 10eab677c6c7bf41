"""softcap, logit_scale and z_loss as tensors, or as numbers that change: right, compiled once, and never trained unseen."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.autograd.forward_ad as fw
from hypothesis import given
from hypothesis import strategies as st
from tests.problems import IMPLEMENTATIONS, Problem, assert_equal, gradients, problems
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad
from torch.func import vmap as over

import levelhead

D, V, N = 8, 37, 9
VALUES = {
    "softcap": (3.0, 4.0, 5.0, 3.0),
    "logit_scale": (0.5, 0.75, 1.0, 1.5),
    "z_loss": (0.0, 0.01, 0.03, 0.25),
}
NAMES = pytest.mark.parametrize("name", VALUES)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "none"])


def _tensors() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=random, dtype=torch.float64)
    weight = torch.randn(V, D, generator=random, dtype=torch.float64)
    target = torch.randint(V, (N,), generator=random)
    target[2] = -100
    return x.requires_grad_(), weight.requires_grad_(), target


X, W, T = _tensors()


def _run(function: Callable[..., Tensor], **options: Any) -> list[Tensor]:
    loss = function(X, W, T, **options)
    again = torch.autograd.grad(loss.sum(), (X, W), retain_graph=not _is_compiled(function))
    if _is_compiled(function):
        return [loss, *again]
    # The second backward recomputes the gradient, for which the tensor was kept as it was.
    return [loss, *again, *torch.autograd.grad(loss.sum(), (X, W))]


def _is_compiled(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@given(problems(), st.sampled_from(["()", "(1,)", "float32", "all"]))
def test_a_tensor_equals_the_number_it_holds(problem: Problem, kind: str) -> None:
    # Values that float32 holds, or the number were another one.
    number = {"softcap": problem.softcap, "logit_scale": 1.75, "z_loss": 0.0625}
    shape, dtype = ((1,) if kind == "(1,)" else ()), torch.float64
    dtype = torch.float32 if kind == "float32" else dtype
    tensor = {
        name: None if value is None else torch.full(shape, value, dtype=dtype)
        for name, value in number.items()
        if kind == "all" or name == "logit_scale"
    }
    expected = replace(problem, **number)
    actual = replace(expected, **tensor)
    loss, truth = actual.fused(), expected.fused()
    assert_equal(loss, truth)
    for value in tensor.values():
        if value is not None:
            value.fill_(7)  # a later step's: the backward is of this one
    assert_equal(gradients(loss, actual), gradients(truth, expected))
    assert_equal(gradients(loss, actual), gradients(truth, expected))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@NAMES
@REDUCTIONS
def test_every_implementation_reads_it(reduction: Any, name: str, impl: Any) -> None:
    for value in VALUES[name]:
        options: dict[str, Any] = {"reduction": reduction, "impl": impl, "label_smoothing": 0.1}
        expected = _run(levelhead.linear_cross_entropy, **options, **{name: value})
        tensor = torch.tensor(value, dtype=torch.float64)
        actual = _run(levelhead.linear_cross_entropy, **options, **{name: tensor})
        assert_equal(actual, expected)


# What a schedule may cost: label_smoothing, a graph for the first number and one for all that follow.
@pytest.mark.parametrize(("kind", "graphs"), [(torch.tensor, 1), (float, 2)])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@NAMES
@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.slow)])
def test_a_schedule_is_compiled_once(
    reduction: Any, name: str, backend: str, kind: Any, graphs: int
) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(levelhead.linear_cross_entropy, backend=counter, fullgraph=True)
    for value in (*VALUES[name], *VALUES[name]):
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1}
        expected = _run(levelhead.linear_cross_entropy, **options, **{name: value})[:3]
        actual = _run(compiled, **options, **{name: kind(value)})
        # A tensor() of a float is float32, and so is what the compiler makes of a number that changes.
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == graphs


@NAMES
def test_a_constant_stays_in_the_graph(name: str) -> None:
    """No tensor on the CPU stands in a graph, which CUDA graphs do not take, because of a number that never changes."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(levelhead.linear_cross_entropy, backend=counter, fullgraph=True)
    for _ in range(2):
        compiled(X, W, T, **{name: 0.5})
    (graph,) = counter.graphs
    (call,) = (n for n in graph.graph.nodes if "levelhead" in str(n.target))
    assert 0.5 in call.args
    assert call.args[-2] is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_z_loss_may_be_filled_anew_before_the_backward(reduction: Any) -> None:
    x, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    z_loss, target = torch.tensor(0.1, dtype=torch.float64), torch.arange(5)
    options = {"z_loss": z_loss, "reduction": reduction}
    expected = levelhead.linear_cross_entropy(x, weight, target, **options).sum()
    (expected,) = torch.autograd.grad(expected, x)
    loss = levelhead.linear_cross_entropy(x, weight, target, **options).sum()
    z_loss.fill_(7.0)
    torch.testing.assert_close(torch.autograd.grad(loss, x), (expected,))


def test_statistics_take_them_too() -> None:
    options = {"softcap": torch.tensor(3.0), "logit_scale": 1 / torch.tensor(2.0)}
    expected = levelhead.linear_logit_stats(X, W, T, softcap=3.0, logit_scale=0.5)
    assert_equal(levelhead.linear_logit_stats(X, W, T, **options), expected)


def test_the_module_holds_a_buffer_and_is_exported_with_it() -> None:
    module = levelhead.LinearCrossEntropyLoss(D, V, dtype=torch.float64)
    del module.logit_scale
    module.register_buffer("logit_scale", torch.tensor(0.5, dtype=torch.float64))
    program = torch.export.export(module, (X.detach(), T)).module()
    for scale in (0.5, 2.0):
        module.logit_scale.fill_(scale)
        program.logit_scale.fill_(scale)
        expected = levelhead.linear_cross_entropy(X, module.linear.weight, T, logit_scale=scale)
        assert_equal(module(X, T), expected)
        assert_equal(program(X.detach(), T), expected)


@NAMES
@REDUCTIONS
def test_a_batch_of_values(name: str, reduction: Any) -> None:
    values = torch.tensor(VALUES[name], dtype=torch.float64)

    def loss(weight: Tensor, value: Any) -> Tensor:
        return levelhead.linear_cross_entropy(X, weight, T, reduction=reduction, **{name: value})

    weight = W.detach()
    each = torch.stack([loss(weight, value) for value in VALUES[name]])
    assert_equal(over(loss, (None, 0))(weight, values), each)
    gradient = grad(lambda weight, value: loss(weight, value).sum())
    each = torch.stack([gradient(weight, value) for value in VALUES[name]])
    assert_equal(over(gradient, (None, 0))(weight, values), each)


REFUSALS = {
    "softcap": "to train it, compute the loss from logits with torch.nn.functional.cross_entropy",
    "logit_scale": "to train it, multiply input and linear_bias by it",
    "z_loss": "to train it, add it times the square of the logsumexp that linear_logit_stats returns",
}


@NAMES
def test_what_requires_a_gradient_is_refused_with_the_way_out(name: str) -> None:
    module = levelhead.LinearCrossEntropyLoss(
        D, V, dtype=torch.float64, **{name: nn.Parameter(torch.tensor(1.5))}
    )
    text = (
        f"{name} requires a gradient, which levelhead does not compute: it would not be trained. Give "
        f"{name}.detach() to hold it fixed; {REFUSALS[name]}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        module(X, T)
    with torch.no_grad():
        expected = levelhead.linear_cross_entropy(X, module.linear.weight, T, **{name: 1.5})
        assert_equal(module(X, T), expected)

    def loss(value: Tensor) -> Tensor:
        return levelhead.linear_cross_entropy(X, W, T, **{name: value})

    value = torch.tensor(1.5)
    with pytest.raises(ValueError, match=f"{name} requires a gradient"):
        grad(loss)(value)
    with fw.dual_level(), pytest.raises(ValueError, match=f"{name} requires a gradient"):
        loss(fw.make_dual(value, value))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"softcap": torch.tensor(-1.0)}, ValueError, "softcap must be a positive number or None, got -1.0"),
        ({"logit_scale": torch.tensor(torch.nan)}, ValueError, "logit_scale must be a positive number, got nan"),
        ({"z_loss": torch.tensor(-0.5)}, ValueError, "z_loss must be a number >= 0, got -0.5"),
        ({"logit_scale": torch.ones(2)}, ValueError, "logit_scale must be a number or a tensor with one, got shape (2,)"),
        ({"softcap": torch.tensor(True)}, TypeError, "softcap must be a number, got torch.bool"),
    ],
)  # fmt: skip
def test_values_that_can_be_looked_at_are(options: Any, error: Any, text: str) -> None:
    with pytest.raises(error) as caught:
        levelhead.linear_cross_entropy(X, W, T, **options)
    assert str(caught.value) == text


SMOOTHED = pytest.mark.parametrize("name", [*VALUES, "label_smoothing"])


@SMOOTHED
def test_a_tensor_on_another_device_is_refused(name: str) -> None:
    """A meta tensor among the arguments would have torch run the fake kernel, which computes nothing."""
    text = f"{name} is on meta but input is on cpu; move it there, or give a number"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        levelhead.linear_cross_entropy(X, W, T, **{name: torch.tensor(0.5, device="meta")})
    x, weight, target = (tensor.to("meta") for tensor in (X, W, T))
    for device in ("cpu", "meta"):  # a number on the CPU may be read from anywhere
        option = {name: torch.tensor(0.5, device=device)}
        assert levelhead.linear_cross_entropy(x, weight, target, **option).is_meta


# A nested tensor that is not jagged says that it is a prototype.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@SMOOTHED
def test_a_tensor_that_is_not_dense_is_refused(name: str) -> None:
    one = torch.tensor([0.5])
    nested = (torch.nested.nested_tensor([one], layout=k) for k in (torch.jagged, torch.strided))
    for value in (one.to_sparse(), one.to_mkldnn(), *nested):
        with pytest.raises(TypeError, match=f"^{name} must .*got .*; (give|use) "):
            levelhead.linear_cross_entropy(X, W, T, **{name: value})


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("value", [-1.0, torch.inf])
@SMOOTHED
def test_a_schedule_that_leaves_the_range_is_refused_when_compiled(
    name: str, value: float, fullgraph: bool
) -> None:
    # Dynamo refuses, or the call that it breaks off at: no backend has a say in it.
    compiled = torch.compile(levelhead.linear_cross_entropy, backend="eager", fullgraph=fullgraph)
    for valid in (0.25, 0.5):  # at the second it becomes a variable
        compiled(X, W, T, **{name: valid})
    # With a full graph the compiler's error quotes the text.
    error = torch._dynamo.exc.Unsupported if fullgraph else ValueError
    with pytest.raises(error, match=f"{name} must .*, got "):
        compiled(X, W, T, **{name: value})
