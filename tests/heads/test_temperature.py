"""One temperature fitted without logits equals the one fitted on them."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from scipy import optimize
from tests.heads.test_head import own_logits
from tests.integrations.tiny_models import batch, tiny

from levelhead.heads.head import Head, HeadInputs, collect, single_head
from levelhead.heads.temperature import fit_temperature
from levelhead.integrations.patch.probe import HeadTransform


def dense_fit(z, target):
    """Guo et al.'s fit by scipy on the logits, over log T."""
    found = optimize.minimize_scalar(
        lambda log_t: F.cross_entropy(z / math.exp(log_t), target).item(),
        bounds=(-4.6, 4.6),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return math.exp(found.x)


def head_of(weight, bias, transform, kind=Head):
    """A head that is a layer alone."""
    layer = nn.Linear(1, 1, bias=bias is not None)
    layer.weight, layer.bias = (None if p is None else nn.Parameter(p) for p in (weight, bias))
    return kind(layer, [layer], transform)


def problem(seed, tokens, *, overconfidence, softcap=None, logit_scale=1.0, with_bias=False):
    """Targets drawn from softmax(z / overconfidence)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = normal(tokens, 8), normal(30, 8), normal(30) if with_bias else None
    head = head_of(weight, bias, HeadTransform(logit_scale, softcap))
    z = head.transform(F.linear(hidden, weight, bias))
    share = (z / overconfidence).softmax(-1)
    target = torch.multinomial(share, 1, generator=generator)[:, 0]
    return head, HeadInputs(hidden, target), z


@given(
    seed=st.integers(0, 2**31),
    overconfidence=st.floats(0.3, 4),
    softcap=st.none() | st.floats(2, 20),
    logit_scale=st.floats(0.3, 3),
    with_bias=st.booleans(),
)
def test_it_equals_the_dense_fit(seed, overconfidence, softcap, logit_scale, with_bias):
    options = {"softcap": softcap, "logit_scale": logit_scale, "with_bias": with_bias}
    head, inputs, z = problem(seed, 200, overconfidence=overconfidence, **options)
    want = dense_fit(z, inputs.target)
    # Within the square root of float64's precision, which is what a minimiser can see.
    assert fit_temperature(head, inputs) == pytest.approx(want, rel=1e-5)


def test_it_recovers_the_temperature_that_tokens_were_drawn_with():
    head, inputs, _ = problem(0, 20_000, overconfidence=2.5)
    assert fit_temperature(head, inputs) == pytest.approx(2.5, rel=0.03)  # 20,000 draws


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "phi", "gpt2"])
def test_it_equals_the_dense_fit_on_the_logits_of_models(family):
    model = tiny(family)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    z = own_logits(model, batch())[0].repeat(50, 1)
    torch.manual_seed(3)
    drawn = torch.multinomial((z / 1.5).softmax(-1), 1)[:, 0]
    inputs = HeadInputs(collect(model, [batch()]).hidden.repeat(50, 1), drawn)
    want = dense_fit(z, drawn)
    assert 0.5 < want < 5
    assert fit_temperature(single_head(model), inputs) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    head, inputs, _ = problem(1, 500, overconfidence=1.5)
    narrow = head_of(head.weight.to(dtype), None, head.transform)
    rounded = HeadInputs(inputs.hidden.to(dtype), inputs.target)
    z = F.linear(rounded.hidden.double(), narrow.weight.double())
    # The products of the rounded numbers accumulate in float32.
    assert fit_temperature(narrow, rounded) == pytest.approx(dense_fit(z, inputs.target), rel=1e-3)


def test_it_keeps_no_graph():
    head, inputs, _ = problem(1, 50, overconfidence=1.5)
    head = head_of(torch.nn.Parameter(head.weight), None, head.transform)
    fit_temperature(head, inputs)
    assert head.weight.grad is None


def test_a_dozen_products_with_the_head_suffice():
    head, inputs, _ = problem(2, 300, overconfidence=3.7)
    calls = []

    class Counting(Head):
        def logit_stats(self, *args):
            calls.append(args)
            return super().logit_stats(*args)

    fit_temperature(head_of(head.weight, None, head.transform, Counting), inputs)
    assert len(calls) <= 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 30.0])  # 30: certain to the last bit
def test_no_temperature_is_best_where_all_are_right(scale, dtype):
    head, inputs, z = problem(3, 100, overconfidence=1.0)
    head = head_of(head.weight.to(dtype) * scale, None, head.transform)
    right = HeadInputs(inputs.hidden.to(dtype), z.argmax(-1))
    with pytest.raises(ValueError, match="gets these 100 tokens right"):
        fit_temperature(head, right)


def test_no_temperature_is_best_where_the_model_does_worse_than_guessing():
    head, inputs, z = problem(3, 100, overconfidence=1.0)
    wrong = HeadInputs(inputs.hidden, z.argmin(-1))
    with pytest.raises(ValueError, match="which no temperature mends"):
        fit_temperature(head, wrong)
