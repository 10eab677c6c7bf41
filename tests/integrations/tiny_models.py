"""Tiny causal language models with random weights, and the dense loss that patched ones equal."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

VOCAB_SIZE = 67
LENGTH = 9
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODERS = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 0.5}),  # logits reach 0.2: the cap bends them
    "granite": ("Granite", {"logits_scaling": 0.3}),
    "cohere": ("Cohere", {"logit_scale": 3.7}),
    "phi": ("Phi", {"embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    # The default experts run grouped matrix products, which torch does not have in float64.
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "output_router_logits": True, "experts_implementation": "eager"},
    ),
}
FAMILIES = [*DECODERS, "gpt2"]


def tiny(family: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A model in training mode, the same one at every call; dropout is off."""
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        ids = {"bos_token_id": 1, "eos_token_id": 2}
        config = transformers.GPT2Config(vocab_size=VOCAB_SIZE, **sizes, **off, **ids, **options)
        model = transformers.GPT2LMHeadModel(config)
    else:
        name, own = DECODERS[family]
        config = getattr(transformers, f"{name}Config")(**SIZES | own | options)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias, std=0.1)  # zero, as transformers sets it, would hide a mistake
    return model.to(dtype).train()


def batch() -> dict[str, Tensor]:
    """Two rows of tokens; the labels leave out a prompt and a token in the middle."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, VOCAB_SIZE, (2, LENGTH), generator=generator)
    labels = input_ids.clone()
    labels[0, :4] = -100
    labels[1, 6] = -100
    return {"input_ids": input_ids, "labels": labels}


def next_tokens(labels: Tensor) -> Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def dense_loss(
    model: Any,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    target: Tensor | None = None,
    smoothing: float = 0.1,
    num_items: float | None = None,
) -> Tensor:
    """The loss of an unpatched `model` with torch's own label smoothing, in the model's dtype."""
    output = model(input_ids=input_ids)
    target = next_tokens(labels) if target is None else target
    loss = F.cross_entropy(
        output.logits.flatten(0, 1), target.flatten(), label_smoothing=smoothing, reduction="sum"
    ) / (num_items or (target != -100).sum())
    if output.get("aux_loss") is not None:
        loss = loss + model.router_aux_loss_coef * output.aux_loss
    return loss


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor | None]:
    """The gradient of every parameter, by name; None where the loss does not depend on it."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def assert_same_training(
    patched: Any, got: Tensor, plain: Any, want: Tensor, atol: float = 1e-12
) -> None:
    """The same loss and the same gradient of every parameter, to within `atol`.

    The default is what is left in float64 after sums of a few hundred terms of order one.
    """
    torch.testing.assert_close(got, want, rtol=0, atol=atol)
    got_gradients, want_gradients = gradients(got, patched), gradients(want, plain)
    assert got_gradients.keys() == want_gradients.keys()
    for name, gradient in want_gradients.items():
        torch.testing.assert_close(
            got_gradients[name],
            gradient,
            rtol=0,
            atol=atol,
            msg=lambda message, name=name: f"gradient of {name}: {message}",
        )
