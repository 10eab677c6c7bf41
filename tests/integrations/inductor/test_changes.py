"""Tensors that are changed in place, in every spelling: the loss reads what it read before, or is left alone."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.integrations.inductor.backend import pass_only
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

B, T, D, V = 2, 6, 5, 17


@torch.library.custom_op("levelhead_tests::double", mutates_args=("x",))
def _double(x: Tensor) -> None:
    x.mul_(2)


_OF_STATES: dict[str, Callable[[Tensor], Any]] = {
    "method": lambda s: s.mul_(2),
    "view": lambda s: s.view(-1)[3:].zero_(),
    "detached": lambda s: s.detach().zero_(),
    "item": lambda s: s.__setitem__(0, 0.0),
    "dunder": lambda s: s.__imul__(2),
    "keyword": lambda s: torch.relu_(input=s),
    "inplace": lambda s: F.relu(input=s, inplace=True),
    "positional_inplace": lambda s: F.leaky_relu(s, 0.1, True),
    "foreach": lambda s: torch._foreach_mul_([s], 2.0),
    "overload": lambda s: torch.ops.aten.mul_.Scalar(s, 2),
    "packet": lambda s: torch.ops.levelhead_tests.double(s),
    "checkpoint": lambda s: checkpoint(lambda x: x.mul_(2), s, use_reentrant=False),
}


def _compare(step: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    counters.clear()
    random = torch.Generator().manual_seed(0)
    h, weight = (
        torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_()
        for shape in ((B, T, D), (V, D))
    )
    y = torch.randint(0, V, (B, T), generator=random)
    expected = step(h, weight, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = torch.compile(step, fullgraph=True, backend=pass_only())(h, weight, y)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(x, (h, weight), allow_unused=True) for x in (actual, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", _OF_STATES)
def test_states_between_layer_and_loss(name: str) -> None:
    def step(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        states = h * 2
        logits = F.linear(states, weight.detach())  # so autograd does not mind
        _OF_STATES[name](states)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + states.sum()

    _compare(step)
    assert counters["levelhead"] == {"declined": 1}


def test_states_that_an_operator_reads() -> None:
    def step(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(h, weight)
        read = torch.ops.aten.sin(h).sum() + torch.ops.aten.cos.default(weight).sum()
        return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + read

    _compare(step)
    assert counters["levelhead"] == {"linear_cross_entropy": 1}


def test_states_by_out() -> None:
    def step(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        states, indices = h.detach() * 2, y.new_empty(h.shape)
        logits = F.linear(states, weight.detach())
        torch.sort(states, 0, out=(states, indices))
        return weight.sum() * F.cross_entropy(logits.flatten(0, 1), y.flatten())

    _compare(step)
    assert counters["levelhead"] == {"declined": 1}


def test_targets_between_layer_and_loss_are_read_where_the_loss_is() -> None:
    def step(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        logits, target = F.linear(h, weight), y.clone()
        target <<= 1
        target.clamp_(max=V - 1)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    _compare(step)
    assert counters["levelhead"] == {"linear_cross_entropy": 1}


def test_targets_between_two_uses() -> None:
    def step(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        logits, target = F.linear(h, weight), y.clone()
        mean = logits.logsumexp(-1).mean()
        torch.sort(y, 1, out=(target, torch.empty_like(y)))
        return mean - logits.gather(-1, target[..., None]).mean()

    _compare(step)
    assert counters["levelhead"] == {}


def test_one_hot_ids_that_are_smoothed_in_place() -> None:
    def step(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        q = F.one_hot(y, V).float()
        q.mul_(0.9).add_(0.1 / V)
        return -(q * F.linear(h, weight).log_softmax(-1)).sum(-1).mean()

    _compare(step)


def test_ids_of_one_hot() -> None:
    def step(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        ids = y.clone()
        q = F.one_hot(ids, V).float()
        ids.zero_()
        return -(q * F.linear(h, weight).log_softmax(-1)).sum(-1).mean()

    _compare(step)


def test_positions_of_picks() -> None:
    def step(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(B * T)
        rows[0] = 1
        return -F.linear(h, weight).flatten(0, 1).log_softmax(-1)[rows, y.flatten()].mean()

    _compare(step)


def test_logsumexp_before_it_is_subtracted() -> None:
    def step(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(h.detach(), weight.detach())
        logsumexp = logits.logsumexp(-1, keepdim=True)
        logsumexp.mul_(2)
        return -(logits - logsumexp).gather(-1, y[..., None]).mean() * weight.sum()

    _compare(step)


def test_statistics_that_are_returned_are_changed() -> None:
    def step(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(h, weight)[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), y[:, 1:], reduction="none")
        losses[y[:, 1:] == 3] = 0
        return losses.mul_(2).sum()

    _compare(step)
    assert counters["levelhead"] == {"linear_cross_entropy": 1}
