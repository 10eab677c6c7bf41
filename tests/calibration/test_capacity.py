"""What a head's weights allow: bounds that hold, that are reached, and a verdict that follows."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from levelhead.calibration import capacity as module
from levelhead.calibration.capacity import (
    head_capacity,
    head_geometry,
    hidden_norms,
    max_probability,
    min_entropy,
    smoothed_loss_floor,
    smoothed_margin,
)

EXACT = 1 + 1e-9  # rounding of float64 sums of a few hundred terms


def random_head(seed, vocab_size=40, width=6, *, scale=1.0, with_bias=False):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab_size, width, generator=generator, dtype=torch.float64) * scale
    weight = weight + torch.randn(width, generator=generator, dtype=torch.float64) * 3
    bias = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
    return weight, bias if with_bias else None


def spike(radius, vocab_size):
    """The extremal logits of a ball: one above the rest, which are equal; their sum is 0."""
    z = torch.full((vocab_size,), -1.0, dtype=torch.float64)
    z[0] = vocab_size - 1
    return z * radius / z.norm()


def entropy(z):
    return torch.distributions.Categorical(logits=z).entropy()


@given(
    seed=st.integers(0, 2**31),
    norm=st.floats(0, 20),
    scale=st.floats(0.01, 5),
    softcap=st.none() | st.floats(0.1, 30),
    with_bias=st.booleans(),
)
def test_no_hidden_state_exceeds_the_bounds(seed, norm, scale, softcap, with_bias):
    weight, bias = random_head(seed, scale=scale, with_bias=with_bias)
    hidden = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Those that point at a row are the ones that come close.
    hidden = torch.cat([hidden, weight - weight.mean(0)])
    hidden = hidden * norm / hidden.norm(dim=1, keepdim=True)
    z = 1.7 * F.linear(hidden, weight, bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    bounds = head_capacity(weight, bias, hidden_norm=norm, logit_scale=1.7, softcap=softcap)
    top = z.max(-1).values
    others = (z.sum(-1) - top) / (z.shape[-1] - 1)
    assert (top - others).max() <= bounds.margin * EXACT + 1e-9
    assert z.softmax(-1).max() <= bounds.max_probability * EXACT
    assert entropy(z).min() >= bounds.min_entropy / EXACT - 1e-9


@given(st.integers(0, 2**31), st.floats(0.1, 10))
def test_without_a_bias_a_row_reaches_the_bound_on_the_margin(seed, norm):
    weight, _ = random_head(seed)
    rows = weight - weight.mean(0)
    row = rows[rows.norm(dim=1).argmax()]
    z = weight @ (norm * row / row.norm())
    top = z[rows.norm(dim=1).argmax()]
    margin = (top - z.mean()) * 40 / 39
    assert head_geometry(weight).margin(norm) == pytest.approx(margin.item(), rel=1e-9)


@pytest.mark.parametrize("vocab_size", [2, 3, 10, 1000])
@pytest.mark.parametrize("radius", [0.0, 0.3, 2.0, 9.0, 40.0])
def test_the_extremal_logits_reach_the_bounds_of_the_ball(vocab_size, radius):
    z = spike(radius, vocab_size)
    # The head that has these logits for the hidden state (1,): its one singular value is the radius.
    bounds = head_capacity(z[:, None], hidden_norm=1.0)
    assert bounds.radius == pytest.approx(radius)
    assert bounds.max_probability == pytest.approx(z.softmax(-1).max().item())
    assert bounds.min_entropy == pytest.approx(entropy(z).item(), abs=1e-12)
    assert bounds.margin == pytest.approx(radius * math.sqrt(vocab_size / (vocab_size - 1)))


@pytest.mark.parametrize("vocab_size", [2, 3, 5, 12])
@pytest.mark.parametrize("radius", [0.5, 2.0, 4.0, 8.0])
def test_no_descent_within_the_ball_finds_a_lower_entropy(vocab_size, radius):
    generator = torch.Generator().manual_seed(vocab_size)
    start = torch.randn(50, vocab_size, generator=generator, dtype=torch.float64)
    z = start.requires_grad_()
    optimiser = torch.optim.Adam([z], lr=0.05)
    for _ in range(300):
        centred = z - z.mean(-1, keepdim=True)
        values = entropy(radius * centred / centred.norm(dim=-1, keepdim=True))
        optimiser.zero_grad()
        values.sum().backward()
        optimiser.step()
    bound, found = min_entropy(radius, vocab_size), values.min().item()
    assert found >= bound - 1e-9
    assert found == pytest.approx(bound, abs=1e-3)  # as far as 300 steps come


@pytest.mark.parametrize("vocab_size", [100, 32000])
@pytest.mark.parametrize("radius", [1.0, 8.0, 10.4, 12.0, 14.0, 30.0])
def test_no_number_of_equal_spikes_has_a_lower_entropy(vocab_size, radius):
    for count in (2, 3, 5, 20, vocab_size // 2, vocab_size - 1):
        z = torch.zeros(vocab_size, dtype=torch.float64)
        z[:count] = 1
        z = z - z.mean()
        assert entropy(z * radius / z.norm()) >= min_entropy(radius, vocab_size) - 1e-9


@given(st.integers(0, 2**31))
def test_singular_values_are_those_of_torch(seed):
    weight, _ = random_head(seed)
    geometry = head_geometry(weight)
    assert geometry.spectral_norm == pytest.approx(torch.linalg.svdvals(weight)[0].item())
    centred = torch.linalg.svdvals(weight - weight.mean(0))[0].item()
    assert geometry.centred_spectral_norm == pytest.approx(centred)


def test_half_precision_costs_no_more_than_the_documented_error():
    weight = (torch.randn(5000, 64) + 2).bfloat16()
    geometry = head_geometry(weight)
    exact = torch.linalg.svdvals(weight.double())[0].item()
    assert geometry.spectral_norm == pytest.approx(exact, rel=1e-5)
    centred = torch.linalg.svdvals(weight.double() - weight.double().mean(0))[0].item()
    assert geometry.centred_spectral_norm == pytest.approx(centred, rel=1e-5)


def test_a_gain_measures_the_head_that_it_folds_into():
    weight, bias = random_head(3, with_bias=True)
    gain = torch.linspace(-2, 3, 6, dtype=torch.float64)
    folded, direct = head_geometry(weight, bias, gain=gain), head_geometry(weight * gain, bias)
    assert folded.spectral_norm == pytest.approx(direct.spectral_norm)
    torch.testing.assert_close(folded.row_norm, direct.row_norm)
    torch.testing.assert_close(folded.row_bias, direct.row_bias)


def test_nothing_larger_than_a_chunk_is_made(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 4096)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and function != torch.ops.aten.detach.default:
                largest.append(result.numel())
            return result

    weight = torch.randn(3000, 32)
    with Watch():
        geometry = head_geometry(weight)
    assert max(largest) == 4096
    assert geometry.spectral_norm == pytest.approx(torch.linalg.svdvals(weight)[0].item(), rel=1e-5)


@given(st.integers(2, 300_000), st.floats(1e-4, 1))
def test_at_the_optimal_margin_the_softmax_is_the_smoothed_target(vocab_size, smoothing):
    z = torch.zeros(vocab_size, dtype=torch.float64)
    z[1] = smoothed_margin(vocab_size, smoothing)
    loss = F.cross_entropy(z[None], torch.tensor([1]), label_smoothing=smoothing)
    assert z.softmax(0)[1].item() == pytest.approx(1 - smoothing + smoothing / vocab_size)
    assert loss.item() == pytest.approx(smoothed_loss_floor(vocab_size, smoothing), rel=1e-8)
    assert max_probability(z[1].item(), vocab_size) == pytest.approx(z.softmax(0)[1].item())


@pytest.mark.parametrize(
    ("vocab_size", "margin", "floor"),
    [
        (32_000, 12.571, 1.362),
        (50_257, 13.022, 1.408),
        (128_256, 13.959, 1.501),
        (151_936, 14.128, 1.518),
        (256_000, 14.650, 1.570),
    ],
)
def test_the_optimum_of_common_vocabularies(vocab_size, margin, floor):
    assert smoothed_margin(vocab_size, 0.1) == pytest.approx(margin, abs=5e-4)
    assert smoothed_loss_floor(vocab_size, 0.1) == pytest.approx(floor, abs=5e-4)


def test_the_ends_of_smoothing():
    assert smoothed_margin(10, 0.0) == math.inf
    assert smoothed_loss_floor(10, 0.0) == 0.0
    assert smoothed_margin(10, 1.0) == 0.0
    assert smoothed_loss_floor(10, 1.0) == pytest.approx(math.log(10))
    geometry = head_geometry(torch.eye(10))
    assert not geometry.capacity(1e6, label_smoothing=0.0).reachable
    even = geometry.capacity(0.0, label_smoothing=1.0)
    assert even.reachable
    assert even.max_temperature == math.inf


@given(st.integers(0, 2**31), st.booleans(), st.floats(0.5, 30))
def test_the_verdict_turns_at_the_required_norm(seed, with_bias, scale):
    weight, bias = random_head(seed, with_bias=with_bias)
    geometry = head_geometry(weight, bias)
    needed = geometry.capacity(1.0, logit_scale=scale).required_norm
    assert geometry.capacity(needed * 1.0001, logit_scale=scale).reachable
    if needed > 0:
        assert not geometry.capacity(needed * 0.9999, logit_scale=scale).reachable


@pytest.mark.parametrize("softcap", [None, 4.0, 30.0])
def test_the_verdict_turns_at_the_largest_temperature(softcap):
    geometry = head_geometry(random_head(0)[0])

    def at(temperature):
        cap = None if softcap is None else softcap / temperature
        return geometry.capacity(7.0, logit_scale=1 / temperature, softcap=cap)

    limit = at(1.0).max_temperature
    assert at(limit * 0.9999).reachable
    assert not at(limit * 1.0001).reachable


def test_a_softcap_below_half_the_optimal_margin_rules_it_out():
    geometry = head_geometry(torch.randn(1000, 8))
    half = smoothed_margin(1000, 0.1) / 2
    assert geometry.capacity(1e4, softcap=half * 1.001).reachable
    below = geometry.capacity(1e4, softcap=half * 0.999)
    assert not below.reachable
    assert below.required_norm == math.inf


def test_a_head_of_equal_rows_is_never_confident():
    capacity = head_capacity(torch.ones(50, 4), hidden_norm=1e6)
    assert capacity.max_probability == pytest.approx(1 / 50)
    assert capacity.min_entropy == pytest.approx(math.log(50))
    assert capacity.required_norm == math.inf


def test_norms_of_a_sample():
    norms = hidden_norms(torch.arange(1, 102, dtype=torch.bfloat16).reshape(1, -1))
    assert (norms.count, norms.max, norms.mean) == (101, 101.0, 51.0)
    assert norms.quantiles == {0.05: 6.0, 0.5: 51.0, 0.95: 96.0, 0.99: 100.0}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: head_geometry(torch.ones(3)), ValueError, r"\(V, D\) with V >= 2"),
        (lambda: head_geometry(torch.ones(1, 3)), ValueError, r"V >= 2"),
        (lambda: head_geometry(torch.ones(4, 3, dtype=torch.int8)), TypeError, "int8"),
        (lambda: head_geometry(torch.ones(4, 3), torch.ones(3)), ValueError, r"shape \(4,\)"),
        (
            lambda: head_geometry(torch.ones(4, 3), gain=torch.ones(4)),
            ValueError,
            r"gain must have shape \(3,\)",
        ),
        (
            lambda: head_geometry(torch.full((4, 3), math.nan)),
            ValueError,
            "NaN or infinity.*pass float64",
        ),
        (
            lambda: head_geometry(torch.ones(4, 3), torch.full((4,), math.inf)),
            ValueError,
            "linear_bias holds NaN.*check the checkpoint",
        ),
        (lambda: smoothed_loss_floor(9, 1.1), ValueError, "label_smoothing"),
        (lambda: head_capacity(torch.eye(3), hidden_norm=math.nan), ValueError, "hidden_norm"),
        (
            lambda: head_capacity(torch.eye(3), hidden_norm=1, logit_scale=0),
            ValueError,
            "logit_scale",
        ),
        (lambda: head_capacity(torch.eye(3), hidden_norm=1, softcap=-1), ValueError, "softcap"),
        (lambda: hidden_norms(torch.tensor([])), ValueError, "one at least"),
        (lambda: hidden_norms(torch.tensor([1.0, math.nan])), ValueError, "finite"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
