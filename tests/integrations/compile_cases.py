"""What is compiled, how, and what is counted: for test_compile_matrix.py and `python -m benchmarks.compile`.

Every case runs cold: in a process of its own, forked from one that has imported what there is to import and compiled
nothing. Every loss and every gradient is held against the unpatched model's, or
the dense function's, in float64.
"""

import functools
import multiprocessing
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
import torch.nn.functional as F
from tests import forked
from tests.forked import MODELS
from tests.integrations.tiny_models import batch, dense_loss, tiny
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import levelhead
from levelhead.integrations import patch_model
from levelhead.measure.gate import error_budget
from levelhead.ops import chunked

FUNCTION, MODULE = "linear_cross_entropy", "LinearCrossEntropyLoss"
FUNCTIONAL = (FUNCTION, MODULE)
LLAMA = ("llama",)
SMOOTHINGS = (0.1, 0.25, 0.0, 0.4)
SOFTCAP = 5.0
D, V = 16, 67
COUNTERS = torch._dynamo.utils.counters


@dataclass(frozen=True)
class Mode:
    """How a case is compiled and called, what with, and with what outcome."""

    whats: tuple[str, ...] = FUNCTIONAL + MODELS
    inductor: tuple[str, ...] = ()  # which of them with inductor too
    lengths: tuple[int, ...] = (9, 9)  # tokens of a row, step by step
    dynamic: bool | None = None
    marked: bool = False  # by torch._dynamo.mark_dynamic
    tensor: bool = False  # a smoothing that is another at every step
    training: bool = True
    eval_logits: bool = True
    autocast: bool = False  # in bfloat16
    layers_checkpointed: bool = False
    selective: bool = False  # a checkpoint around it all, that saves the loss
    regions: str | None = None
    router_loss: bool = False
    graphs: int | None = 1  # None: as many as the unpatched model has
    recompiles: int = 0


MODES = {
    "training": Mode(inductor=FUNCTIONAL + MODELS, lengths=(9, 9, 9)),
    "training, N marked dynamic, smoothing changes": Mode(
        (FUNCTION, *MODELS), inductor=(FUNCTION,), lengths=(9, 7, 8), marked=True, tensor=True
    ),
    "training, dynamic=True": Mode((*FUNCTIONAL, "llama"), lengths=(9, 7, 8), dynamic=True),
    # Torch's default: what has changed once is dynamic from then on.
    "training, N changes": Mode((FUNCTION,), lengths=(9, 7, 8, 6), graphs=2, recompiles=1),
    "training, smoothing changes": Mode((FUNCTION, "llama"), lengths=(9, 9, 9, 9), tensor=True),
    "training, autocast": Mode((FUNCTION, *MODELS), inductor=(FUNCTION,), autocast=True),
    "training, layers checkpointed": Mode(MODELS, layers_checkpointed=True),
    "training, checkpointed but for the loss": Mode(
        (FUNCTION, *MODELS), inductor=(FUNCTION,), selective=True
    ),
    "training, by region": Mode(MODELS, regions="accelerate", graphs=None),
    "training, layers and head in place": Mode(("llama", "gpt2"), regions="in place", graphs=2),
    "training, router loss": Mode(("mixtral",), router_loss=True),
    "eval": Mode(inductor=(FUNCTION,), training=False),
    "eval, dynamic N": Mode((FUNCTION,), lengths=(9, 7, 8), dynamic=True, training=False),
    "eval, no logits": Mode(MODELS, training=False, eval_logits=False),
}


@dataclass(frozen=True)
class Case:
    """A row of the table: what is compiled, in which mode, by which backend."""

    what: str
    mode: str
    backend: str


@dataclass(frozen=True)
class Counts:
    """What the compiler made of a case."""

    graphs: int
    breaks: int
    recompiles: int  # graphs made after the first step
    losses_per_step: float  # computed by Levelhead
    graphs_unpatched: int | None = None  # where one graph is not the aim


CASES = [
    Case(what, name, backend)
    for backend in ("aot_eager", "inductor")
    for name, mode in MODES.items()
    for what in (mode.inductor if backend == "inductor" else mode.whats)
]


def expected(case: Case, found: Counts | None = None) -> Counts:
    """What was to be found; the graphs of the unpatched model are whatever they are."""
    mode = MODES[case.mode]
    unpatched = None if found is None else found.graphs_unpatched
    graphs = unpatched if mode.graphs is None else mode.graphs
    by_the_model = case.what in MODELS and not mode.training and mode.eval_logits
    return Counts(graphs or 0, 0, mode.recompiles, 0 if by_the_model else 1, unpatched)


