"""Refuse labels outside the vocabulary by their position in the labels, not in the shifted targets."""

from __future__ import annotations

import torch
from torch import Tensor


def check_labels(
    target: Tensor, vocabulary: int, ignore_index: int, *, name: str = "labels", shifted: bool
) -> None:
    """Refuse labels outside the vocabulary, where looking at them takes no host synchronisation.

    Args:
        target: (..., T), the label to predict at each position.
        vocabulary: how many entries it has.
        ignore_index: the label that stands for none.
        name: the argument that they were given as.
        shifted: whether `target` is the labels shifted by one position to the left.

    Raises:
        IndexError: a label is outside; the message has its position in the labels.
        TypeError: the labels are no integers.
    """
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"{name} must hold integer ids, got {target.dtype}; use {name}.long()")
    if target.device.type != "cpu" or torch.compiler.is_compiling() or type(target) is not Tensor:
        return
    target = (
        target.long()
    )  # a comparison would convert -100 and the vocabulary size to a narrow dtype
    outside = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if outside.any():
        first = outside.nonzero()[0]
        value = target[tuple(first)].item()
        first[-1] += shifted
        raise IndexError(
            f"{name}{first.tolist()} is {value}, outside the vocabulary [0, {vocabulary}) and not "
            f"{ignore_index} for none; {int(outside.sum())} of {target.numel()} are. Make tokenizer "
            "and model agree, for example by model.resize_token_embeddings(len(tokenizer))"
        )
