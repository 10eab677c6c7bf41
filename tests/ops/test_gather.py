"""The gathered products as operators of torch.library; what they compute is tested with the distillation loss."""

from collections.abc import Callable

import pytest
import torch
from torch.library import opcheck

from levelhead.ops.gather import linear_gather
from levelhead.ops.sizes import Sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(7, 4).to(dtype).requires_grad_()
    weight = torch.randn(13, 4).to(dtype).requires_grad_()
    ids = torch.randint(-1, 14, (7, 3))
    opcheck(torch.ops.levelhead.linear_gather.default, (x, weight, ids, ""))
    for mask in ([True, True], [True, False], [False, True]):
        args = (torch.randn(7, 3), x.detach(), weight.detach(), ids, mask)
        opcheck(torch.ops.levelhead.linear_gather_backward.default, args)


@pytest.mark.parametrize("few_at_a_time", [False, True])
def test_gradcheck(few_at_a_time: bool, change_sizes: Callable[..., Sizes]) -> None:
    if few_at_a_time:
        change_sizes(buffer_share=0, buffer_bytes=2 * 2 * 3 * 4 * 8)
    x, weight, bias = (
        torch.randn(*shape).double().requires_grad_() for shape in ((7, 4), (13, 4), (13,))
    )
    ids = torch.randint(-1, 14, (7, 3))
    torch.autograd.gradcheck(
        lambda *tensors: linear_gather(*tensors[:2], ids, tensors[2], 5.0, 0.5), (x, weight, bias)
    )


def test_no_tokens() -> None:
    x = torch.zeros(0, 4, requires_grad=True)
    z = linear_gather(x, torch.zeros(13, 4), torch.zeros(0, 3).long(), None, None, 1.0)
    z.sum().backward()
    assert z.shape == (0, 3)
