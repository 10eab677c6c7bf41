"""A patched model compiles into one graph."""

import pytest
import torch
from tests.integrations.tiny_models import assert_same_training, batch, tiny

from levelhead.integrations import patch_model


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_a_training_step_is_one_graph(backend):
    model = patch_model(tiny(dtype=torch.float32, num_hidden_layers=1))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    # float32: sums of 67 terms of order one, in another order
    assert_same_training(
        compiled._orig_mod, compiled(**batch()).loss, model, model(**batch()).loss, 2e-6
    )


def test_new_batches_and_lengths_do_not_recompile():
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph

    model = patch_model(tiny(num_hidden_layers=1))
    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    for length in (9, 9, 7, 8):
        inputs = {name: value[:, :length].clone() for name, value in batch().items()}
        torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)
    assert len(graphs) == 1


def test_eval_compiles_to_the_logits():
    model = patch_model(tiny(num_hidden_layers=1)).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    got, want = compiled(**batch()), model(**batch())
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)
