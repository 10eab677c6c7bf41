"""torch.export: programs that are saved, loaded elsewhere, trained, and compiled ahead of time."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export, load, save
from torch.export.experimental import _export_forward_backward

import levelhead
from levelhead import LogitStats

D, V = 16, 67
STRICT = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])


class Training(nn.Module):
    """Hidden states to loss."""

    def __init__(self, reduction: Any = "mean") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        self.reduction = reduction

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        loss = levelhead.linear_cross_entropy(
            self.norm(hidden),
            self.head.weight,
            target,
            label_smoothing=0.1,
            softcap=5.0,
            reduction=self.reduction,
        )
        return loss.sum()


class Evaluation(Training):
    """Hidden states to statistics."""

    def forward(self, hidden: Tensor, target: Tensor) -> LogitStats:
        return levelhead.linear_logit_stats(
            self.norm(hidden), self.head.weight, target, softcap=5.0
        )


def _inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(length)
    target = torch.randint(0, V, (batch, length), generator=random)
    target[0, :2] = -100
    return torch.randn(batch, length, D, generator=random), target


def _export(module: nn.Module, strict: bool = False) -> ExportedProgram:
    sizes = {0: Dim("batch"), 1: Dim("length")}
    return export(module, _inputs(2, 9), dynamic_shapes=(sizes, sizes), strict=strict)


def _saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    save(program, buffer)
    buffer.seek(0)
    return load(buffer)


def _operators(program: ExportedProgram) -> list[str]:
    """The names of our operators in the graph."""
    targets = (node.target for node in program.graph.nodes if node.op == "call_function")
    return [str(target).split(".")[1] for target in targets if "levelhead" in str(target)]


def _equal(got: LogitStats, want: LogitStats) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def _loss_and_gradients(module: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    loss = module(*inputs)
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)) | {"loss": loss}


# The load of torch 2.11 makes tensors of bytes that it has just read.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@STRICT
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_training_step_trains_when_loaded(reduction: str, strict: bool) -> None:
    module = Training(reduction)
    program = _saved_and_loaded(_export(module, strict))
    fused = reduction == "mean"
    assert _operators(program) == ["linear_cross_entropy" if fused else "linear_logit_stats"]
    for inputs in (_inputs(2, 9), _inputs(3, 5), _inputs(1, 30)):
        got = _loss_and_gradients(program.module(), *inputs)
        want = _loss_and_gradients(module, *inputs)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


# torch 2.13's own copy of a tree specification.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("reduction", "operators"),
    [
        # The gradient is taken in the forward pass; the backward multiplies it.
        ("mean", ["linear_cross_entropy"]),
        ("none", ["linear_logit_stats", "linear_logit_stats_backward"]),
    ],
)
def test_forward_and_backward_in_one_graph(reduction: str, operators: list[str]) -> None:
    module, inputs = Training(reduction), _inputs(2, 9)
    program = _saved_and_loaded(_export_forward_backward(export(module, inputs)))
    assert _operators(program) == operators
    # Its module() is not made for the gradients that the graph returns.
    loss, *gradients = program.graph_module(*program.parameters(), *inputs)
    names = program.graph_signature.backward_signature.gradients_to_parameters.values()
    want = _loss_and_gradients(module, *inputs)
    torch.testing.assert_close(dict(zip(names, gradients, strict=True)) | {"loss": loss}, want)


@STRICT
def test_statistics_come_back_under_their_names(strict: bool) -> None:
    module = Evaluation()
    exported = _export(module, strict)
    loaded = _saved_and_loaded(exported)
    assert _operators(loaded) == ["linear_logit_stats"]
    for program in (exported, loaded):
        for inputs in (_inputs(2, 9), _inputs(3, 5), _inputs(1, 30)):
            stats = program.module()(*inputs)
            assert isinstance(stats, LogitStats)
            assert _equal(stats, module(*inputs))


def _run(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


_LOAD = """
import sys, torch, levelhead
folder = sys.argv[1]
inputs = torch.load(f"{folder}/inputs.pt")
training = torch.export.load(f"{folder}/training.pt2").module()
loss = training(*inputs)
loss.backward()
gradients = [parameter.grad for parameter in training.parameters()]
stats = torch.export.load(f"{folder}/evaluation.pt2").module()(*inputs)
assert type(stats) is levelhead.LogitStats, type(stats)
torch.save((loss.detach(), gradients, tuple(stats)), f"{folder}/outputs.pt")
"""


def test_a_fresh_process_needs_levelhead_and_nothing_else(tmp_path: Path) -> None:
    training, evaluation, inputs = Training(), Evaluation(), _inputs(3, 5)
    save(_export(training), tmp_path / "training.pt2")
    save(_export(evaluation), tmp_path / "evaluation.pt2")
    torch.save(inputs, tmp_path / "inputs.pt")
    run = _run(_LOAD, tmp_path)
    assert run.returncode == 0, run.stderr
    loss, gradients, stats = torch.load(tmp_path / "outputs.pt")
    want = _loss_and_gradients(training, *inputs)
    assert torch.equal(loss, want["loss"])
    assert torch.equal(gradients[0], want["norm.weight"])
    assert torch.equal(gradients[1], want["head.weight"])
    assert _equal(LogitStats(*stats), evaluation(*inputs))

    # Without it the operator is unknown; torch says so and asks for the import.
    run = _run("import sys, torch; torch.export.load(sys.argv[1])", tmp_path / "evaluation.pt2")
    assert run.returncode != 0
    assert "failed to resolve torch.ops.levelhead.linear_logit_stats" in run.stderr
    assert "import the custom op" in run.stderr


_LOAD_COMPILED = """
import sys, torch, levelhead
package, inputs, outputs = sys.argv[1:]
stats = torch._inductor.aoti_load_package(package)(*torch.load(inputs))
assert type(stats) is levelhead.LogitStats, type(stats)
torch.save(tuple(stats), outputs)
"""


# As above.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    module = Evaluation()
    module.norm = nn.Identity()  # or the operator's input were rounded otherwise
    path, inputs = str(tmp_path / "package.pt2"), tmp_path / "inputs.pt"
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(_export(module), package_path=path)
    compiled = torch._inductor.aoti_load_package(package)
    for tensors in (_inputs(2, 9), _inputs(1, 30)):
        stats = compiled(*tensors)
        assert isinstance(stats, LogitStats)
        assert _equal(stats, module(*tensors))

    torch.save(_inputs(3, 5), inputs)
    run = _run(_LOAD_COMPILED, path, inputs, tmp_path / "outputs.pt")
    assert run.returncode == 0, run.stderr
    assert _equal(LogitStats(*torch.load(tmp_path / "outputs.pt")), module(*_inputs(3, 5)))

    # The operator is Python's: the package finds it where levelhead is imported, and says so elsewhere.
    run = _run("import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])", path)
    assert run.returncode != 0
    assert "Could not find schema for levelhead::linear_logit_stats" in run.stderr
