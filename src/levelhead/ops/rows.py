"""Rows that don't count (ignored, or without gradient) must cost little and be inert, even if they hold NaN."""

from torch import Tensor


class Rows:
    """The rows of a batch that count.

    On a CPU the others are left out of all work. Elsewhere their number is only known after a host
    synchronisation, so they stay and are overwritten by a harmless value.

    Args:
        keep: which rows count, bool, shape ``(N,)``.
    """

    def __init__(self, keep: Tensor) -> None:
        self._keep = keep
        self._index = keep.nonzero().squeeze(1) if _can_leave_out(keep) else None
        self._all_count = self._index is not None and len(self._index) == len(keep)

    def take(self, tensor: Tensor, fill: float = 0) -> Tensor:
        """Return the rows of ``tensor`` that count; those that must stay all the same hold ``fill``."""
        if self._all_count:
            return tensor
        if self._index is None:
            others = ~self._keep.view(-1, *(1,) * (tensor.dim() - 1))
            return tensor.masked_fill(others, fill)
        return tensor[self._index]

    def put(self, tensor: Tensor) -> Tensor:
        """Return the full batch, with zeros in the rows that don't count: the inverse of :meth:`take`."""
        if self._index is None or self._all_count:
            return tensor
        full = tensor.new_zeros(len(self._keep), *tensor.shape[1:])
        return full.index_copy_(0, self._index, tensor)


def _can_leave_out(keep: Tensor) -> bool:
    return keep.device.type == "cpu"
