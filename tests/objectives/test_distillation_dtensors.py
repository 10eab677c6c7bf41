"""DTensors of tokens, with a head that is the same on all ranks, have the losses of the tensors they hold."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from levelhead.objectives import Distillation, distillation_loss
from levelhead.objectives.distillation import Normalisation, Reduction

MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def tensors() -> dict[str, Tensor]:
    """Of five tokens; the first has no teacher, and the second has padding."""
    top = torch.randn(5, 9).log_softmax(-1).topk(3)
    ids, log_probs = top.indices, top.values
    ids[0, 0], log_probs[1, 2] = -100, -torch.inf
    x, weight = torch.randn(5, 8), torch.randn(9, 8)
    names = ("input", "linear_weight", "teacher_ids", "teacher_log_probs")
    return dict(zip(names, (x, weight, ids, log_probs), strict=True))


def shared(tensors: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, DTensor]:
    return {
        name: distribute_tensor(
            tensor, mesh, [Replicate() if name == "linear_weight" else Shard(0)]
        )
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalisation", get_args(Normalisation))
def test_in_every_mode_of_autograd(mesh: DeviceMesh, normalisation: Any, mode: Any) -> None:
    plain = tensors()
    with mode():
        for reduction in get_args(Reduction):
            options: Any = {"normalisation": normalisation, "reduction": reduction}
            loss: Any = distillation_loss(**shared(plain, mesh), **options)
            torch.testing.assert_close(loss.full_tensor(), distillation_loss(**plain, **options))


@pytest.mark.parametrize("mode", MODES)
def test_so_has_the_objective_of_a_patched_model(mesh: DeviceMesh, mode: Any) -> None:
    plain = tensors() | {"target": torch.tensor([1, 2, -100, 4, 5])}
    head: Any = {"linear_bias": None, "softcap": None, "logit_scale": 1.0}
    with mode():
        losses: Any = Distillation()(**shared(plain, mesh), **head)
        torch.testing.assert_close(losses.full_tensor(), Distillation()(**plain, **head))


@pytest.mark.parametrize("mode", MODES)
def test_what_no_teacher_says_makes_nan_of_the_token(mesh: DeviceMesh, mode: Any) -> None:
    plain = tensors()
    plain["teacher_ids"][2, 0] = 99
    plain["teacher_log_probs"][3] = 0
    plain["teacher_log_probs"][4] = -torch.inf
    with mode():
        losses: Any = distillation_loss(**shared(plain, mesh), reduction="none")
        assert losses.full_tensor().isnan().tolist() == [False, False, True, True, True]
