"""`levelhead sft` from end to end, on transformers' Trainer."""

import argparse
import os
import platform
import shutil
import time
from collections.abc import Callable
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
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from levelhead import patch_model
from levelhead.integrations import set_objective
from levelhead.integrations.transformers import CalibrationCallback
from levelhead.objectives import Distillation

from ..errors import CliError
from ..models import load_model, load_tokenizer
from ..output import changed_settings, make_folder, write_json
from ..progress import progress_bar
from ..sources import open_source
from ..teacher.store import TeacherStore
from .calibration import Expectation, complete
from .distillation import TaughtCollator, TaughtRows, check_teacher, check_vocabulary
from .preparation import EXAMPLES, Counts, prepare
from .questions import QUESTIONS, QuestionCollator, question_encoder
from .report import calibration, introduction, notes, summarise, table
from .tokens import Collator, encode

_WHOLE = "whole"  # the file that marks a checkpoint whose writing came to its end
_SETTINGS = "settings.json"
_TOKENS = "tokens-"  # and the name of the machine: the folder for its prepared data
_FREE = {"verb", "run", "output", "resume", "local_rank"}  # may change when a run is resumed


def fine_tune(arguments: argparse.Namespace) -> None:
    """Fine-tunes as the command line says; writes model, tokenizer, summary and checkpoints.

    Raises:
        CliError: An argument or the data cannot be used, or the model is refused; nothing was
            trained.
    """
    _complete(arguments)
    options = _options(arguments)  # before the model: DeepSpeed must see how it is loaded
    first = options.process_index == 0
    console = Console(quiet=not first)
    if not first:
        transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(arguments.seed)
    tokenizer = load_tokenizer(
        arguments.model, arguments.chat_template, trust_remote_code=arguments.trust_remote_code
    )
    with console.status("Reading the data"):
        tables, counts = _prepare(arguments, options, tokenizer)
    model = _model(arguments)
    collator = Collator(tokenizer.pad_token_id or 0)
    if arguments.teacher:
        teacher = TeacherStore(Path(arguments.teacher), check=False)
        check_vocabulary(teacher, model.get_output_embeddings().out_features)
        tables["data"] = TaughtRows(tables["data"], teacher, raw=arguments.raw_teacher)
        collator = TaughtCollator(tokenizer.pad_token_id or 0)
    expectation = None
    if arguments.calibration_aware:
        expectation = Expectation(arguments, tables)
        expectation.set_objective(model)
        tables["data"] = expectation.questions["data"]
        collator = QuestionCollator(tokenizer.pad_token_id or 0, expectation.width)
    checkpoint = _last_whole_checkpoint(arguments.output)
    if first:
        write_json(arguments.output / _SETTINGS, _settings(arguments, options, counts))
        console.print(introduction(arguments, counts, checkpoint), soft_wrap=True)
    trainer = _Trainer(
        model=model,
        args=options,
        data_collator=collator,
        train_dataset=tables["data"],
        eval_dataset=tables.get("eval"),
        processing_class=tokenizer,
        callbacks=[
            *([expectation] if expectation else []),
            _MarkWhole(),
            *([CalibrationCallback()] if arguments.eval else []),
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
    regimes = expectation.regimes(trainer) if expectation else {}
    if first:
        tokens = trainer.state.num_input_tokens_seen - show.tokens_before
        summary = summarise(arguments, trainer, counts, trainer.positions, tokens, seconds)
        summary |= {"regimes": {name: asdict(regime) for name, regime in regimes.items()}}
        write_json(arguments.output / "summary.json", summary)
        console.print(table(summary), notes(summary), sep="\n")
        if regimes:
            console.print(calibration(regimes), soft_wrap=True)
        console.print(f"Model: [bold]{escape(str(arguments.output))}[/]", soft_wrap=True)


def _complete(arguments: argparse.Namespace) -> None:
    """Refuses options that do not go together; sets those whose default depends on others."""
    complete(arguments)
    if arguments.teacher is None:
        if arguments.distillation or arguments.raw_teacher:
            raise CliError("--distillation and --raw-teacher need --teacher STORE")
        if arguments.smoothing is None:
            arguments.smoothing = 0.1
    else:
        if arguments.smoothing is not None:
            raise CliError(
                "--smoothing smooths the tokens of the data, which --teacher replaces by what the "
                "teacher finds likely; leave one of them out (`levelhead teacher --recalibrate "
                "smoothing` smooths the teacher)"
            )
        arguments.smoothing = 0.0
        arguments.distillation = arguments.distillation or "renormalised"


def _options(arguments: argparse.Namespace) -> TrainingArguments:
    default_rate = 2e-5 if arguments.lora is None else 2e-4
    try:
        options = TrainingArguments(
            output_dir=str(arguments.output),
            num_train_epochs=arguments.epochs,
            max_steps=arguments.max_steps or -1,
            learning_rate=arguments.learning_rate or default_rate,
            lr_scheduler_type="linear",
            warmup_steps=0.03,  # of all steps
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            gradient_accumulation_steps=arguments.gradient_accumulation,
            bf16=arguments.bf16,
            # Else it would look for a GPU with bfloat16; DeepSpeed finds its device by itself.
            use_cpu=not (torch.accelerator.is_available() or arguments.deepspeed),
            torch_compile=arguments.compile,
            deepspeed=arguments.deepspeed,
            eval_strategy="epoch" if arguments.eval else "no",
            eval_on_start=bool(arguments.eval),
            prediction_loss_only=True,
            remove_unused_columns=False,  # those of objectives, which no signature names
            save_strategy="steps",
            save_steps=arguments.save_steps,
            save_total_limit=2,
            logging_first_step=True,
            logging_steps=0.02,  # of all steps
            include_num_input_tokens_seen="non_padding",
            dataloader_pin_memory=torch.accelerator.is_available(),
            disable_tqdm=True,
            report_to="none",
            seed=arguments.seed,
            **_checkpointing(arguments.gradient_checkpointing),
        )
        devices, processes = options.n_gpu, options.world_size
    except (ImportError, OSError, ValueError) as error:
        raise CliError(str(error)) from error
    _check_launch(devices, processes)
    _check_zero(options.deepspeed_plugin)
    return options


def _check_launch(devices: int, processes: int) -> None:
    """Refuses what would train something else than was meant."""
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
    """Refuses a DeepSpeed configuration under which Trainer would not save the model as such."""
    gather = "stage3_gather_16bit_weights_on_model_save"
    zero = None if plugin is None else plugin.hf_ds_config
    if zero is not None and zero.is_zero3() and not zero.get_value(f"zero_optimization.{gather}"):
        raise CliError(
            "under ZeRO-3 the model can only be saved as safetensors with "
            f'"{gather}": true in "zero_optimization" of the DeepSpeed configuration'
        )


def _checkpointing(on: bool) -> dict[str, Any]:
    """The options of TrainingArguments, which has renamed them."""
    renamed = hasattr(TrainingArguments, "activation_checkpointing")
    name = "activation_checkpointing" if renamed else "gradient_checkpointing"
    # The reentrant kind wants inputs with a gradient, which they do not have under LoRA.
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if on else {}


def _prepare(
    arguments: argparse.Namespace, options: TrainingArguments, tokenizer: Any
) -> tuple[dict[str, Any], dict[str, Counts]]:
    """The tables "data" and, if asked for, "eval"; what is in them is known to one process a node."""
    folder = arguments.output / f"{_TOKENS}{platform.node()}"
    sources = {"data": (arguments.data, arguments.dataset_split)}
    if arguments.eval:
        sources["eval"] = (arguments.eval, arguments.eval_split)
    counts: dict[str, Counts] = {}
    tables: dict[str, Any] = {}
    try:
        with options.main_process_first(desc="preparing the data"):
            if options.process_index == 0:
                _check_output(arguments)
            if options.local_process_index == 0:
                for name, (data, split) in sources.items():
                    counts[name] = prepare(
                        open_source(data, arguments.dataset_config, split),
                        _encoder(arguments, tokenizer, name),
                        max_length=arguments.max_length,
                        path=folder / name,
                        kind=QUESTIONS if arguments.calibration_aware else EXAMPLES,
                    )
                if arguments.teacher:
                    check_teacher(arguments, tokenizer, counts["data"])
            if options.process_index == 0:
                _check_settings(arguments.output, _settings(arguments, options, counts))
        if not all((folder / name).exists() for name in sources):
            raise CliError("the first process could not prepare the data")  # and has said why
        tables = {name: Dataset.from_file(str(folder / name)) for name in sources}
        options.distributed_state.wait_for_everyone()
    finally:
        if options.local_process_index == 0:
            # What is mapped into memory outlives its file, where the system can do that at all.
            shutil.rmtree(folder, ignore_errors=True)
        if options.process_index == 0 and not tables:
            with suppress(OSError):
                arguments.output.rmdir()  # if nothing else is in it
    return tables, counts


def _encoder(arguments: argparse.Namespace, tokenizer: Any, name: str) -> Callable[[Any], Any]:
    """What makes tokens of the rows of "data" or of "eval"."""
    if not arguments.calibration_aware:
        return lambda example: encode(example, tokenizer)
    letters_alone = name == "eval" or arguments.calibration_aware == "cft"
    return question_encoder(tokenizer, completion_only=letters_alone)


def _check_output(arguments: argparse.Namespace) -> None:
    """Makes the output folder; refuses one with anything in it but a run that is to be resumed."""
    output: Path = arguments.output
    make_folder(output)
    holds_run = (output / _SETTINGS).exists()
    if holds_run and not arguments.resume:
        raise CliError(
            f"{output} holds a run already; go on with it by --resume, or name another folder with "
            "--output"
        )
    if not holds_run and any(not path.name.startswith(_TOKENS) for path in output.iterdir()):
        raise CliError(
            f"{output} holds files that are not of a run; name an empty folder with --output"
        )


def _settings(
    arguments: argparse.Namespace, options: TrainingArguments, counts: dict[str, Counts]
) -> dict[str, Any]:
    """What the course of a run depends on."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in _FREE
    }
    tokens = {name: count.digest for name, count in counts.items()}
    return settings | {"processes": options.world_size, "tokens": tokens}


def _check_settings(output: Path, settings: dict[str, Any]) -> None:
    """Refuses to resume a run that began with other settings; until a checkpoint, any will do."""
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


def _model(arguments: argparse.Namespace) -> Any:
    narrow = arguments.bf16 and arguments.lora is not None
    model = load_model(
        arguments.model,
        torch.bfloat16 if narrow else torch.float32,
        trust_remote_code=arguments.trust_remote_code,
    )
    try:
        patch_model(
            model,
            smoothing=arguments.smoothing,
            temperature=arguments.temperature,
            softcap=arguments.softcap,
            eval_logits=False,
        )
        if arguments.teacher:
            set_objective(model, Distillation(arguments.distillation))
        if arguments.lora is None:
            return model
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=arguments.lora,
                lora_alpha=2 * arguments.lora,
                target_modules="all-linear",  # which leaves out the head
            ),
        )
    except ValueError as error:
        raise CliError(str(error)) from error


class _Trainer(Trainer):  # type: ignore[misc]
    """Trainer that remembers the largest batch it trained on."""

    positions = 0
    expectation: Expectation | None = None

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        """One forward and backward pass."""
        self.positions = max(self.positions, inputs["input_ids"].numel())
        if self.expectation is not None:
            inputs = self.expectation.inputs(self, model, inputs)
        return super().training_step(model, inputs, *rest, **options)


class _MarkWhole(TrainerCallback):  # type: ignore[misc]
    """Marks each checkpoint after every process has written its part of it."""

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        args.distributed_state.wait_for_everyone()
        if args.should_save:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()


class _Show(TrainerCallback):  # type: ignore[misc]
    """Shows the steps and prints the losses; remembers how many tokens had been seen before."""

    tokens_before = 0

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.tokens_before = state.num_input_tokens_seen
        self._bar = self._progress.add_task(
            "training", total=state.max_steps, completed=state.global_step
        )

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self._progress.update(self._bar, completed=state.global_step)

    def on_log(
        self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any
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
