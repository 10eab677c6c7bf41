"""CalibrationCallback under Trainer's DDP, and what it and RCFT's E-step are made of under FSDP2 and ZeRO-3."""

import tempfile

import torch
import torch.distributed as dist
from tests.distributed.launch import TIMEOUT
from tests.distributed.problem import without_shared_memory
from tests.integrations.test_calibration_callback import NAMES, data, evaluated, metrics, sure

from levelhead.heads.token_calibration import TokenCalibration, summary
from levelhead.integrations import patch_model
from levelhead.objectives.rcft import choice_logits


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


def rows_of(rank, ranks):
    rows = data()[rank::ranks]
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


def questions_of(rank, ranks):
    """Each row is a question, asked at one of its tokens, with three ids to choose from."""
    ids = rows_of(rank, ranks)["input_ids"]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "choices": torch.tensor([[3, 5, 7]]).repeat(len(ids), 1),
        "answer_position": torch.arange(len(ids)) % ids.shape[1],
        "question": torch.arange(len(data()))[rank::ranks],
    }


def merged(watch, model):
    model.eval()
    rank = dist.get_rank()
    with torch.no_grad():
        model(**rows_of(rank, 2))
    sums = watch.sums
    dist.all_reduce(sums)
    choices = choice_logits(model, [questions_of(rank, 2)], questions=len(data()))
    return {"metrics": {name: summary(sums)[name] for name in NAMES}, "choices": choices}


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
