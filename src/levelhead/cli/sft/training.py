"""Fine-tuning on transformers' Trainer: what `levelhead sft` runs."""

import math
import os
import platform
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

import levelhead
from levelhead.integrations import set_objective
from levelhead.integrations.transformers import CalibrationCallback
from levelhead.objectives import Distillation
from levelhead.ops.chunked import chunk_tokens

from ..errors import CliError
from ..examples import Collator, Counts, Encoder, example_encoder, prepare
from ..models import load_model, load_tokenizer
from ..output import changed_settings, make_folder, write_json
from ..progress import progress_bar
from ..sources import open_source
from ..teacher.store import TeacherStore
from .calibration import Expectation, QuestionCollator, question_encoder
from .distillation import TaughtCollator, TaughtRows, check_teacher, check_vocabulary
from .options import Options
from .report import HOW, Change, LogitMemory, Run, TokenCalibration

_WHOLE = "whole"  # the file that marks a checkpoint whose writing came to its end
_SETTINGS = "settings.json"
_TOKENS = "tokens-"  # and the name of the machine: the folder for its prepared data


def fine_tune(options: Options) -> Run:
    """Fine-tune; write model, tokenizer, summary and checkpoints to `options.output`.

    Raises:
        CliError: An option or the data cannot be used, or the model is refused; nothing was trained.
    """
    options = options.completed()
    args = _training_arguments(options)  # before the model: DeepSpeed must see how it is loaded
    first = args.process_index == 0
    console = Console(quiet=not first)
    if not first:
        transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(options.seed)
    tokenizer = load_tokenizer(
        options.model, options.chat_template, trust_remote_code=options.trust_remote_code
    )
    with console.status("Reading the data"):
        tables, counts = _prepare(options, args, tokenizer)
    model = _model(options)
    padding = tokenizer.pad_token_id or 0
    train_dataset, collator, expectation = tables["data"], Collator(padding), None
    if options.teacher:
        teacher = TeacherStore(Path(options.teacher), check=False)
        check_vocabulary(teacher, model.get_output_embeddings().out_features)
        train_dataset = TaughtRows(tables["data"], teacher, raw=options.raw_teacher)
        collator = TaughtCollator(padding)
    if options.calibration_aware:
        expectation = Expectation(options, tables)
        expectation.set_objective(model)
        train_dataset = expectation.questions["data"]
        collator = QuestionCollator(padding, expectation.width)
    checkpoint = _last_whole_checkpoint(options.output)
    if first:
        write_json(options.output / _SETTINGS, _settings(options, args, counts))
        console.print(_introduction(options, counts, checkpoint), soft_wrap=True)
    trainer = _Trainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=tables.get("eval"),
        processing_class=tokenizer,
        callbacks=[
            *([expectation] if expectation else []),
            _MarkWhole(),
            *([CalibrationCallback()] if options.eval else []),
        ],
    )
    trainer.expectation = expectation
    trainer.remove_callback(PrinterCallback)
    with progress_bar(console) as progress:
        show = _Show(progress)
        trainer.add_callback(show)
        began = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        seconds = time.perf_counter() - began
    trainer.save_model()
    state = trainer.state
    run = Run(
        levelhead=levelhead.__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        platform=platform.platform(),
        device=args.device.type,
        processes=args.world_size,
        settings=_jsonable(options) | {"learning_rate": args.learning_rate},
        rows=counts,
        steps=state.global_step,
        epochs=state.epoch,
        loss=_first_and_last("loss", state),
        eval_loss=_first_and_last("eval_loss", state),
        calibration=_token_calibration(state),
        tokens=state.num_input_tokens_seen,
        seconds=seconds,
        tokens_per_second=(state.num_input_tokens_seen - show.tokens_before) / seconds,
        logits=_logit_memory(trainer),
        regimes=expectation.regimes(trainer) if expectation else {},
    )
    if first:
        write_json(options.output / "summary.json", asdict(run))
    return run


def _introduction(options: Options, counts: dict[str, Counts], checkpoint: Path | None) -> str:
    """Return the data as the model will see it, and where training starts."""
    lines = []
    for name, label, source in (
        ("data", "Training", options.data),
        ("eval", "Evaluation", options.eval),
    ):
        if source is None or name not in counts:
            continue
        count = counts[name]
        lines.append(
            f"{label}: {count.rows:,} rows of {escape(source)}, {count.tokens:,} tokens, "
            f"{count.supervised:,} of them with a loss; the longest row has {count.longest:,}."
        )
        length = f"{options.max_length:,} tokens (--max-length)"
        if count.cut:
            lines.append(f"  {count.cut:,} rows were cut to {length}.")
        if count.left_out:
            lines.append(
                f"  {count.left_out:,} more rows were left out: no token of their completion lies "
                f"within {length}."
            )
    if checkpoint is not None:
        lines.append(f"Going on from {escape(str(checkpoint))}.")
    elif options.resume:
        lines.append("There is no whole checkpoint yet: starting from the beginning.")
    return "\n".join(lines) + "\n"


