"""CalibrationCallback under Trainer's DDP, and what it is made of under FSDP2 and ZeRO-3."""

import tempfile

import torch
import torch.distributed as dist
from tests.distributed.launch import TIMEOUT
from tests.distributed.problem import without_shared_memory
from tests.integrations.test_calibration_callback import NAMES, data, evaluated, metrics, sure

from levelhead.heads.token_calibration import TokenCalibration, summary
from levelhead.integrations import patch_model


def ddp():
    """Seven rows in batches of two by two: the loader repeats one of them."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = evaluated(sure(), folder, eval_data=data()[:7], per_device_eval_batch_size=2)
        return metrics(trainer.evaluate()) | {"processes": trainer.args.world_size}


def ddp_with_labels_on_one_rank():
    rows = data()[:2]
    rows[1]["labels"][:] = -100
    with tempfile.TemporaryDirectory() as folder:
        trainer = evaluated(sure(), folder, eval_data=rows, per_device_eval_batch_size=1)
        return metrics(trainer.evaluate())


def own_rows():
    rows = data()[dist.get_rank() :: 2]
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


def merged(watch, model):
    model.eval()
    with torch.no_grad():
        model(**own_rows())
    sums = watch.sums
    dist.all_reduce(sums)
    return {name: summary(sums)[name] for name in NAMES}


def fsdp2():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = patch_model(sure(), eval_logits=False)
    watch = TokenCalibration(model, 10)  # before the model is sharded, as Trainer would have it
    mesh = init_device_mesh("cpu", (2,))
    for layer in (*model.model.layers, model.lm_head):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return merged(watch, model)


def zero3():
    import deepspeed

    without_shared_memory(deepspeed)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    model = patch_model(sure(), eval_logits=False)
    watch = TokenCalibration(model, 10)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    return merged(watch, engine)


SCENARIOS = {f.__name__: f for f in (ddp, ddp_with_labels_on_one_rank, fsdp2, zero3)}


def start():
    dist.init_process_group("gloo", timeout=TIMEOUT)
