"""Whole models and training scripts compiled with the pass: dense values, one graph, caches, words where due."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.integrations.inductor.backend import pass_only
from tests.integrations.tiny_models import tiny
from torch import Tensor, nn
from torch._dynamo.utils import counters

import levelhead
from levelhead.integrations.inductor import fusion
from levelhead.measure.gate import error_budget
from levelhead.ops import chunked

EPS = 0.1
# Of float32 gradients through a whole model: sums in another order. Near 0, a tenth of what torch allows by default.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()
    fusion._warn_once.cache_clear()


def _ids(vocabulary: int = 67) -> Tensor:
    return torch.randint(0, vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))


def _gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def _smoothed(model: Any, ids: Tensor, eps: float = EPS) -> Tensor:
    """The dense loss, as transformers computes it but for the smoothing."""
    output = model(ids, labels=ids)
    logits, target = output.logits.float(), F.pad(ids, (0, 1), value=-100)[:, 1:]
    plain, smooth = (
        F.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=e) for e in (0, eps)
    )
    return output.loss - plain + smooth  # whatever else the model adds to its loss stays


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "mixtral", "gpt2"])
def test_hugging_face_models_train_smoothed_without_a_patch(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    # The eager experts of tiny models break graphs; these do not, once they have run.
    experts = {"experts_implementation": "batched_mm"} if family == "mixtral" else {}
    model, ids = tiny(family, torch.float32, **experts), _ids()
    # GPT-2's is None, of which it warns by a logger, and that breaks a graph.
    model.loss_type = "ForCausalLM"
    expected = _smoothed(model, ids)
    backend = pass_only(smoothing=EPS, drop_logits=True)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with caplog.at_level(logging.INFO, "levelhead"):
        output = compiled(ids, labels=ids)
    torch.testing.assert_close(output.loss, expected)
    for got, true in zip(_gradients(output.loss, model), _gradients(expected, model), strict=True):
        torch.testing.assert_close(got, true, **CLOSE)
    assert counters["levelhead"] == {"linear_cross_entropy": 1}
    assert counters["stats"]["unique_graphs"] == 1
    assert "label_smoothing=0.1" in caplog.text
    assert output.logits.shape == (2, 9, 67)
    assert output.logits.isnan().all()
    assert output.logits.untyped_storage().nbytes() <= 8


def test_logits_that_are_returned_stay_unless_dropped() -> None:
    model, ids = tiny("llama", torch.float32), _ids()
    expected, logits = _smoothed(model, ids), model(ids).logits
    compiled = torch.compile(model, fullgraph=True, backend=pass_only(smoothing=EPS))
    with pytest.warns(UserWarning, match=r"computes the logits of lm_head.*drop_logits=True"):
        output = compiled(ids, labels=ids)
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, expected)
    # Both are differentiated, as they would be without the pass.
    both = _gradients(output.loss + output.logits.square().mean(), model)
    for got, true in zip(both, _gradients(expected + logits.square().mean(), model), strict=True):
        torch.testing.assert_close(got, true, **CLOSE)


def test_evaluation_is_not_smoothed_and_keeps_its_logits() -> None:
    model, ids = tiny("llama", torch.float32).eval(), _ids()
    backend = pass_only(smoothing=EPS, drop_logits=True)
    with torch.no_grad():
        expected = model(ids, labels=ids)
        actual = torch.compile(model, fullgraph=True, backend=backend)(ids, labels=ids)
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.logits, expected.logits)
    assert counters["levelhead"] == {}


def test_evaluation_that_returns_the_loss_alone_makes_no_logits() -> None:
    model, ids = tiny("llama", torch.float32).eval(), _ids()

    @torch.compile(fullgraph=True, backend=pass_only(smoothing=EPS))
    def evaluate(ids: Tensor) -> Tensor:
        loss: Tensor = model(ids, labels=ids).loss
        return loss

    with torch.no_grad():
        torch.testing.assert_close(evaluate(ids), model(ids, labels=ids).loss)
    assert counters["levelhead"] == {"linear_cross_entropy": 1}


class Net(nn.Module):
    """A model and a loss by a hand that has never heard of us."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(67, 16), nn.RMSNorm(16)
        self.lm_head = nn.Linear(16, 67)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.lm_head(self.norm(self.embedding(ids)))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def reference(self, ids: Tensor, eps: float) -> Tensor:
        logits = self.lm_head(self.norm(self.embedding(ids)))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=eps)