def _first_and_last(key: str, state: TrainerState) -> Change | None:
    """Return the first and the last finite value; JSON has no NaN."""
    losses = [entry[key] for entry in state.log_history if math.isfinite(entry.get(key, math.nan))]
    return Change(losses[0], losses[-1]) if losses else None


def _token_calibration(state: TrainerState) -> TokenCalibration | None:
    """Return what the last evaluation found."""
    found = [entry for entry in state.log_history if "eval_ece" in entry]
    if not found:
        return None
    accuracy, ece = found[-1]["eval_token_accuracy"], found[-1]["eval_ece"]
    return TokenCalibration(accuracy, found[-1]["eval_mean_confidence"], ece, accuracy - ece)


def _logit_memory(trainer: "_Trainer") -> LogitMemory:
    head, positions = trainer.model.get_output_embeddings(), trainer.positions
    at_once = chunk_tokens(positions, head.weight, torch.float32)
    return LogitMemory(
        positions=positions,
        vocabulary=head.out_features,
        dense_bytes=positions * head.out_features * (2 + 4 + 4 if trainer.args.bf16 else 4 + 4),
        levelhead_bytes=4 * at_once * head.out_features,
        how=HOW,
    )


def _training_arguments(options: Options) -> TrainingArguments:
    renamed = hasattr(TrainingArguments, "activation_checkpointing")
    checkpointing = "activation_checkpointing" if renamed else "gradient_checkpointing"
    try:
        args = TrainingArguments(
            output_dir=str(options.output),
            num_train_epochs=options.epochs,
            max_steps=options.max_steps or -1,
            learning_rate=options.learning_rate or (2e-5 if options.lora is None else 2e-4),
            lr_scheduler_type="linear",
            warmup_steps=0.03,  # of all steps
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            gradient_accumulation_steps=options.gradient_accumulation,
            bf16=options.bf16,
            # Else it would look for a GPU with bfloat16; DeepSpeed finds its device by itself.
            use_cpu=not (torch.accelerator.is_available() or options.deepspeed),
            torch_compile=options.compile,
            deepspeed=options.deepspeed,
            eval_strategy="epoch" if options.eval else "no",
            eval_on_start=bool(options.eval),
            prediction_loss_only=True,
            remove_unused_columns=False,  # those of objectives, which no signature names
            save_strategy="steps",
            save_steps=options.save_steps,
            save_total_limit=2,
            logging_first_step=True,
            logging_steps=0.02,  # of all steps
            include_num_input_tokens_seen="non_padding",
            dataloader_pin_memory=torch.accelerator.is_available(),
            disable_tqdm=True,
            report_to="none",
            seed=options.seed,
            **{
                checkpointing: options.gradient_checkpointing,
                # The reentrant kind wants inputs with a gradient, which they do not have under LoRA.
                f"{checkpointing}_kwargs": {"use_reentrant": False},
            },
        )
        devices, processes = args.n_gpu, args.world_size
    except (ImportError, OSError, ValueError) as error:
        raise CliError(str(error)) from error
    _check_launch(devices, processes)
    _check_zero(args.deepspeed_plugin)
    return args


def _check_launch(devices: int, processes: int) -> None:
    """Refuse a launch that would train something else than was meant."""
    if devices > 1:
        raise CliError(
            f"{devices} accelerators are visible to one process; start one process for each, with "
            "`accelerate launch -m levelhead sft ...`, or hide all but one, for example with "
            "CUDA_VISIBLE_DEVICES=0"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != launched:
        raise CliError(
            f"{launched} processes were launched, but accelerate makes a group of {processes}; on a "
            "CPU it does so with --deepspeed, which needs an accelerator or a single process there"
        )


def _check_zero(plugin: Any) -> None:
    """Refuse a DeepSpeed configuration under which Trainer would not save the model as such."""
    gather = "stage3_gather_16bit_weights_on_model_save"
    zero = None if plugin is None else plugin.hf_ds_config
    if zero is not None and zero.is_zero3() and not zero.get_value(f"zero_optimization.{gather}"):
        raise CliError(
            "under ZeRO-3 the model can only be saved as safetensors with "
            f'"{gather}": true in "zero_optimization" of the DeepSpeed configuration'
        )


def _prepare(
    options: Options, args: TrainingArguments, tokenizer: Any
) -> tuple[dict[str, Dataset], dict[str, Counts]]:
    """Return the tables "data" and, if asked for, "eval"; and their counts, to one process a node."""
    output = options.output
    folder = output / f"{_TOKENS}{platform.node()}"
    sources = {"data": (options.data, options.dataset_split)}
    if options.eval:
        sources["eval"] = (options.eval, options.eval_split)
    counts: dict[str, Counts] = {}
    tables: dict[str, Dataset] = {}
    try:
        with args.main_process_first(desc="preparing the data"):
            if args.process_index == 0:
                _check_output(output, resume=options.resume)
            if args.local_process_index == 0:
                for name, (data, split) in sources.items():
                    counts[name] = prepare(
                        open_source(data, options.dataset_config, split),
                        _encoder(options, tokenizer, name),
                        max_length=options.max_length,
                        path=folder / name,
                    )
                if options.teacher:
                    check_teacher(Path(options.teacher), options, tokenizer, counts["data"])
            if args.process_index == 0:
                _check_settings(output, _settings(options, args, counts))
        if not all((folder / name).exists() for name in sources):
            raise CliError("the first process could not prepare the data")  # and has printed why
        tables = {name: Dataset.from_file(str(folder / name)) for name in sources}
        args.distributed_state.wait_for_everyone()
    finally:
        if args.local_process_index == 0:
            # What is mapped into memory outlives its file, where the system can do that at all.
            shutil.rmtree(folder, ignore_errors=True)
        if args.process_index == 0 and not tables:
            with suppress(OSError):
                output.rmdir()  # if nothing else is in it
    return tables, counts


def _encoder(options: Options, tokenizer: Any, name: str) -> Encoder:
    """Return the encoder of the rows of "data" or of "eval"."""
    if not options.calibration_aware:
        return example_encoder(tokenizer)
    letters_alone = name == "eval" or options.calibration_aware == "cft"
    return question_encoder(tokenizer, completion_only=letters_alone)


def _check_output(output: Path, *, resume: bool) -> None:
    """Make the output folder; refuse one with anything in it but a run that is to be resumed."""
    make_folder(output)
    holds_run = (output / _SETTINGS).exists()
    if holds_run and not resume:
        raise CliError(
            f"{output} holds a run already; go on with it by --resume, or name another folder with "
            "--output"
        )
    if not holds_run and any(not path.name.startswith(_TOKENS) for path in output.iterdir()):
        raise CliError(
            f"{output} holds files that are not of a run; name an empty folder with --output"
        )


def _jsonable(options: Options) -> dict[str, object]:
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
    }


