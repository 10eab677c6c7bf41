"""A model prepared by Accelerate, a scenario a function.

Accelerate takes FSDP only on GPUs and the like. Told otherwise after its start, it runs on a CPU.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import (
    Accelerator,
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import TorchDynamoPlugin
from tests.distributed.problem import (
    ROWS,
    Batch,
    Run,
    batches,
    optimizer,
    parameters,
    part,
    smoothed_from_logits,
    tiny,
    valid_tokens,
    without_shared_memory,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from levelhead.integrations.accelerate import prepare
from levelhead.integrations.patch.state import patch_state

Prepare = Callable[[Accelerator, Any], tuple[Any, Any]]  # a model; it and its optimizer, prepared
BF16 = {"mixed_precision": "bf16"}
KINDS = {
    "DDP": {},
    "DDP, compiled": {"regions": False},
    "DDP, compiled by regions": {"regions": True},
    "FSDP2": {"fsdp": True},
    "FSDP2, compiled": {"fsdp": True, "regions": False},
    "FSDP2, compiled by regions": {"fsdp": True, "regions": True},
}


def accelerator(
    *, fsdp: bool = False, regions: bool | None = None, mixed_precision: str = "no"
) -> Accelerator:
    """A new one; `regions`: whether to compile by regions, None: not to compile."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState().distributed_type = DistributedType.MULTI_CPU
    backend = "no" if regions is None else "aot_eager"
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        dynamo_plugin=TorchDynamoPlugin(backend=backend, use_regional_compilation=bool(regions)),
    )
    if fsdp:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
        )
        if mixed_precision != "no":
            plugin.set_mixed_precision(mixed_precision)
        accelerator.state.fsdp_plugin = plugin
        for state in (accelerator.state, PartialState()):
            state.distributed_type = DistributedType.FSDP
    return accelerator


def patched_first(accelerator: Accelerator, model: Any) -> tuple[Any, Any]:
    return prepare(accelerator, model, optimizer(model), smoothing=0.1)


def prepared_first(accelerator: Accelerator, model: Any) -> tuple[Any, Any]:
    model, descend = accelerator.prepare(model, optimizer(model))
    return prepare(accelerator, model, smoothing=0.1), descend


def unpatched(accelerator: Accelerator, model: Any) -> tuple[Any, Any]:
    return accelerator.prepare(smoothed_from_logits(model), optimizer(model))


def steps(accelerator: Accelerator, model: Any, descend: Any, whole: list[Batch]) -> list[Tensor]:
    """The losses, as the model reports them, averaged over the ranks."""
    losses = []
    # Not the accelerator's num_processes, which is 1 with DeepSpeed on a CPU.
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for batch in whole:
        rows = part(batch, rank, ranks)
        loss = ranks * model(**rows, num_items_in_batch=valid_tokens(batch)).loss
        accelerator.backward(loss)
        descend.step()
        descend.zero_grad()
        losses.append(loss.detach())
    total = torch.stack(losses)
    dist.all_reduce(total)
    return list(total / ranks)


def whole_state(accelerator: Accelerator, model: Any) -> dict[str, Tensor]:
    inner = accelerator.unwrap_model(model, keep_torch_compile=False)
    state = get_model_state_dict(inner, options=StateDictOptions(full_state_dict=True))
    return {name: value.clone() for name, value in state.items()}


def run(accelerator: Accelerator, ready: Prepare, **options: Any) -> Run:
    model, descend = ready(accelerator, tiny(**options))
    sharded = isinstance(next(model.parameters()), DTensor)
    losses = steps(accelerator, model, descend, batches())
    state = whole_state(accelerator, model)
    inner = accelerator.unwrap_model(model, keep_torch_compile=False)
    patched = patch_state(inner) is not None
    return {"losses": losses, "parameters": state, "sharded": sharded, "unwrapped": patched}


