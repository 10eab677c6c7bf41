"""The peak of memory in use: resident memory of the process on a CPU, PyTorch's allocator on CUDA."""

import ctypes
import re
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_M_MMAP_THRESHOLD = -3  # of mallopt(3)


def prepare(device: torch.device) -> bool:
    """Makes the peak of this process exact; False where it cannot be reset and read.

    Call it in a process of its own, before anything is measured: it changes how PyTorch runs there.
    """
    if device.type == "cuda":
        return True
    if sys.platform != "linux":
        return False
    # Linux counts resident pages per core and adds them up late: one busy core keeps the sum exact.
    torch.set_num_threads(1)
    try:
        return_freed(128 * 1024)
        reset_peak(device)
    except (AttributeError, OSError):  # another libc; a closed /proc
        return False
    return True


def return_freed(size: int) -> None:
    """Lets every block of `size` bytes or more go back to the system when it is freed.

    By default glibc raises its threshold as blocks are freed, and then keeps ever larger ones.

    Raises:
        AttributeError: This is another libc.
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, size)


def reset_peak(device: torch.device) -> int:
    """Starts a new peak at the bytes in use now, and returns these."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")
    return _resident("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes in use since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")


def _resident(field: str) -> int:
    kibibytes = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if kibibytes is None:
        raise OSError(f"{_STATUS} has no {field}")
    return 1024 * int(kibibytes[1])


def free(device: torch.device) -> int:
    """The bytes that can still be taken; on a CPU without Linux, where nobody says, all that one may ask for."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform != "linux":
        return sys.maxsize
    available = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
    return sys.maxsize if available is None else 1024 * int(available[1])
