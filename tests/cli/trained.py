"""A tiny model that has learned a little of a text, for verbs that look at a model's confidence."""

import random

import torch
import transformers

from levelhead.cli.models import load_model, load_tokenizer

FRUITS = ("fig", "plum", "apple", "quince")


def text(seed=0, lines=300):
    """Lines of which a part can be known, and a part is chance."""
    chance = random.Random(seed)
    return "".join(
        f"{chance.choice(FRUITS)} and {chance.choice(FRUITS)}, {number % 7}\n"
        for number in range(lines)
    )


def save_trained(folder, *, factor=1.0, steps=40, **config):
    """Writes a model trained on that text to `folder`, its logits times `factor`."""
    transformers.set_seed(0)
    tokenizer = load_tokenizer("tiny", None, trust_remote_code=False)
    model = load_model("tiny", torch.float32, trust_remote_code=False)
    if config:
        options = model.config.to_dict() | config
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    ids = torch.tensor(tokenizer(text(seed=1))["input_ids"])
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        batch = rows[step * 8 % len(rows) :][:8]
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        model.model.norm.weight.mul_(factor)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
