"""What `levelhead teacher` can be asked to do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `levelhead teacher`; its --help says what each means. None: not given."""

    model: str
    trust_remote_code: bool = False
    data: str
    output: Path
    max_length: int = 1024
    chat_template: Path | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    top_k: int = 5
    batch_size: int = 8
    bf16: bool = False
    validation: str | None = None
    validation_split: str = "test"
    recalibrate: Literal["temperature", "smoothing"] = "temperature"
