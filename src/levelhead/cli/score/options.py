"""What `levelhead score` takes."""

from dataclasses import dataclass
from pathlib import Path

from levelhead.scoring.prompts import Phrasing
from levelhead.scoring.scores import Confidence


@dataclass(frozen=True)
class Options:
    """The arguments of `levelhead score`; `seed` None: the order of the data."""

    model: str
    data: str
    output: Path
    trust_remote_code: bool = False
    phrasing: Phrasing = "first"
    seed: int | None = 42
    no_chat_template: bool = False
    max_length: int | None = None
    chat_template: Path | None = None
    dataset_config: str | None = None
    dataset_split: str = "test"
    confidence: Confidence = "msp"
    batch_size: int = 8
    bf16: bool = False
