"""What `levelhead capacity` takes."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """The arguments of `levelhead capacity`, but for --json."""

    model: str
    data: str | None = None
    trust_remote_code: bool = False
    smoothing: float = 0.1
    temperature: float = 1.0
    softcap: float | None = None
    max_tokens: int = 65_536
    max_length: int = 1024
    batch_size: int = 8
    chat_template: Path | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    seed: int = 42
