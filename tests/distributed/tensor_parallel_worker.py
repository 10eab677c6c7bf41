"""Patched models under tensor parallelism, a scenario a function.

MODELS is a folder of models that the test has saved.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.distributed.launch import TIMEOUT
from tests.distributed.problem import Batch, Run, batches, optimizer, part, train, valid_tokens
from tests.integrations.tiny_models import tiny, transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from levelhead import patch_model, unpatch_model

# Four ranks share the attention heads and, in transformers 5.17, an even number of vocabulary rows.
SIZES = {
    "vocab_size": 68,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "gemma2": ("gemma2", SIZES),  # softcap, tied
    "phi": ("phi", SIZES),  # bias
    "cohere": ("cohere", SIZES),  # scale, tied
    "qwen3": ("qwen3", SIZES),  # tied
    "uneven": ("llama", SIZES | {"vocab_size": 67}),
}


def load(name: str, **options: Any) -> Any:
    config = transformers.distributed.DistributedConfig(**(options or {"tp_plan": "auto"}))
    path = Path(os.environ["MODELS"], name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, distributed_config=config, dtype=torch.float64
    )
    return model.train()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def steps(model: nn.Module, loss_of: Callable[[Batch], Tensor] | None = None) -> Run:
    """Three steps; every rank of the group sees the whole batch."""
    losses = train(optimizer(model), batches(), loss_of or (lambda batch: model(**batch).loss))
    return {"losses": losses, "parameters": trained(model)}


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(p.detach()).clone() for name, p in model.named_parameters()}


def loaded(name: str) -> Run:
    return steps(patch_model(load(name), smoothing=0.1))


def counted() -> Run:
    model = patch_model(load("llama"), smoothing=0.1)
    return steps(model, lambda b: model(**b, num_items_in_batch=valid_tokens(b)).loss)


def resumed() -> Run:
    """Saved after a step, loaded into other weights, and continued."""
    folder = Path(os.environ["MODELS"], f"resumed-{dist.get_world_size()}")
    model = patch_model(load("llama"), smoothing=0.1)
    descend = optimizer(model)
    losses = train(descend, batches()[:1], lambda batch: model(**batch).loss)
    states = get_state_dict(model, descend)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)

    again = patch_model(load("llama"), smoothing=0.1)
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    descend = optimizer(again)
    states = get_state_dict(again, descend)
    dcp.load({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
    set_state_dict(again, descend, model_state_dict=states[0], optim_state_dict=states[1])
    losses += train(descend, batches()[1:], lambda batch: again(**batch).loss)
    return {"losses": losses, "parameters": trained(again)}


def compiled() -> Run:
    model = patch_model(load("llama"), smoothing=0.1)
    torch._dynamo.reset()
    function = torch.compile(model, backend="aot_eager")
    return steps(model, lambda batch: function(**batch).loss)


def with_fsdp() -> Run:
    """Two groups of two ranks that share weights, each with half of the batch."""
    model = patch_model(load("llama", tp_size=2, fsdp_size=2), smoothing=0.1)
    group = dist.get_rank() // 2

    def loss_of(batch: Batch) -> Tensor:
        # FSDP takes the mean of the gradients over the groups.
        loss = model(**part(batch, group), num_items_in_batch=valid_tokens(batch)).loss
        return 2 * loss

    run = steps(model, loss_of)
    total = torch.stack(run["losses"])
    dist.all_reduce(total)
    return run | {"losses": list(total / dist.get_world_size())}


def of_torch(*, patch_first: bool = False, **layout: Any) -> Run:
    """The head alone, by torch's own tensor parallelism, which works through hooks."""
    model = tiny("phi", **SIZES)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if patch_first:
        patch_model(model, smoothing=0.1)
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(**layout)})
    return steps(model if patch_first else patch_model(model, smoothing=0.1))


def patched_and_not() -> dict[str, Any]:
    """What must be as it was: evaluation, generation, and all of it without the patch."""
    model, plain = load("gemma2"), load("gemma2")
    attributes = set(vars(model.lm_head))
    patch_model(model, smoothing=0.3)
    patch_model(model, smoothing=0.1)
    batch = batches()[0]
    kept = model(**batch, skip_logits=False)
    model.eval()
    plain.eval()
    with torch.no_grad():
        answers = [m(**batch) for m in (model, plain)]
        prompt = batch["input_ids"][:1, :4]
        generated = [m.generate(prompt, max_new_tokens=4, do_sample=False) for m in (model, plain)]
    unpatch_model(model).train()
    plain.train()
    unpatched = [m(**batch).loss.detach() for m in (model, plain)]
    return {
        "kept": {"logits": kept.logits.detach(), "loss": kept.loss.detach()},
        "logits": [answer.logits for answer in answers],
        "losses": [answer.loss for answer in answers],
        "generated": generated,
        "unpatched": unpatched,
        "attributes": attributes == set(vars(model.lm_head)),
    }


def saved() -> list[str]:
    """The names in a checkpoint of a patched model that was gathered."""
    model = patch_model(load("llama"), smoothing=0.1)
    folder = Path(os.environ["MODELS"], f"saved-{dist.get_world_size()}")
    model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    truth = tiny(*MODELS["llama"][:1], **SIZES).state_dict()
    return [name for name, value in again.state_dict().items() if not value.equal(truth[name])]


def other_batches() -> str:
    model = patch_model(load("llama"), smoothing=0.1)
    batch = batches()[0]
    batch["labels"] = batch["labels"].roll(dist.get_rank(), 0)
    try:
        model(**batch)
    except ValueError as error:
        return str(error)
    return ""


LAYOUTS: dict[str, dict[str, Any]] = {
    "gathered output": {"output_layouts": Replicate()},
    "output in parts": {"output_layouts": Shard(-1)},
    "output as DTensor": {"output_layouts": Shard(-1), "use_local_output": False},
    "patched before": {"output_layouts": Replicate(), "patch_first": True},
}
STEPS: dict[str, tuple[str, Callable[[], Run]]] = {  # the model, and what trains it
    **{name: (name, lambda name=name: loaded(name)) for name in MODELS},
    "num_items_in_batch": ("llama", counted),
    "compiled": ("llama", compiled),
    "resumed": ("llama", resumed),
    "with FSDP": ("llama", with_fsdp),
    **{name: ("phi", lambda layout=layout: of_torch(**layout)) for name, layout in LAYOUTS.items()},
}
SCENARIOS: dict[str, Callable[[], Any]] = {
    "patched and not": patched_and_not,
    "saved": saved,
    "other batches": other_batches,
    **{name: scenario for name, (_, scenario) in STEPS.items()},
}


def start() -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
