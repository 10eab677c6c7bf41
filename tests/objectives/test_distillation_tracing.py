"""torch.fx.symbolic_trace knows no values: it holds the distillation loss as one call, or is told how."""

import pytest
import torch
from torch import Tensor, nn

from levelhead import objectives
from levelhead.objectives import distillation_loss

torch.fx.wrap("distillation_loss")


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 9, bias=False)

    def forward(self, x: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
        return distillation_loss(x, self.head.weight, ids, log_probs)


class Unnamed(Student):
    def forward(self, x: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
        return objectives.distillation_loss(x, self.head.weight, ids, log_probs)


def test_a_named_function_is_one_node() -> None:
    student = Student()
    graph = torch.fx.symbolic_trace(student)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert calls == [distillation_loss]
    top = torch.randn(5, 9).log_softmax(-1).topk(3)
    tensors = torch.randn(5, 4), top.indices, top.values
    torch.testing.assert_close(graph(*tensors), student(*tensors))


def test_another_is_refused_with_the_way_to_name_it() -> None:
    with pytest.raises(TypeError, match=r'name the function: torch\.fx\.wrap\("distillation_loss"'):
        torch.fx.symbolic_trace(Unnamed())
