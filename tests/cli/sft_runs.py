"""Rows for `levelhead sft`, and the tiny model that it starts from."""

import json

import torch
import transformers
from safetensors.torch import load_file

from levelhead.cli.models import load_model, load_tokenizer

PAIRS = [
    {"prompt": f"box {i}, shelf {i % 7}:", "completion": (" fig", " plum", " apple")[i % 3]}
    for i in range(24)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{i} + {i}?"},
            {"role": "assistant", "content": f"{2 * i}"},
        ]
    }
    for i in range(6)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def start(seed=42):
    transformers.set_seed(seed)
    return load_model("tiny", torch.float32, trust_remote_code=False)


def save_tiny(path):
    """Writes the tiny model and its tokenizer to a folder."""
    start(seed=3).save_pretrained(path)
    load_tokenizer("tiny", None, trust_remote_code=False).save_pretrained(path)
    return path


def weights(folder):
    return load_file(folder / "model.safetensors")