def _settings(
    options: Options, args: TrainingArguments, counts: dict[str, Counts]
) -> dict[str, object]:
    """Return what the course of a run depends on; `output` and `resume` may change."""
    settings = _jsonable(options) | {
        "processes": args.world_size,
        "tokens": {name: count.digest for name, count in counts.items()},
    }
    del settings["output"], settings["resume"]
    return settings


def _check_settings(output: Path, settings: dict[str, object]) -> None:
    """Refuse to resume a run that began with other settings; until a checkpoint, any will do."""
    if _last_whole_checkpoint(output) is None:
        return
    changed = changed_settings(output / _SETTINGS, settings)
    if changed:
        raise CliError(
            "cannot resume, because a run with other settings would not be the same run; changed "
            + changed
        )


def _last_whole_checkpoint(folder: Path) -> Path | None:
    whole = (mark.parent for mark in folder.glob(f"checkpoint-*/{_WHOLE}"))
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _model(options: Options) -> Any:
    narrow = options.bf16 and options.lora is not None
    model = load_model(
        options.model,
        torch.bfloat16 if narrow else torch.float32,
        trust_remote_code=options.trust_remote_code,
    )
    try:
        levelhead.patch_model(
            model,
            smoothing=options.smoothing or 0.0,  # completed: not None
            temperature=options.temperature,
            softcap=options.softcap,
            eval_logits=False,
        )
        if options.distillation:
            set_objective(model, Distillation(options.distillation))
        if options.lora is None:
            return model
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=options.lora,
            lora_alpha=2 * options.lora,
            target_modules="all-linear",  # which leaves out the head
        )
        return get_peft_model(model, config)
    except ValueError as error:
        raise CliError(str(error)) from error


class _Trainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Trainer that remembers the largest batch it trained on, and runs E-steps."""

    positions = 0
    expectation: Expectation | None = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *rest: Any, **named: Any
    ) -> Tensor:
        """Run a forward and a backward pass."""
        self.positions = max(self.positions, inputs["input_ids"].numel())
        if self.expectation is not None:
            inputs = self.expectation.inputs(self, model, inputs)
        loss: Tensor = super().training_step(model, inputs, *rest, **named)
        return loss


class _MarkWhole(TrainerCallback):  # type: ignore[misc]
    """Marks each checkpoint after every process has written its part of it."""

    def on_save(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        args.distributed_state.wait_for_everyone()
        if args.should_save:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()


class _Show(TrainerCallback):  # type: ignore[misc]
    """Shows the steps and prints the losses; remembers how many tokens had been seen before."""

    tokens_before = 0

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_train_begin(self, _args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self.tokens_before = state.num_input_tokens_seen
        self._bar = self._progress.add_task(
            "training", total=state.max_steps, completed=state.global_step
        )

    def on_step_end(self, _args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self._progress.update(self._bar, completed=state.global_step)

    def on_log(
        self, _args: Any, state: TrainerState, _control: Any, logs: dict[str, float], **_: Any
    ) -> None:
        named = {
            "loss": "loss",
            "eval_loss": "evaluation loss",
            "eval_ece": "calibration error",
            "learning_rate": "learning rate",
        }
        shown = [f"{label} {logs[key]:.4g}" for key, label in named.items() if key in logs]
        if shown:
            self._progress.console.print(f"step {state.global_step:>6}  " + "  ".join(shown))
