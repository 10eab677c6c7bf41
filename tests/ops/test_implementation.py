"""Which implementation runs: chosen where none is named, refused with the reason where a named one cannot run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import levelhead
from levelhead.ops import checks, library


def _chosen(device: str, dtype: torch.dtype = torch.bfloat16) -> str:
    x: Any = SimpleNamespace(device=torch.device(device), dtype=dtype, is_cuda=device == "cuda")
    return library.implementation(None, x).__name__.removeprefix("levelhead.ops.")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    def of_capability(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    return of_capability


def test_a_cpu_gets_the_chunks() -> None:
    assert _chosen("cpu") == "chunked"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 1)])
def test_a_gpu_gets_the_kernels(gpu: Any, capability: tuple[int, int]) -> None:
    gpu(*capability)
    assert _chosen("cuda") == "triton"


def test_a_gpu_too_old_for_the_kernels_gets_the_chunks(gpu: Any) -> None:
    gpu(7, 5)
    assert _chosen("cuda") == "chunked"


def test_without_triton_a_gpu_gets_the_chunks(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(9, 0)
    monkeypatch.setattr(checks, "_HAS_TRITON", False)
    assert _chosen("cuda") == "chunked"


def _refusal() -> str:
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    with pytest.raises(ValueError, match="impl='triton' cannot run") as caught:
        levelhead.linear_logit_stats(x, weight, torch.zeros(2, 1).long(), impl="triton")
    return str(caught.value)


def test_the_kernels_asked_for_on_a_cpu_say_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert _refusal() == (
        "impl='triton' cannot run: input is on cpu, and Triton needs a GPU (or TRITON_INTERPRET=1, to debug); "
        "use impl=None or 'chunked'"
    )


def test_the_kernels_asked_for_without_triton_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_HAS_TRITON", False)
    assert "triton is not installed" in _refusal()


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("xpu", "input is on xpu, and only GPUs of NVIDIA and AMD are supported"),
        ("cuda", "the GPU is older than compute capability 8.0"),
    ],
)
def test_devices_that_cannot(gpu: Any, device: str, reason: str) -> None:
    gpu(7, 5)
    assert checks.why_not_triton(torch.device(device), torch.float16) == reason
