"""Peak memory of a model's loss, measured inside a training step as it is."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from levelhead.measure.memory import peak, prepare, reset_peak

from .data import Batch
from .training import Recipe, build_pair


def loss_peaks(
    batch: Batch, *, vocabulary_size: int, smoothing: float, recipe: Recipe
) -> dict[str, int | None]:
    """Return the bytes that head and loss of `dense` and of `fused` need at their peak, on one batch.

    The window opens when the backbone has made the hidden states and closes when their gradient is
    known, so it holds the forward and the backward of head and loss, whatever these do. Not counted
    is what exists before it (weights, activations, hidden states) and what it must leave behind
    (the gradients of the hidden states and of the head's weight). The weights stay random: memory
    depends on shapes alone.

    On a CPU this is the peak of resident memory, which only Linux lets a process reset. A child
    process measures it: in one that has trained before, freed memory that the allocator kept would
    hide part of the peak. On CUDA it is the peak of PyTorch's allocator. None stands for what cannot
    be measured: on a CPU without Linux and glibc, or where /proc is closed.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        # As lists, which need no memory shared between the two processes.
        rows, device = [tensor.tolist() for tensor in batch], batch.input_ids.device
        return child.submit(_measure, rows, device, vocabulary_size, smoothing, recipe).result()


def _measure(
    rows: list[Any], device: torch.device, vocabulary_size: int, smoothing: float, recipe: Recipe
) -> dict[str, int | None]:
    can_measure = prepare(device)
    batch = Batch(*(torch.tensor(tensor, device=device) for tensor in rows))
    pair = build_pair(vocabulary_size, smoothing=smoothing, seed=0, recipe=recipe, device=device)
    if not can_measure:
        return dict.fromkeys(pair)
    for model in pair.values():
        _window(model, batch)  # libraries allocate for good on their first call
    return {name: _window(model, batch) for name, model in pair.items()}


def _window(model: Any, batch: Batch) -> int:
    device = batch.input_ids.device
    readings: list[int] = []

    def open_window(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output.last_hidden_state  # (B, T, D)
        hidden.register_hook(lambda _gradient: readings.append(peak(device)))
        readings.append(hidden.nbytes + model.get_output_embeddings().weight.nbytes)
        readings.append(reset_peak(device))

    handle = model.base_model.register_forward_hook(open_window)
    model(input_ids=batch.input_ids, labels=batch.labels).loss.backward()
    handle.remove()
    model.zero_grad()
    gradients, before, most = readings
    return max(0, most - before - gradients)
