"""What Inductor allocates around the operator: no copy of the hidden states, one buffer fewer than around a GEMM.

Every case is RMSNorm(hidden) -> loss, compiled forward and backward, with three losses: ours; the dense one, whose
head is an ``aten.mm``; and a bare sum, which needs no head. Counted is what the generated code allocates of the size
of the hidden states, (N, D).
"""

import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering

import levelhead

B, T, D, V = 3, 8, 32, 101  # nothing else has B * T * D = 768 or B * (T - 1) * D = 672 entries
_HIDDEN = (B * T * D, B * (T - 1) * D)
_ALLOCATION = re.compile(r"(\w+) = empty_strided_cpu\(\(([\d, ]*)\), \([\d, ]*\), torch\.(\w+)\)")
_RETURN = re.compile(r"^ +return \((.*)\)$", re.MULTILINE)


class Code:
    """The generated code of one graph: what it allocates; a buffer in another's place allocates nothing."""

    def __init__(self, source: str) -> None:
        self._allocated = {
            name: (math.prod(map(int, re.findall(r"\d+", shape))), dtype)
            for name, shape, dtype in _ALLOCATION.findall(source)
        }
        (self._returned,) = _RETURN.findall(source)

    def allocated(self, *entries: int) -> dict[str, str]:
        """The buffers of so many entries, as many as hidden states have by default; and their dtypes."""
        entries = entries or _HIDDEN
        return {name: dtype for name, (size, dtype) in self._allocated.items() if size in entries}

    def dtypes(self, *entries: int) -> list[str]:
        return list(self.allocated(*entries).values())

    def kept(self, *entries: int) -> list[str]:
        """Those it returns; a forward graph hands them to the backward one."""
        return [
            name for name in self.allocated(*entries) if re.search(rf"\b{name}\b", self._returned)
        ]


