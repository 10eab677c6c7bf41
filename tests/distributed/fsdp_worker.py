"""A patched model under FSDP1 and FSDP2, a scenario a function."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.distributed.launch import TIMEOUT
from tests.distributed.problem import (
    RANKS,
    Batch,
    Run,
    batches,
    optimizer,
    part,
    smoothed_from_logits,
    tiny,
    train,
    valid_tokens,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from levelhead import patch_model

BF16 = torch.bfloat16
ONE_LAYER = {"num_hidden_layers": 1}
TIED = {"tie_word_embeddings": True}


def patched(**options: Any) -> Any:
    return patch_model(tiny(**options), smoothing=0.1)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """This rank's part of the loss, times the ranks: FSDP takes the mean of the gradients."""
    rows = part(batch, dist.get_rank())
    return RANKS * model(**rows, num_items_in_batch=valid_tokens(batch)).loss


def steps(model: nn.Module, descend: torch.optim.Optimizer, whole: list[Batch]) -> list[Tensor]:
    """The losses, as the model reports them, averaged over the ranks."""
    losses = train(descend, whole, lambda batch: loss_of(model, batch))
    total = torch.stack(losses)
    dist.all_reduce(total)
    return list(total / RANKS)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options)
    return {name: value.clone() for name, value in state.items()}


def run(model: nn.Module) -> Run:
    losses = steps(model, optimizer(model), batches())
    return {"losses": losses, "parameters": whole_state(model)}


def fsdp1(model: nn.Module, *units: type[nn.Module], **options: Any) -> nn.Module:
    """`model` with every module of a class in `units`, and the rest, as units of their own."""
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy(units) if units else None,
        device_id=torch.device("cpu"),
        **{"use_orig_params": True} | options,
    )


def fsdp2(model: Any, *units: Any, **options: Any) -> Any:
    """`model` with each of `units`, and the rest, as units of their own."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, **options)
    return model


def layers1(model: Any, **options: Any) -> Any:
    return fsdp1(model, LlamaDecoderLayer, **options)


def head2(model: Any, **options: Any) -> Any:
    return fsdp2(model, *model.model.layers, model.lm_head, **options)


def tail2(model: Any) -> Any:
    """The units that transformers and accelerate make, but gathered anew for the backward pass."""
    return fsdp2(model, *model.model.layers, [model.model.norm, model.lm_head])


def tied2(model: Any) -> Any:
    base = model.model
    return fsdp2(model, *base.layers, [base.norm, base.embed_tokens, model.lm_head])


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def compiled(model: nn.Module, backend: str = "aot_eager") -> Any:
    return torch.compile(model, backend=backend)


def by_inductor() -> Run:
    """In float32: inductor of torch 2.11 fails on the norms of any Llama in float64."""
    return run(compiled(fsdp2(patched(**ONE_LAYER, dtype=torch.float32)), "inductor"))


def mixed1(model: Any) -> nn.Module:
    return layers1(model, mixed_precision=MixedPrecision(BF16, reduce_dtype=torch.float32))


def mixed2(model: Any, output_dtype: torch.dtype | None = None) -> nn.Module:
    policy = MixedPrecisionPolicy(BF16, reduce_dtype=torch.float32, output_dtype=output_dtype)
    return head2(model, mp_policy=policy)


def mixed(wrap: Callable[[Any], nn.Module]) -> dict[str, Run]:
    """In bfloat16, from float32 parameters: with the patch and without."""
    return {
        "patched": run(wrap(patched(dtype=torch.float32))),
        "unpatched": run(wrap(smoothed_from_logits(tiny(dtype=torch.float32)))),
    }


def evaluated() -> dict[str, Tensor]:
    """The logits and the loss of an evaluation between steps."""
    model = head2(patched())
    loss_of(model, batches()[0]).backward()
    model.eval()
    with torch.no_grad():
        output = model(**batches()[0])
    return {"logits": output.logits, "loss": output.loss}


def resumed(wrap: Callable[[Any], nn.Module]) -> Run:
    """Saved after a step, loaded into other weights, patched and not, and continued."""
    folder = Path(os.environ["CHECKPOINTS"], wrap.__name__)
    model = wrap(patched())
    descend = optimizer(model)
    losses = steps(model, descend, batches()[:1])
    saved = whole_state(model)
    states = get_state_dict(model, descend)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)

    model = patched()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model = wrap(model)
    descend = optimizer(model)
    states = get_state_dict(model, descend)
    dcp.load({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
    set_state_dict(model, descend, model_state_dict=states[0], optim_state_dict=states[1])
    losses += steps(model, descend, batches()[1:])

    plain = tiny().state_dict()
    dcp.load({"model": plain}, checkpoint_id=folder)
    assert all(torch.equal(plain[name], saved[name]) for name in saved | plain)
    return {"losses": losses, "parameters": whole_state(model)}


SCENARIOS = {
    "FSDP1": lambda: run(fsdp1(patched())),
    "FSDP1, layers": lambda: run(layers1(patched())),
    "FSDP1, every Linear": lambda: run(fsdp1(patched(), LlamaDecoderLayer, nn.Linear)),
    "FSDP1, flat parameters": lambda: run(layers1(patched(), use_orig_params=False)),
    "FSDP1, tied": lambda: run(layers1(patched(**TIED))),
    "FSDP1, compiled": lambda: run(compiled(layers1(patched(**ONE_LAYER)))),
    "FSDP1, resumed": lambda: resumed(layers1),
    "FSDP1, patched after wrapping": lambda: run(patch_model(layers1(tiny()), smoothing=0.1)),
    "FSDP1, bfloat16": lambda: mixed(mixed1),
    "FSDP2": lambda: run(fsdp2(patched())),
    "FSDP2, head": lambda: run(head2(patched())),
    "FSDP2, tail": lambda: run(tail2(patched())),
    "FSDP2, tied": lambda: run(tied2(patched(**TIED))),
    "FSDP2, gradient checkpointing": lambda: run(head2(checkpointed(patched()))),
    "FSDP2, compiled by inductor": by_inductor,
    "FSDP2, head compiled": lambda: run(compiled(head2(patched(**ONE_LAYER)))),
    "FSDP2, tail compiled": lambda: run(compiled(tail2(patched(**ONE_LAYER)))),
    "FSDP2, tied compiled": lambda: run(compiled(tied2(patched(**ONE_LAYER | TIED)))),
    "FSDP2, resumed": lambda: resumed(head2),
    "FSDP2, patched after fully_shard": lambda: run(patch_model(head2(tiny()), smoothing=0.1)),
    "FSDP2, evaluated": evaluated,
    "FSDP2, bfloat16": lambda: mixed(mixed2),
    "FSDP2, bfloat16 outputs": lambda: mixed(lambda model: mixed2(model, BF16)),
}


def start() -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
