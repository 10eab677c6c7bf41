"""A patched model under DeepSpeed, by itself and through Trainer, a scenario a function."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig
from deepspeed.utils import safe_get_full_fp32_param
from tests.distributed import problem
from tests.distributed.launch import ROOT, TIMEOUT
from tests.distributed.problem import (
    RANKS,
    ROWS,
    Batch,
    Run,
    batches,
    dense_loss,
    next_tokens,
    part,
    tiny,
    valid_tokens,
    without_shared_memory,
)
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig

from levelhead import patch_model, unpatch_model

TIED = {"tie_word_embeddings": True}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def config_of(stage: int, micro_steps: int = 1, **options: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": ROWS // micro_steps,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": 0.0,  # DeepSpeed clips at norm 1 unless told otherwise
        "zero_allow_untested_optimizer": True,  # as it calls SGD
        "zero_optimization": {
            "stage": stage,
            # ZeRO-3 shards no parameter of fewer entries, and here are no larger ones.
            "stage3_param_persistence_threshold": 0,
        },
    } | options


def engine_of(model: Any, config: dict[str, Any]) -> Any:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    descend = torch.optim.SGD(trainable, lr=0.3, momentum=0.9)
    return deepspeed.initialize(model=model, optimizer=descend, config=config)[0]


def unpatched(model: Any) -> Any:
    """`model` with the same loss from all its logits, in float32 as transformers takes it."""

    def loss_function(
        logits: Tensor, labels: Tensor, *_args: Any, num_items_in_batch: Tensor, **_kwargs: Any
    ) -> Tensor:
        logits, target = logits.float().flatten(0, 1), next_tokens(labels).flatten()
        total = F.cross_entropy(logits, target, label_smoothing=0.1, reduction="sum")
        return total / num_items_in_batch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
    inner.loss_function = loss_function
    return model


def train(engine: Any, whole: list[Batch]) -> list[Tensor]:
    """A step for every batch of `whole`. Returns this rank's share of each loss."""
    micro_steps = engine.gradient_accumulation_steps()
    losses = []
    for batch in whole:
        rows = part(batch, dist.get_rank())
        share = torch.zeros(())
        for micro_step in range(micro_steps):
            rows_now = part(rows, micro_step, micro_steps)
            loss = engine(**rows_now, num_items_in_batch=valid_tokens(batch)).loss
            # As Trainer does: the number of items is that of all ranks and micro steps together,
            # so nothing remains to be divided, and the mean that DeepSpeed takes is undone.
            engine.backward(RANKS * loss, scale_wrt_gas=False)
            engine.step()
            share += loss.detach()
        losses.append(share)
    return losses


def summary(model: Any, losses: list[Tensor]) -> Run:
    """The losses of the whole batches, and the trained parameters as the optimizer has them."""
    total = torch.stack(losses)
    dist.all_reduce(total)
    return {"losses": list(total), "parameters": trained(model)}


def trained(model: Any) -> dict[str, Tensor]:
    values = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = safe_get_full_fp32_param(parameter)  # None: ZeRO-0 has no other than this one
            values[name] = (parameter if value is None else value).detach().clone()
    return values


def run(engine: Any) -> Run:
    return summary(engine.module, train(engine, batches()))


def one_process(build: Callable[..., Any] = tiny, **options: Any) -> Run:
    """As in `problem`, for models that other functions than `tiny` build."""
    model = build(**options)
    start = trained(model)
    losses = problem.train(
        problem.optimizer(model), batches(), lambda batch: dense_loss(model, **batch)
    )
    return {"losses": losses, "parameters": trained(model), "start": start}


def both(
    config: dict[str, Any], build: Callable[..., Any] = tiny, **options: Any
) -> dict[str, Run]:
    """The run of a patched engine, of an unpatched one, and of one process in float64."""
    dtype = next((DTYPES[name] for name in DTYPES if name in config), torch.float32)
    return {
        "patched": run(engine_of(patch_model(build(dtype=dtype, **options), 0.1), config)),
        "unpatched": run(engine_of(unpatched(build(dtype=dtype, **options)), config)),
        "one process": one_process(build, **options),
    }


def lora(dtype: torch.dtype = torch.float64) -> Any:
    """Adapters in the body, on frozen weights and before a frozen head."""
    import peft

    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    return peft.get_peft_model(tiny(), adapters).to(dtype)


def checkpointing(dtype: torch.dtype = torch.float64) -> Any:
    model = tiny(dtype=dtype)
    model.gradient_checkpointing_enable()
    return model


