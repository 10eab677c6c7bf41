"""What `levelhead sft` can be asked to do, and which of it goes together."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..errors import CliError

_OF_RCFT = ("ece", "ece_weight", "em_refresh")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `levelhead sft`; its --help says what each means. None: not given."""

    model: str
    trust_remote_code: bool = False
    data: str
    output: Path
    eval: str | None = None
    max_length: int = 1024
    chat_template: Path | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    eval_split: str = "test"
    smoothing: float | None = None
    softcap: float | None = None
    temperature: float = 1.0
    teacher: str | None = None
    distillation: Literal["renormalised", "full", "other"] | None = None
    raw_teacher: bool = False
    calibration_aware: Literal["cft", "rcft"] | None = None
    ece: Literal["confidence", "classwise"] | None = None
    ece_weight: float | None = None
    em_refresh: int | Literal["once", "epoch"] | None = None
    critical_accuracy: float | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    learning_rate: float | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    lora: int | None = None
    bf16: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    deepspeed: str | None = None
    save_steps: int = 500
    resume: bool = False
    seed: int = 42

    def completed(self) -> "Options":
        """Return these options with the defaults that depend on others.

        Raises:
            CliError: Some of them do not go together.
        """
        self._check_calibration()
        if self.teacher is None and (self.distillation or self.raw_teacher):
            raise CliError("--distillation and --raw-teacher need --teacher STORE")
        if self.teacher is not None:
            if self.smoothing is not None:
                raise CliError(
                    "--smoothing smooths the tokens of the data, which --teacher replaces by what the "
                    "teacher finds likely; leave one of them out (`levelhead teacher --recalibrate "
                    "smoothing` smooths the teacher)"
                )
            return replace(self, smoothing=0.0, distillation=self.distillation or "renormalised")
        default = 0.1 if self.calibration_aware is None else 0.0
        options = replace(self, smoothing=default if self.smoothing is None else self.smoothing)
        if self.calibration_aware != "rcft":
            return options
        return replace(
            options,
            ece=self.ece or "confidence",
            ece_weight=1.0 if self.ece_weight is None else self.ece_weight,
            em_refresh=self.em_refresh or "epoch",
        )

    def _check_calibration(self) -> None:
        of_rcft = [name for name in _OF_RCFT if getattr(self, name) is not None]
        if self.calibration_aware is None:
            if self.critical_accuracy is not None:
                of_rcft.append("critical_accuracy")
            if of_rcft:
                raise CliError(f"{_flags(of_rcft)} needs --calibration-aware cft or rcft")
            return
        if self.teacher:
            raise CliError(
                "--calibration-aware learns from answers, --teacher from a teacher; take one"
            )
        if self.calibration_aware == "cft":
            if of_rcft:
                raise CliError(
                    f"{_flags(of_rcft)} is of --calibration-aware rcft; cft has no regulariser"
                )
        elif self.temperature != 1 or self.softcap is not None:
            raise CliError(
                "--calibration-aware rcft calibrates the model as it will be used, and --temperature and "
                "--softcap hold in training alone; leave them out"
            )


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