@pytest.fixture(autouse=True)
def no_caches_left() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def _generate(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Code, Code]:
    """The code that Inductor generates for a training step, forward and backward.

    The graphs run as they are, in ATen: the kernels, of which nothing is read here, take seconds to compile.
    """
    sources: list[str] = []

    def generate(graph: GraphLowering) -> Any:
        sources.append(graph.codegen()[0].value)
        return mock.Mock()

    def inner(graph: Any, inputs: Any, **options: Any) -> Any:
        run = copy.deepcopy(graph)  # Inductor rewrites the graph
        compile_fx_inner(graph, inputs, **options)
        return make_boxed_func(run)

    def backend(graph: Any, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=inner)

    torch._dynamo.reset()
    with (
        mock.patch.object(GraphLowering, "compile_to_module", generate),
        torch._inductor.config.patch({"fx_graph_cache": False, "cpp.simdlen": 1}),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        torch.compile(function, backend=backend, fullgraph=True)(*inputs).backward()
    forward, backward = map(Code, sources)
    return forward, backward


# The losses.


def ours(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return levelhead.linear_cross_entropy(x, weight, target, label_smoothing=0.1)


def ours_per_token(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    losses = levelhead.linear_cross_entropy(
        x, weight, target, label_smoothing=0.1, reduction="none"
    )
    return losses.sum()


def ours_frozen(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return ours(x, weight.detach(), target)


def dense(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(x, weight).flatten(0, -2)
    return F.cross_entropy(logits.float(), target.flatten(), label_smoothing=0.1)


def bare(x: Tensor, _weight: Tensor, _target: Tensor) -> Tensor:
    return (x * 0.5).sum()


OURS = [ours, ours_per_token, ours_frozen]


def _step(loss: Any, hidden: Tensor, autocast: bool = False) -> Callable[..., Tensor]:
    norm = nn.RMSNorm(D).to(hidden.dtype)
    weight = torch.randn(V, D, dtype=hidden.dtype, requires_grad=True)

    def step(hidden: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return loss(norm(hidden), weight, labels)

    return step


def _hidden(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, D, dtype=dtype, requires_grad=True)


def _labels(*shape: int) -> Tensor:
    return torch.randint(0, V, shape)


def _shift(labels: Tensor) -> Tensor:
    """Shift as transformers does: every position stays, and the last is ignored."""
    return F.pad(labels, (0, 1), value=-100)[..., 1:]


def _shifted(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda hidden, labels: step(hidden, _shift(labels))


def _sliced(loss: Any, weight: Tensor) -> Callable[..., Tensor]:
    """Shift as older training code does: without the last position, which predicts nothing."""
    return lambda x, labels: loss(x[:, :-1], weight, labels[:, 1:])


@pytest.mark.parametrize(
    ("shape", "dtype"), [((B * T,), torch.float32), ((B, T), torch.bfloat16)], ids=["flat", "batch"]
)
def test_nothing_is_copied(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def generate(loss: Any) -> tuple[Code, Code]:
        hidden = _hidden(*shape, dtype=dtype)
        step = _step(loss, hidden)
        return _generate(_shifted(step) if len(shape) > 1 else step, hidden, _labels(*shape))

    one = [str(dtype).removeprefix("torch.")]
    forward, backward = generate(bare)
    assert forward.dtypes() == []  # the norm is computed into the sum
    assert backward.dtypes() == one  # the gradient of hidden
    forward, backward = generate(dense)
    assert forward.dtypes() == one  # what the norm gives, which the GEMM reads
    assert forward.kept() == list(forward.allocated())  # for the gradient of the weight
    assert backward.dtypes() == one  # what the GEMM gives; the gradient of hidden takes its place
    for loss in OURS:
        forward, backward = generate(loss)
        assert forward.dtypes() == one  # what the norm gives, which the operator reads
        # The operator has both gradients by then, or reads its input once more, if it is per token.
        assert forward.kept() == ([*forward.allocated()] if loss is ours_per_token else [])
        assert backward.dtypes() == []  # the gradient of hidden takes that of the operator's own


def test_float16_adds_the_rounding_of_a_wide_gradient() -> None:
    hidden = _hidden(B, T, dtype=torch.float16)
    forward, backward = _generate(_shifted(_step(ours, hidden)), hidden, _labels(B, T))
    assert forward.dtypes() == ["float16"]
    # The operator's gradient is float32, so that a loss scale finds what float16 would have lost;
    # the gradient of hidden cannot take its place.
    assert backward.dtypes() == ["float16"]


def test_under_autocast_the_one_cast_is_the_one_of_a_linear_layer() -> None:
    def generate(loss: Any) -> tuple[Code, Code]:
        hidden = _hidden(B, T)
        return _generate(_shifted(_step(loss, hidden, autocast=True)), hidden, _labels(B, T))

    forward, backward = generate(dense)
    assert forward.dtypes() == ["bfloat16"]  # what the float32 norm gives, cast as it is computed
    assert backward.dtypes() == ["bfloat16", "float32"]  # from the GEMM; the gradient of hidden
    # Of the float32 weight (V, D) a linear layer needs a narrow copy, and of its gradient another.
    assert forward.dtypes(V * D) == ["bfloat16"]
    assert backward.dtypes(V * D) == ["bfloat16", "float32"]
    for loss in (ours, ours_per_token):
        forward, backward = generate(loss)
        assert forward.dtypes() == ["bfloat16"]  # the same
        assert backward.dtypes() == ["float32"]  # the gradient of hidden alone
        assert forward.dtypes(V * D) == backward.dtypes(V * D) == []


def test_hidden_states_sliced_by_the_caller_are_one_copy_unless_they_are_being_computed() -> None:
    weight = torch.randn(V, D, requires_grad=True)
    norm = nn.RMSNorm(D)
    for loss in (ours, dense):
        step = _sliced(loss, weight)
        # (B, T - 1, D) out of (B, T, D) cannot be viewed as (N, D): what is in memory is copied,
        forward, backward = _generate(step, _hidden(B, T), _labels(B, T))
        assert len(forward.allocated()) == 1
        # and the gradient of all positions is another buffer than that of those which count.
        assert len(backward.allocated()) == (2 if loss is dense else 1)

        # What a norm computes, it computes for the positions left, straight into place.
        forward, backward = _generate(
            lambda x, labels, step=step: step(norm(x), labels), _hidden(B, T), _labels(B, T)
        )
        assert len(forward.allocated()) == 1
        assert len(backward.allocated()) == (2 if loss is dense else 1)


def test_hidden_states_of_a_batch_that_come_from_outside_are_read_where_they_are() -> None:
    weight = torch.randn(V, D, requires_grad=True)
    step = _shifted(lambda x, labels: ours(x, weight, labels))
    forward, backward = _generate(step, _hidden(B, T), _labels(B, T))
    assert forward.dtypes() == backward.dtypes() == []


@pytest.mark.slow
def test_a_patched_model_needs_one_buffer_fewer() -> None:
    pytest.importorskip("transformers")
    from tests.integrations.tiny_models import LENGTH, batch, dense_loss, tiny

    from levelhead.integrations import patch_model

    # 20 units, which nothing else has: heads are 16 wide together, the layer inside 24.
    model = tiny(dtype=torch.bfloat16, num_hidden_layers=1, hidden_size=20)
    ids, labels = batch().values()
    entries = 2 * LENGTH * 20

    decoder = _generate(lambda ids: model.model(input_ids=ids).last_hidden_state.float().sum(), ids)
    dense = _generate(lambda ids, labels: dense_loss(model, ids, labels), ids, labels)
    patch_model(model)
    ours = _generate(lambda ids, labels: model(input_ids=ids, labels=labels).loss, ids, labels)

    def allocated(step: tuple[Code, Code]) -> list[int]:
        return [len(code.allocated(entries)) for code in step]

    forward, backward = allocated(decoder)
    # Either head needs the output of the last norm in memory. A GEMM's gradient of it is a buffer
    # of the backward; ours is the operator's own.
    assert allocated(dense) == [forward + 1, backward + 1]
    assert allocated(ours) == [forward + 1, backward]
    # And that output is not kept for the backward.
    kept = [len(step[0].kept(entries)) for step in (decoder, ours, dense)]
    assert kept[0] == kept[1] == kept[2] - 1