def test_inductor_runs_the_operator_once_a_step_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    for name in ("linear_cross_entropy", "linear_logit_stats", "linear_logit_stats_backward"):
        function = getattr(chunked, name)

        def spy(*args: Any, _name: str = name, _function: Any = function) -> Any:
            calls.append(_name)
            return _function(*args)

        monkeypatch.setattr(chunked, name, spy)
    model, ids = Net(), _ids()
    actual = torch.compile(model, options=levelhead.inductor_options(EPS))(ids)
    expected = model.reference(ids, EPS)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(_gradients(actual, model), _gradients(expected, model))
    assert calls == ["linear_cross_entropy"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_layer_and_loss(dtype: torch.dtype) -> None:
    model, ids = Net(), _ids()
    exact = model.reference(ids, EPS)
    true = _gradients(exact, model)
    compiled = torch.compile(model, fullgraph=True, backend=pass_only(smoothing=EPS))
    with torch.autocast("cpu", dtype=dtype):
        dense, actual = model.reference(ids, EPS), compiled(ids)
    assert actual.dtype == torch.float32
    assert counters["levelhead"] == {"linear_cross_entropy": 1}
    pairs = zip(_gradients(actual, model), _gradients(dense, model), true, strict=True)
    for got, same, exactly in [(actual, dense, exact), *pairs]:
        assert got.dtype == torch.float32
        error, dense_error = ((x - exactly).abs().max().item() for x in (got, same))
        largest, eps = exactly.abs().max().item(), torch.finfo(torch.float32).eps
        assert error <= error_budget(dense_error, largest, eps)


def test_a_checkpointed_region_is_a_graph_of_its_own_and_served() -> None:
    model, ids = Net(), _ids()

    def step(ids: Tensor) -> Tensor:
        loss: Tensor = torch.utils.checkpoint.checkpoint(model, ids, use_reentrant=False)
        return loss

    compiled = torch.compile(step, fullgraph=True, backend=pass_only(smoothing=EPS))
    expected, actual = model.reference(ids, EPS), compiled(ids)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(_gradients(actual, model), _gradients(expected, model))
    assert counters["levelhead"] == {"linear_cross_entropy": 1}


def test_another_number_of_tokens_needs_no_other_graph() -> None:
    model = Net()
    backend = pass_only(smoothing=EPS)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in (5, 9, 12):
        ids = torch.randint(0, 67, (3, length))
        torch.testing.assert_close(compiled(ids), model.reference(ids, EPS))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_loss_out_of_reach_is_said_once() -> None:
    model = Net()

    def step(ids: Tensor, factor: float) -> Tensor:
        logits = model.lm_head(model.embedding(ids))
        torch._dynamo.graph_break()
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten()) * factor

    compiled = torch.compile(step, backend=pass_only(smoothing=EPS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for factor in (1.0, 2.0, 3.0):
            compiled(_ids(), factor)
    (said,) = (str(w.message) for w in caught if "levelhead" in str(w.message))
    assert "cross_entropy at test_models.py" in said
    assert "as it is, without smoothing: the graph has no linear layer of its logits" in said
    assert "\n" not in said


def test_a_loss_written_by_hand_is_computed_as_written_and_that_is_said() -> None:
    model, ids = Net(), _ids()

    def step(ids: Tensor) -> Tensor:
        log_probs = model.lm_head(model.embedding(ids)).log_softmax(-1)
        return -log_probs.gather(-1, ids[..., None]).mean()

    compiled = torch.compile(step, backend=pass_only(smoothing=EPS))
    with pytest.warns(UserWarning, match="smooths F.cross_entropy and F.nll_loss; the loss of"):
        actual = compiled(ids)
    torch.testing.assert_close(actual, step(ids))
    assert counters["levelhead"] == {"linear_logit_stats": 1}


def test_gradients_switched_off_between_layer_and_loss() -> None:
    model, ids = Net(), _ids()

    def step(ids: Tensor) -> Tensor:
        hidden = model.embedding(ids)
        with torch.no_grad():
            constant = model.lm_head(hidden)
        frozen = F.cross_entropy(constant.flatten(0, 1), ids.flatten())
        logits = hidden @ model.embedding.weight.T
        with torch.no_grad():
            probs = logits.softmax(-1)
        crossed = -(probs * logits.log_softmax(-1)).sum(-1).mean()  # probs is a constant here
        return frozen + crossed + F.cross_entropy(logits.flatten(0, 1), ids.flatten())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = torch.compile(step, backend=pass_only())(ids)
    expected = step(ids)
    weight = [model.embedding.weight]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, weight), torch.autograd.grad(expected, weight)
    )


