"""No architecture of transformers trains on something else once patched; most train without logits."""

import warnings
from collections import Counter

import pytest

transformers = pytest.importorskip("transformers")

from tests.integrations.architectures import (  # noqa: E402
    Architecture,
    Mismatch,
    architectures,
    batch,
    build,
    compare,
    outcome,
    table,
)

from levelhead.integrations import patch_model  # noqa: E402

INSTALLED = {str(architecture): architecture for architecture in architectures()}
COMMITTED = table()["architectures"]
SAME_VERSION = table()["transformers"] == transformers.__version__


@pytest.fixture(autouse=True)
def _their_warnings_are_not_ours():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", sorted(INSTALLED.keys() | COMMITTED.keys()))
def test_an_architecture_is_matched_or_refused_as_the_table_says(name):
    if name not in INSTALLED:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    row = outcome(INSTALLED[name])  # raises Mismatch: wrong, whatever the table says
    want = COMMITTED.get(name, row)
    if SAME_VERSION and want["outcome"] != "not built":  # a package more, and it may be
        assert row == want, "python -m tests.integrations.architectures writes the table"


def test_of_the_causal_language_models_150_are_matched_and_every_other_has_a_reason():
    rows = {name: row for name, row in COMMITTED.items() if name.startswith("causal-lm/")}
    outcomes = Counter(row["outcome"] for row in rows.values())
    assert outcomes.keys() <= {"matched", "refused", "not built"}
    assert outcomes["matched"] >= 150
    assert outcomes["not built"] <= 5
    assert all(row["why"] for row in rows.values() if row["outcome"] != "matched")


def test_the_table_knows_every_installed_architecture():
    if not SAME_VERSION:
        pytest.skip(f"the table is for transformers {table()['transformers']}")
    assert COMMITTED.keys() == INSTALLED.keys()


# Each is what a patch would do that overlooked one thing between the head and the loss.
@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("cohere", {"logit_scale": 2.9}),
        ("gemma2", {"final_logit_softcapping": 0.8}),
        ("granite", {"logits_scaling": 0.29}),
        ("inkling_text", {"unpadded_vocab_size": 119}),
        ("mixtral", {"router_aux_loss_coef": 0.49}),
        ("mixtral", {"output_router_logits": False}),
    ],
)
def test_the_comparison_sees_what_is_overlooked(model_type, fields):
    architecture = INSTALLED[f"causal-lm/{model_type}"]
    plain, patched = build(architecture), patch_model(build(architecture, **fields), 0.1)
    with pytest.raises(Mismatch, match="the loss is off"):
        compare(plain, patched, batch(architecture, plain))


def test_the_comparison_sees_a_head_bias_overlooked():
    architecture = INSTALLED["causal-lm/phi"]
    plain, patched = build(architecture), patch_model(build(architecture), 0.1)
    patched.lm_head.bias.data.zero_()
    with pytest.raises(Mismatch, match="the loss is off"):
        compare(plain, patched, batch(architecture, plain))


def test_the_comparison_sees_a_gradient_of_the_head_that_is_off():
    architecture = INSTALLED["causal-lm/llama"]
    plain, patched = build(architecture), patch_model(build(architecture), 0.1)
    patched.lm_head.weight.register_hook(lambda gradient: 1.0001 * gradient)
    with pytest.raises(Mismatch, match=r"gradient of lm_head\.weight is off"):
        compare(plain, patched, batch(architecture, plain))


@pytest.mark.parametrize("smoothing", [0.0, 0.11])
def test_the_comparison_sees_another_smoothing(smoothing):
    architecture = Architecture("causal-lm", "llama", "LlamaForCausalLM")
    plain, patched = build(architecture), patch_model(build(architecture), smoothing)
    with pytest.raises(Mismatch, match="the loss is off"):
        compare(plain, patched, batch(architecture, plain))
