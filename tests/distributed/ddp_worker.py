"""A patched model under DistributedDataParallel, a scenario a function."""

import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
from tests.distributed.launch import TIMEOUT
from tests.distributed.problem import (
    RANKS,
    Batch,
    Run,
    batches,
    optimizer,
    parameters,
    part,
    tiny,
    train,
    valid_tokens,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from levelhead import patch_model


def patched(**options) -> nn.Module:
    return patch_model(tiny(**options), smoothing=0.1)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """This rank's part of the loss, times the ranks: DDP takes the mean of the gradients.

    That is how Trainer does it.
    """
    rows = part(batch, dist.get_rank())
    return RANKS * model(**rows, num_items_in_batch=valid_tokens(batch)).loss


def reported(losses: list[Tensor]) -> list[Tensor]:
    """The mean of each loss over the ranks."""
    total = torch.stack(losses)
    dist.all_reduce(total)
    return list(total / RANKS)


def run(model: nn.Module, inner: nn.Module) -> Run:
    losses = train(optimizer(model), batches(), lambda batch: loss_of(model, batch))
    return {"losses": reported(losses), "parameters": parameters(inner)}


def wrapped(**options) -> Run:
    inner = patched()
    return run(DistributedDataParallel(inner, **options), inner)


def tied() -> Run:
    inner = patched(tie_word_embeddings=True)
    return run(DistributedDataParallel(inner), inner)


def patched_after_wrapping() -> Run:
    inner = tiny()
    return run(patch_model(DistributedDataParallel(inner), smoothing=0.1), inner)


def gradient_checkpointing() -> Run:
    inner = patched()
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    return run(DistributedDataParallel(inner), inner)


def accumulation() -> Run:
    """A row at a time; all but the last without a reduction."""
    inner = patched()
    model = DistributedDataParallel(inner)
    descend = optimizer(model)
    losses = []
    for batch in batches():
        descend.zero_grad()
        rows = part(batch, dist.get_rank())
        total = torch.zeros(())
        for row in range(2):
            last = row == 1
            with contextlib.nullcontext() if last else model.no_sync():
                items = valid_tokens(batch)
                loss = RANKS * model(**part(rows, row), num_items_in_batch=items).loss
                loss.backward()
            total = total + loss.detach()
        descend.step()
        losses.append(total)
    return {"losses": reported(losses), "parameters": parameters(inner)}


def compiled() -> Run:
    """With 2.3 MiB of parameters in buckets of 1 MiB, at which the compiler cuts the graph."""
    inner = patched(intermediate_size=3000)
    model = DistributedDataParallel(inner, bucket_cap_mb=1)
    return run(torch.compile(model, backend="aot_eager"), inner)


def compiled_by_inductor() -> Run:
    """In float32: inductor of torch 2.11 fails on the norms of any Llama in float64."""
    inner = patched(num_hidden_layers=1, dtype=torch.float32)
    return run(torch.compile(DistributedDataParallel(inner)), inner)


def compiled_inside() -> Run:
    inner = patched()
    return run(DistributedDataParallel(torch.compile(inner, backend="aot_eager")), inner)


def resumed() -> Run:
    """Saved after a step, loaded into other weights, patched and not, and continued."""
    folder = Path(os.environ["CHECKPOINTS"])
    inner = patched()
    model = DistributedDataParallel(inner)
    descend = optimizer(model)
    losses = train(descend, batches()[:1], lambda batch: loss_of(model, batch))
    if dist.get_rank() == 0:
        torch.save({"model": inner.state_dict(), "optimizer": descend.state_dict()}, folder / "ddp")
    dist.barrier()

    inner = patched()
    for parameter in inner.parameters():
        torch.nn.init.zeros_(parameter)
    model = DistributedDataParallel(inner)
    descend = optimizer(model)
    state = torch.load(folder / "ddp")
    inner.load_state_dict(state["model"])
    descend.load_state_dict(state["optimizer"])
    losses += train(descend, batches()[1:], lambda batch: loss_of(model, batch))
    tiny().load_state_dict(state["model"])  # unpatched: strict, so every key is known there
    return {"losses": reported(losses), "parameters": parameters(inner)}


SCENARIOS = {
    "wrapped": wrapped,
    "tied": tied,
    "patched after wrapping": patched_after_wrapping,
    "find_unused_parameters": lambda: wrapped(find_unused_parameters=True),
    "static_graph": lambda: wrapped(static_graph=True),
    "gradient_as_bucket_view": lambda: wrapped(gradient_as_bucket_view=True),
    "gradient checkpointing": gradient_checkpointing,
    "no_sync accumulation": accumulation,
    "compiled": compiled,
    "compiled by inductor": compiled_by_inductor,
    "compiled before wrapping": compiled_inside,
    "resumed": resumed,
}


def start() -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