def test_logits_of_a_checkpointed_region_are_not_dropped() -> None:
    model, ids = Net(), _ids()

    def region(hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.lm_head(hidden)
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten()), logits

    def step(ids: Tensor) -> Tensor:
        hidden = model.embedding(ids)
        loss, logits = torch.utils.checkpoint.checkpoint(region, hidden, use_reentrant=False)
        return loss + logits.square().mean()

    compiled = torch.compile(step, fullgraph=True, backend=pass_only(drop_logits=True))
    with pytest.warns(UserWarning, match=r"computes the logits of .*, beside its loss$"):
        actual = compiled(ids)
    torch.testing.assert_close(actual, step(ids))
    assert counters["levelhead"] == {"linear_cross_entropy": 1}


def test_targets_that_another_head_predicts() -> None:
    teacher, student, ids = nn.Linear(16, 67), nn.Linear(16, 67), _ids().flatten()
    hidden = torch.randn(ids.numel(), 16)

    def step(hidden: Tensor) -> Tensor:
        taught = teacher(hidden)
        predicted = taught.argmax(-1)
        loss = F.cross_entropy(taught, ids)
        return loss + F.cross_entropy(student(hidden), predicted)

    actual = torch.compile(step, fullgraph=True, backend=pass_only())(hidden)
    torch.testing.assert_close(actual, step(hidden))
    assert counters["levelhead"] == {"linear_logit_stats": 1, "linear_cross_entropy": 1}


def test_logits_of_a_vocabulary_that_varies_are_dropped() -> None:
    def step(hidden: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight)
        return F.cross_entropy(logits, y), logits

    backend = pass_only(drop_logits=True)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for vocabulary in (67, 41):
        hidden, weight = torch.randn(6, 16), torch.randn(vocabulary, 16, requires_grad=True)
        y = torch.randint(0, vocabulary, (6,))
        loss, logits = compiled(hidden, weight, y)
        torch.testing.assert_close(loss, step(hidden, weight, y)[0])
        assert logits.shape == (6, vocabulary)
    assert counters["stats"]["unique_graphs"] == 1


def test_logits_times_a_size_that_varies() -> None:
    model = Net()

    def step(ids: Tensor) -> Tensor:
        logits = model.lm_head(model.embedding(ids)) * ids.shape[1]
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=pass_only())
    with pytest.warns(UserWarning, match="its logits are needed for mul"):
        actual = compiled(_ids())
    torch.testing.assert_close(actual, step(_ids()))


def test_a_smoothing_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\], got 1.5"):
        levelhead.inductor_options(smoothing=1.5)


@pytest.mark.parametrize("smoothing", ["0.1", [0.1], True, torch.tensor(0.1)])
def test_a_smoothing_that_is_no_number_is_refused(smoothing: Any) -> None:
    with pytest.raises(TypeError, match="smoothing must be a number, got"):
        levelhead.inductor_options(smoothing)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "lite"])
def test_a_mode_goes_together_with_the_pass_as_options(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Or an earlier run has left the graph in the cache, and the pass has nothing to do.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    random = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(n, 8, generator=random).requires_grad_() for n in (6, 37))
    y = torch.randint(0, 37, (6,), generator=random)

    def step(h: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(h @ weight.T, y)

    fuse = levelhead.inductor_options(EPS)
    with pytest.raises(RuntimeError, match="Either mode or options can be specified"):
        torch.compile(step, mode=mode, options=fuse)
    options = torch._inductor.list_mode_options(mode)
    loss = torch.compile(step, fullgraph=True, options=options | fuse)(h, weight)
    expected = F.cross_entropy(h @ weight.T, y, label_smoothing=EPS)
    torch.testing.assert_close(loss, expected)
    gradients = (torch.autograd.grad(value, (h, weight)) for value in (loss, expected))
    torch.testing.assert_close(*gradients)
    assert counters["levelhead"]["linear_cross_entropy"] == 1
