"""A patched model compiles as the unpatched one does; how it compiles in every mode: test_compile_matrix.py."""

from functools import partial

import pytest
import torch
from tests.integrations.tiny_models import (
    assert_same_training,
    batch,
    dense_loss,
    tiny,
    transformers,
)
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from levelhead.integrations import patch_model
from levelhead.ops import chunked

COUNTERS = torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    COUNTERS.clear()
    yield
    torch.compiler.reset()


def small(family="llama", dtype=torch.float64, **options):
    model = tiny(family, dtype, num_hidden_layers=1, **options)
    model.config.use_cache = False
    return model


def test_a_training_step_is_one_graph():
    model = patch_model(small(dtype=torch.float32))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    # float32: sums of 67 terms of order one, in another order
    assert_same_training(
        compiled._orig_mod, compiled(**batch()).loss, model, model(**batch()).loss, 2e-6
    )


def test_new_batches_and_lengths_do_not_recompile():
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph

    model = patch_model(small())
    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    for length in (9, 9, 7, 8):
        inputs = {name: value[:, :length].clone() for name, value in batch().items()}
        torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)
    assert len(graphs) == 1


@torch.no_grad()
def test_eval_compiles_to_the_logits():
    model = patch_model(small()).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    got, want = compiled(**batch()), model(**batch())
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)


def test_another_tensor_as_smoothing_does_not_recompile():
    model = patch_model(small(), torch.tensor(0.1))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for smoothing in (0.1, 0.3, 0.0):
        patch_model(model, torch.tensor(smoothing))
        want = dense_loss(small(), smoothing=smoothing, **batch())
        torch.testing.assert_close(compiled(**batch()).loss, want)
    assert COUNTERS["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_a_model_that_breaks_its_graph_breaks_it_for_no_other_reason():
    def compiled_loss(model):
        torch.compiler.reset()
        COUNTERS.clear()
        loss = torch.compile(model, backend="eager")(**batch()).loss
        return loss, COUNTERS["stats"]["unique_graphs"], set(COUNTERS["graph_break"])

    # A loop over those experts that some token was sent to. By default Transformers has none, and no break.
    experts = {"experts_implementation": "eager", "output_router_logits": False}
    _, graphs, reasons = compiled_loss(small("mixtral", **experts))
    loss, patched_graphs, patched_reasons = compiled_loss(patch_model(small("mixtral", **experts)))
    assert len(reasons) == 1
    assert patched_reasons == reasons
    assert patched_graphs == graphs + 1  # what comes before the model: the labels are shifted
    torch.testing.assert_close(loss, dense_loss(small("mixtral", **experts), **batch()))


def _with_a_term(*, always):
    """A Llama that adds a term of its weights to its loss, and if asked one of its logits."""

    class Other(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, z_loss=False, decay=False, **kwargs):
            output = super().forward(input_ids, labels=labels, **kwargs)
            if always or decay:
                output.loss = output.loss + 0.1 * self.lm_head.weight.square().sum()
            if z_loss:
                output.loss = output.loss + output.logits.logsumexp(-1).pow(2).mean()
            return output

    model = small()
    model.__class__ = Other
    return patch_model(model)


def test_a_term_of_the_logits_that_comes_later_makes_the_loss_nan():
    model = _with_a_term(always=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch()).loss, model(**batch()).loss)
    assert compiled(**batch(), z_loss=True).loss.isnan()


# Dynamo looks at .grad of the hidden states with which it goes on after the error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("term", ["z_loss", "decay"])
def test_any_term_that_comes_later_is_refused_where_there_was_none(term):
    model = _with_a_term(always=False)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**batch()).loss, model(**batch()).loss)
    with pytest.raises(
        RuntimeError, match=r"in compiled code nobody sees .* without torch.compile"
    ):
        compiled(**batch(), **{term: True})


def test_a_model_in_eval_mode_with_gradients_warns_when_it_is_compiled():
    model = patch_model(small()).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match=r"in eval mode, with gradients enabled.*model.train\(\)"):
        loss = compiled(**batch()).loss
    assert torch.equal(compiled(**batch()).loss, loss)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize(("around", "times"), [("plain", 2), ("selective", 1)])
def test_a_checkpoint_around_the_model_recomputes_the_loss_unless_it_saves_it(
    around, times, backend, monkeypatch
):
    calls, function = [], chunked.linear_cross_entropy
    monkeypatch.setattr(
        chunked, "linear_cross_entropy", lambda *args: (calls.append(args), function(*args))[1]
    )
    saved = [torch.ops.levelhead.linear_cross_entropy.default]
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, saved)}
    model = patch_model(small())
    # In torch 2.11 and 2.12 no model of transformers, patched or not, compiles in a checkpoint without this: a forward
    # notes which outputs are asked for, and a note is a side effect.
    noted = torch.__version__ < "2.13"

    def loss(ids, labels):
        return model(input_ids=ids, labels=labels).loss

    def checkpointed(ids, labels):
        options = contexts if around == "selective" else {}
        return checkpoint(loss, ids, labels, use_reentrant=False, **options)

    compiled = backend and torch.compile(checkpointed, backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=noted):
        found = (compiled or checkpointed)(*batch().values())
    plain = small()
    assert_same_training(model, found, plain, dense_loss(plain, **batch()))
    assert len(calls) == times