def from_pretrained() -> Any:
    """The model with its weights sharded as they are read, so that the head's is empty here."""
    folder = Path(os.environ["CHECKPOINTS"], "pretrained")
    if dist.get_rank() == 0:
        tiny(dtype=torch.float32).save_pretrained(folder)
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    if model.lm_head.weight.numel() != 0:
        raise RuntimeError("the model was not built in zero.Init")
    return model


def zero_init() -> dict[str, Run]:
    config = config_of(3)
    alive = HfDeepSpeedConfig(config)  # transformers keeps a weak reference to it
    runs = {
        "patched": run(engine_of(patch_model(from_pretrained(), 0.1), config)),
        "unpatched": run(engine_of(unpatched(from_pretrained()), config)),
    }
    del alive
    return runs | {"one process": one_process()}


def patched_after(stage: int) -> dict[str, Run]:
    config = config_of(stage)
    engine = engine_of(tiny(dtype=torch.float32), config)
    patch_model(engine, 0.1)
    return {
        "patched": run(engine),
        "unpatched": run(engine_of(unpatched(tiny(dtype=torch.float32)), config)),
        "one process": one_process(),
    }


def compiled(stage: int) -> dict[str, Any]:
    engine = engine_of(patch_model(tiny(dtype=torch.float32), 0.1), config_of(stage))
    engine.compile()
    return {
        "patched": run(engine),
        "unpatched": run(engine_of(unpatched(tiny(dtype=torch.float32)), config_of(stage))),
        "one process": one_process(),
        "compiled frames": torch._dynamo.utils.counters["frames"]["ok"],
    }