def cold_counts(case: Case, cache: str, imports_too: bool = False) -> Counts:
    """Run a case in a new process, which forks after the imports, or begins with them.

    `cache` is a folder, empty to begin with. Only what the C++ compiler made is found there again: it takes most of
    inductor's time, and no graph is counted less for it.
    """
    context = multiprocessing.get_context("spawn") if imports_too else forked.context()
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(counts, case, cache).result()


def counts(case: Case, cache: str) -> Counts:
    """Compile a case, call it step by step, compare, and count."""
    torch.set_num_threads(1)
    mode = MODES[case.mode]
    # In torch 2.11 and 2.12 no model of transformers, patched or not, compiles in a checkpoint without this: a forward
    # notes which outputs are asked for, and a note is a side effect.
    noted = mode.selective and torch.__version__ < "2.13"
    with (
        torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=noted),
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache),
        torch._inductor.config.patch(compile_threads=1, fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        if case.what in FUNCTIONAL:
            return _counts(_Function(case.what, mode), mode, case.backend)
        found = _counts(_Model(case.what, mode), mode, case.backend)
        if mode.graphs is None:
            torch.compiler.reset()
            COUNTERS.clear()
            unpatched = _counts(_Model(case.what, mode, patched=False), mode, case.backend)
            found = replace(found, graphs_unpatched=unpatched.graphs)
        return found


def _counts(subject: Any, mode: Mode, backend: str) -> Counts:
    subject.compile(backend=backend, fullgraph=True, dynamic=mode.dynamic)
    names = ("linear_cross_entropy", "linear_logit_stats")
    spies = {name: mock.Mock(wraps=getattr(chunked, name)) for name in names}
    first = 0
    with mock.patch.multiple(chunked, **spies):
        for step, length in enumerate(mode.lengths):
            smoothing = SMOOTHINGS[step] if mode.tensor else subject.smoothing
            exact, dense, ours = subject.sides(step, length, smoothing)
            truth = _values(exact, replace(mode, autocast=False))
            _assert_within_budget(_values(ours, mode), truth, _values(dense, mode), mode)
            first = first or COUNTERS["stats"]["unique_graphs"]
    graphs, breaks = COUNTERS["stats"]["unique_graphs"], sum(COUNTERS["graph_break"].values())
    losses = sum(spy.call_count for spy in spies.values())
    return Counts(graphs, breaks, graphs - first, losses / len(mode.lengths))


# A loss, and the tensors that it is differentiated by.
Side = tuple[Callable[[], Tensor], dict[str, Tensor]]


def _values(side: Side, mode: Mode) -> dict[str, Tensor]:
    """The loss, and in training every gradient."""
    loss, tensors = side
    with torch.set_grad_enabled(mode.training):
        with torch.autocast("cpu", torch.bfloat16, enabled=mode.autocast):
            value = loss()
        if not mode.training:
            return {"loss": value}
        gradients = torch.autograd.grad(value, list(tensors.values()), allow_unused=True)
    named = zip(tensors, gradients, strict=True)
    return {"loss": value.detach()} | {name: g for name, g in named if g is not None}


def _assert_within_budget(
    ours: dict[str, Tensor], truth: dict[str, Tensor], dense: dict[str, Tensor], mode: Mode
) -> None:
    """Errors against float64 of at most twice those of the dense path, and a rounding."""
    eps = torch.finfo(torch.bfloat16 if mode.autocast else torch.float32).eps
    assert ours.keys() == truth.keys() == dense.keys()
    for name, value in truth.items():
        error, yardstick = ((side[name].double() - value).abs().max() for side in (ours, dense))
        budget = error_budget(yardstick, value.abs().max(), eps)
        assert error <= budget, f"{name}: error {error:.3g} > budget {budget:.3g}"


class _Function:
    """The function or its module, with a softcap and a bias, of a (n, D) input."""

    smoothing = SMOOTHINGS[0]

    def __init__(self, what: str, mode: Mode) -> None:
        self.mode = mode
        self.given = torch.tensor(self.smoothing) if mode.tensor else self.smoothing
        self.module = levelhead.LinearCrossEntropyLoss(
            D, V, bias=True, softcap=SOFTCAP, label_smoothing=self.given
        )
        self.head = dict(self.module.linear.named_parameters())
        self.loss = self.module if what == MODULE else self._function

    def _function(self, x: Tensor, target: Tensor) -> Tensor:
        weight, bias = self.head.values()
        return levelhead.linear_cross_entropy(
            x, weight, target, linear_bias=bias, softcap=SOFTCAP, label_smoothing=self.given
        )

    def compile(self, **options: Any) -> None:
        loss = _selective(self.loss) if self.mode.selective else self.loss
        self.compiled = torch.compile(loss, **options)

    def sides(self, step: int, length: int, smoothing: float) -> tuple[Side, Side, Side]:
        """In float64, in float32, compiled."""
        random = torch.Generator().manual_seed(step)
        x = torch.randn(length, D, generator=random).requires_grad_()
        target = torch.randint(V, (length,), generator=random)
        target[step] = -100
        if self.mode.tensor:
            self.given.fill_(smoothing)
        if self.mode.marked:
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(target, 0)

        def dense(dtype: torch.dtype) -> Side:
            inputs = {name: t.detach().to(dtype) for name, t in {"x": x, **self.head}.items()}
            for tensor in inputs.values():
                tensor.requires_grad_()

            def loss() -> Tensor:
                logits = F.linear(*inputs.values())
                logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
                return F.cross_entropy(logits, target, label_smoothing=smoothing)

            return loss, inputs

        ours = (lambda: self.compiled(x, target)), {"x": x, **self.head}
        return dense(torch.float64), dense(torch.float32), ours


class _Model:
    """A tiny model, patched or not."""

    def __init__(self, what: str, mode: Mode, patched: bool = True) -> None:
        self.mode = mode
        layers = 2 if mode.regions else 1  # the second is to be served by the graph of the first
        options: dict[str, Any] = {} if what == "gpt2" else {"num_hidden_layers": layers}
        if what == "mixtral":
            options["output_router_logits"] = mode.router_loss
        self.exact, self.dense = tiny(what, torch.float64, **options), tiny(what, **options)
        if what == "mixtral":
            # The default, which has no float64; the loop over the experts that were hit compiles in no model.
            # In transformers 5.17 its backward pass has no operator, and a compiler stops at a loop in it.
            compiles = hasattr(torch.ops.transformers, "grouped_mm_fallback_backward")
            options["experts_implementation"] = "grouped_mm" if compiles else "batched_mm"
        self.module = tiny(what, torch.float32, **options)
        for model in (self.exact, self.dense.float(), self.module):
            model.train(mode.training)
            # With one, a layer knows its number, and checkpointing it says so: in either case patched or not, that is
            # another graph for every layer, and a break.
            model.config.use_cache = False
        if not mode.training:
            self.module.loss_type = (
                "ForCausalLM"  # of GPT-2 it is not known, and to say so breaks a graph
            )
        if mode.router_loss:
            self.module(**batch())  # installs hooks under a lock, at which any model would break
        if mode.layers_checkpointed:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # a new name
                self.module.gradient_checkpointing_enable({"use_reentrant": False})
        self.smoothing = 0.0
        if patched:
            self.smoothing = SMOOTHINGS[0] if mode.training or not mode.eval_logits else 0.0
            self.given = torch.tensor(self.smoothing) if mode.tensor else SMOOTHINGS[0]
            eval_options = {"eval_smoothing": self.smoothing, "eval_logits": mode.eval_logits}
            patch_model(self.module, self.given, **({} if mode.training else eval_options))

    def compile(self, **options: Any) -> None:
        def loss(input_ids: Tensor, labels: Tensor) -> Tensor:
            return self.module(input_ids=input_ids, labels=labels).loss

        if self.mode.selective:
            self.compiled = torch.compile(_selective(loss), **options)
        elif self.mode.regions == "accelerate":
            from accelerate.utils import compile_regions

            regions = compile_regions(self.module, **options)
            self.compiled = lambda **inputs: regions(**inputs).loss
        elif self.mode.regions == "in place":
            body = self.module.base_model
            for block in (*getattr(body, "layers", getattr(body, "h", ())), self.module.lm_head):
                block.compile(**options)
            self.compiled = loss
        else:
            whole = torch.compile(self.module, **options)
            self.compiled = lambda **inputs: whole(**inputs).loss

    def sides(self, step: int, length: int, smoothing: float) -> tuple[Side, Side, Side]:
        """In float64, in float32, compiled."""
        inputs = {name: t.roll(step, 1)[:, :length].clone() for name, t in batch().items()}
        if self.mode.tensor:
            self.given.fill_(smoothing)
        exact, dense = (
            (functools.partial(dense_loss, model, **inputs, smoothing=smoothing), _named(model))
            for model in (self.exact, self.dense)
        )
        marked = {name: tensor.clone() for name, tensor in inputs.items()}
        if self.mode.marked:
            for tensor in marked.values():
                torch._dynamo.mark_dynamic(tensor, 1)
        return exact, dense, ((lambda: self.compiled(**marked)), _named(self.module))


def _named(model: Any) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def _selective(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`loss` in a checkpoint that recomputes everything in the backward pass except the operator's result."""
    saved = [torch.ops.levelhead.linear_cross_entropy.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, saved)

    def checkpointed(*args: Tensor, **kwargs: Tensor) -> Tensor:
        return checkpoint(loss, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return checkpointed
