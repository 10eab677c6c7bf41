"""What `levelhead temperature` takes."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """The arguments of `levelhead temperature`."""

    model: str
    data: str
    output: Path
    trust_remote_code: bool = False
    max_tokens: int = 65_536
    max_length: int = 1024
    batch_size: int = 8
    chat_template: Path | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    seed: int = 42