def resumed(stage: int) -> dict[str, Run]:
    """Saved after the first step and continued; and continued from there by another engine."""
    folder, tag = os.environ["CHECKPOINTS"], f"ZeRO-{stage}"
    engine = engine_of(patch_model(tiny(dtype=torch.float32), 0.1), config_of(stage))
    first = train(engine, batches()[:1])
    engine.save_checkpoint(folder, tag=tag)
    continuation = summary(engine.module, first + train(engine, batches()[1:]))

    model = tiny(dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    engine = engine_of(patch_model(model, 0.1), config_of(stage))
    engine.load_checkpoint(folder, tag=tag)
    again = summary(engine.module, first + train(engine, batches()[1:]))
    return {"continued": continuation, "resumed": again}


def evaluation() -> dict[str, Any]:
    """What a patched ZeRO-3 engine gives in evaluation, and after `unpatch_model`."""
    engine = engine_of(patch_model(tiny(dtype=torch.float32), 0.1), config_of(3))
    batch = batches()[0]
    with torch.no_grad():
        engine.eval()
        patched = engine(**batch)
        unpatch_model(engine)
        engine.train()
        without = engine(**batch)
        want = tiny()(**batch)
    outputs = {"patched": patched, "after unpatch_model": without, "one process": want}
    return {name: {"loss": o.loss, "logits": o.logits} for name, o in outputs.items()}


def tensor_parallel() -> dict[str, str]:
    """What a model whose head DeepSpeed's tensor parallelism has split says, patched or not."""
    config = config_of(0, tensor_parallel={"autotp_size": RANKS})
    config["train_micro_batch_size_per_gpu"] = RANKS * ROWS

    def split(model: Any) -> Any:
        return engine_of(deepspeed.tp_model_init(model, RANKS, torch.float32), config)

    def message(function: Callable[[], Any]) -> str:
        try:
            function()
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    after = split(tiny(dtype=torch.float32))
    before = split(patch_model(tiny(dtype=torch.float32), 0.1))
    return {
        "patched after": message(lambda: patch_model(after, 0.1)),
        "patched before": message(lambda: before(**batches()[0])),
    }


class OrderedTrainer(Trainer):
    def _get_train_sampler(self, *_args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def arguments_of(folder: str, rows: int, **options: Any) -> TrainingArguments:
    """Those of problem.optimizer, with the config of the examples made comparable."""
    config = json.loads(Path(ROOT, "examples/deepspeed/zero3.json").read_text())
    del config["bf16"]
    config |= {"train_micro_batch_size_per_gpu": rows, "gradient_clipping": 0.0}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return TrainingArguments(
        output_dir=folder,
        deepspeed=config,
        per_device_train_batch_size=rows,
        max_steps=problem.STEPS,
        learning_rate=0.3,
        optim="sgd",
        optim_args="momentum=0.9",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_steps=2,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )


def trained_by(trainer: Trainer, checkpoint: str | None = None) -> Run:
    trainer.train(resume_from_checkpoint=checkpoint)
    losses = [torch.tensor(log["loss"]) for log in trainer.state.log_history if "loss" in log]
    return {"losses": losses, "parameters": trained(trainer.model)}


def rows_of(whole: list[Batch]) -> list[Batch]:
    return [
        {name: value[row] for name, value in batch.items()}
        for batch in whole
        for row in range(RANKS * ROWS)
    ]


def trainer() -> dict[str, Run]:
    """Trainer with DeepSpeed's config, from weights it shards as they are read, and resumed."""
    folder = os.environ["CHECKPOINTS"] + "/trainer"

    def new() -> Trainer:
        arguments = arguments_of(folder, ROWS)
        model = patch_model(from_pretrained(), 0.1)
        return OrderedTrainer(model=model, args=arguments, train_dataset=rows_of(batches()))

    return {
        "patched": trained_by(new()),
        "resumed": trained_by(new(), f"{folder}/checkpoint-2"),
        "one process": one_process(),
    }


def sequence_batches() -> list[Batch]:
    """Batches whose rows can be halved: the second leaves rank 0 no label, the third rank 1."""
    whole = []
    for step, batch in enumerate(batches()):
        # One token more, for an even length, and the positions that Ulysses asks for.
        input_ids = F.pad(batch["input_ids"], (0, 1))
        labels = F.pad(input_ids[:, :-1].clone(), (0, 1), value=-100)
        half = input_ids.shape[1] // 2
        if step == 1:
            labels[:, : half + 1] = -100  # the label of position p is the token p + 1
        if step == 2:
            labels[:, half + 1 :] = -100
        position_ids = torch.arange(2 * half).expand_as(input_ids)
        whole.append({"input_ids": input_ids, "labels": labels, "position_ids": position_ids})
    return whole


def ulysses() -> dict[str, Run]:
    """Trainer with sequence parallelism: each rank has a half of every row."""
    whole = sequence_batches()
    model = tiny()  # trained before DeepSpeed replaces the attention of every model
    losses = problem.train(
        problem.optimizer(model),
        whole,
        lambda batch: dense_loss(model, batch["input_ids"], batch["labels"]),
    )
    want = {"losses": losses, "parameters": trained(model)}

    handler = DeepSpeedSequenceParallelConfig(
        sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
    )
    parallelism = ParallelismConfig(sp_backend="deepspeed", sp_size=RANKS, sp_handler=handler)
    arguments = arguments_of(
        os.environ["CHECKPOINTS"] + "/ulysses", RANKS * ROWS, parallelism_config=parallelism
    )
    model = patch_model(tiny(dtype=torch.float32), 0.1)
    # The ranks' batches are taken in turn, by all ranks together: there must be an even number.
    data = rows_of([*whole, whole[0]])
    got = trained_by(OrderedTrainer(model=model, args=arguments, train_dataset=data))
    return {"patched": got, "one process": want}


STAGES = range(4)
SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "zero.Init": zero_init,
    "evaluation": evaluation,
    "tensor parallel": tensor_parallel,
    "Trainer": trainer,
    "Ulysses": ulysses,
    "gradient checkpointing, ZeRO-3": lambda: both(config_of(3), checkpointing),
    "softcap, ZeRO-3": lambda: both(config_of(3), family="gemma2"),
    "autocast, ZeRO-3": lambda: both(
        config_of(3, torch_autocast={"enabled": True, "dtype": "bfloat16"})
    ),
    # A fixed scale: of the dynamic one DeepSpeed skips the first steps, and tests so few.
    "fp16, ZeRO-3": lambda: both(config_of(3, fp16={"enabled": True, "loss_scale": 256})),
    "compiled, ZeRO-3": lambda: compiled(3),
}
for n in STAGES:
    SCENARIOS |= {
        f"ZeRO-{n}": lambda n=n: both(config_of(n)),
        f"tied, ZeRO-{n}": lambda n=n: both(config_of(n), **TIED),
        f"accumulation, ZeRO-{n}": lambda n=n: both(config_of(n, ROWS)),
        f"LoRA, ZeRO-{n}": lambda n=n: both(config_of(n), lora),
        f"bf16, ZeRO-{n}": lambda n=n: both(config_of(n, bf16={"enabled": True})),
        f"patched after initialize, ZeRO-{n}": lambda n=n: patched_after(n),
        f"resumed, ZeRO-{n}": lambda n=n: resumed(n),
    }


def start() -> None:
    without_shared_memory(deepspeed)
    deepspeed.init_distributed(dist_backend="gloo", timeout=TIMEOUT)