def mixed(**options: Any) -> dict[str, Run]:
    """In bfloat16, from float32 parameters: with the patch, in both orders, and without."""
    orders = {"patched": patched_first, "prepared first": prepared_first, "unpatched": unpatched}
    return {
        name: run(accelerator(**BF16 | options), ready, dtype=torch.float32)
        for name, ready in orders.items()
    }


def resumed(name: str, **options: Any) -> Run:
    """Saved after a step, loaded into other weights and continued."""
    folder = Path(os.environ["CHECKPOINTS"], name)
    first = accelerator(**options)
    model, descend = patched_first(first, tiny())
    losses = steps(first, model, descend, batches()[:1])
    first.save_state(folder)
    first.wait_for_everyone()

    second = accelerator(**options)
    model = tiny()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model, descend = patched_first(second, model)
    second.load_state(folder)
    losses += steps(second, model, descend, batches()[1:])
    return {"losses": losses, "parameters": whole_state(second, model)}


def zero(stage: int, ready: Prepare) -> Run:
    """With DeepSpeed, in float32."""
    import deepspeed

    without_shared_memory(deepspeed)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        # However small a parameter, it is spread over the ranks.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    it = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model, descend = ready(it, tiny(dtype=torch.float32))
    losses = steps(it, model, descend, batches())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {"losses": losses, "parameters": parameters(model.module)}


def exported(**options: Any) -> dict[str, Any]:
    """What transformers reads of a patched model that was saved as the example saves it."""
    folder = Path(os.environ["CHECKPOINTS"], "exported")
    it = accelerator(**options)
    model, _ = patched_first(it, tiny())
    it.unwrap_model(model).save_pretrained(
        folder, is_main_process=it.is_main_process, state_dict=it.get_state_dict(model)
    )
    it.wait_for_everyone()
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {"class": type(model).__name__, "state": model.state_dict()}


def unwrapped() -> dict[str, Any]:
    """What `unwrap_model` gives of a patched model in mixed precision."""
    it = accelerator(**BF16)
    model = prepare(it, tiny(dtype=torch.float32), smoothing=0.1)
    bare = it.unwrap_model(model, keep_fp32_wrapper=False)
    output = bare(**batches()[0])
    return {"loss": output.loss.detach(), "logits": dict(output).get("logits")}


def refused() -> dict[str, Any]:
    """A prepared model that a patch cannot serve is left as it was."""
    it = accelerator(**BF16)
    model = tiny(dtype=torch.float32)
    own = type(model).forward
    model.forward = lambda *args, **kwargs: own(model, *args, **kwargs)
    model = it.prepare(model)
    forward = model.module.forward
    try:
        prepare(it, model, smoothing=0.1)
    except ValueError as error:
        return {"message": str(error), "same": model.module.forward is forward}
    raise RuntimeError("it was not refused")


def scenario(kind: str, ready: Prepare) -> Callable[[], Run]:
    return lambda: run(accelerator(**KINDS[kind]), ready)


EXACT = {kind: scenario(kind, patched_first) for kind in KINDS} | {
    f"{kind}, prepared first": scenario(kind, prepared_first) for kind in KINDS
}
RESUMED = {
    "DDP, resumed": lambda: resumed("ddp"),
    "FSDP2, resumed": lambda: resumed("fsdp", fsdp=True),
}
MIXED = {"DDP, bfloat16": mixed, "FSDP2, bfloat16": lambda: mixed(fsdp=True)}
DEEPSPEED = {
    "ZeRO-2": lambda: zero(2, patched_first),
    "ZeRO-2, prepared first": lambda: zero(2, prepared_first),
    "ZeRO-3": lambda: zero(3, patched_first),
    "ZeRO-3, prepared first": lambda: zero(3, prepared_first),
}
OTHERS = {
    "exported": lambda: exported(fsdp=True),
    "unwrapped": unwrapped,
    "refused": refused,
}
SCENARIOS = EXACT | RESUMED | MIXED | OTHERS | DEEPSPEED


def start() -> None:
    if "ACCELERATE_USE_DEEPSPEED" not in os.environ:
        Accelerator()  # starts the process group, which all of them share
