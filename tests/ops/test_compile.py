"""Under torch.compile: one graph, no breaks, no recompilation for another number of tokens, also from cold."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

import levelhead
from levelhead.ops import chunked

D, V = 8, 37
# A choice is made inside the operator, a name is checked outside of it.
RUNS = [
    (None, "cpu"),
    pytest.param(None, "cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def _step(
    function: Any, n: int, device: str = "cpu", **options: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    random = torch.Generator().manual_seed(n)
    x = torch.randn(n, D, generator=random).to(device).requires_grad_()
    weight = torch.randn(V, D, generator=random).to(device).requires_grad_()
    target = torch.randint(0, V, (n,), generator=random).to(device)
    loss = function(x, weight, target, **options)
    return loss, list(torch.autograd.grad(loss.sum(), (x, weight)))


# inductor says so whenever it compiles for a GPU that has them.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize(("impl", "device"), RUNS)
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_for_every_number_of_tokens(
    backend: str, reduction: str, impl: str | None, device: str
) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(
        levelhead.linear_cross_entropy, backend=counter, fullgraph=True, dynamic=True
    )
    options = {"reduction": reduction, "label_smoothing": 0.1, "softcap": 5.0, "impl": impl}
    compilations = []
    for n in (7, 12, 30):
        expected = _step(levelhead.linear_cross_entropy, n, device, **options)
        torch.testing.assert_close(_step(compiled, n, device, **options), expected)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_smoothing_tensor_changes_without_recompilation() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(levelhead.linear_cross_entropy, backend=counter, fullgraph=True)
    for eps in (0.0, 0.1, 0.25):
        expected = _step(levelhead.linear_cross_entropy, 9, label_smoothing=eps)
        actual = _step(compiled, 9, label_smoothing=torch.tensor(eps))
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def test_a_smoothing_number_that_changes_is_a_variable_from_then_on() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(levelhead.linear_cross_entropy, backend=counter, fullgraph=True)
    graphs = []
    for eps in (0.1, 0.25, 0.4, 0.1):
        expected = _step(levelhead.linear_cross_entropy, 9, label_smoothing=eps)
        torch.testing.assert_close(_step(compiled, 9, label_smoothing=eps), expected)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 2]


def test_statistics_and_entropy_in_one_graph() -> None:
    def entropy(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        stats = levelhead.linear_logit_stats(x, weight, target)
        return stats.logsumexp - stats.expected

    compiled = torch.compile(entropy, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(_step(compiled, 9), _step(entropy, 9))


def test_weights_that_sum_to_zero_have_zero_gradients() -> None:
    compiled = torch.compile(levelhead.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    loss, gradients = _step(compiled, 9, token_weight=torch.zeros(9))
    assert loss.isnan()
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    def loss(*args: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return levelhead.linear_cross_entropy(*args, label_smoothing=0.1)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(_step(compiled, 9), _step(loss, 9))


def test_the_gradient_is_taken_in_the_forward_pass_when_compiled_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    for name in ("linear_cross_entropy", "linear_logit_stats_backward"):
        function = getattr(chunked, name)

        def spy(*args: Any, _name: str = name, _function: Any = function) -> Any:
            calls.append(_name)
            return _function(*args)

        monkeypatch.setattr(chunked, name, spy)
    compiled = torch.compile(levelhead.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    _step(compiled, 9)
    assert calls == ["linear_cross_entropy"]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_backward_that_is_compiled_too(reduction: str) -> None:
    def gradients() -> list[torch.Tensor | None]:
        x, weight = torch.linspace(-1, 1, 9 * D).view(9, D), torch.linspace(-2, 1, V * D).view(V, D)
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        loss = levelhead.linear_cross_entropy(*leaves, torch.arange(9), reduction=reduction)
        (3 * loss.sum()).backward()
        return [leaf.grad for leaf in leaves]

    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        actual = gradients()
    torch.testing.assert_close(actual, gradients())


_COLD = """
import sys, torch, levelhead
import torch.nn.functional as F

device, *impl = sys.argv[1:]
compiled = torch.compile(levelhead.linear_cross_entropy, fullgraph=True, dynamic=True)
for n in (7, 12, 30):
    x = torch.randn(2, n, 8, device=device, requires_grad=True)
    weight = torch.randn(37, 8, device=device, requires_grad=True)
    target = torch.randint(0, 37, (2, n), device=device)
    loss = compiled(x, weight, target, label_smoothing=0.1, impl=impl[0] if impl else None)
    dense = F.cross_entropy((x @ weight.T).flatten(0, 1), target.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, dense)
    gradients = (torch.autograd.grad(value, (x, weight)) for value in (loss, dense))
    torch.testing.assert_close(*gradients)
counters = torch._dynamo.utils.counters
print(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "device"), RUNS)
def test_from_the_first_call_of_a_fresh_process(
    impl: str | None, device: str, tmp_path: Any
) -> None:
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }
    environment = os.environ | caches
    run = subprocess.run(
        [sys.executable, "-c", _COLD, device, *([impl] if impl else [])],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["1", "0"], run.stdout
