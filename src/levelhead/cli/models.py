"""The model and its tokenizer: from a hub or a folder, or made here to try the command offline."""

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from .errors import CliError

TINY = "tiny"
_PAD, _START, _END = "<|pad|>", "<|start|>", "<|end|>"
_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|end|>' }}{% endgeneration %}
    {%- else %}
        {{- message['content'] + '<|end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{% endif %}"""


def load_tokenizer(name: str, chat_template: Path | None, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a model, with the chat template in a file if one is given.

    Raises:
        CliError: There is none, or the file cannot be read.
    """
    if name == TINY:
        tokenizer = _tiny_tokenizer()
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            raise _unusable("tokenizer", name, error) from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise CliError(f"cannot read {chat_template}: {error}") from error
    return tokenizer


def load_model(name: str, dtype: torch.dtype | Literal["auto"], *, trust_remote_code: bool) -> Any:
    """The model, from safetensors alone, "auto": as it was saved; its own code runs only if trusted.

    Raises:
        CliError: There is none that can be loaded so.
    """
    if name == TINY:
        model = _tiny_model()
        return model if dtype == "auto" else model.to(dtype)
    _refuse_pickles(name)
    try:
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _unusable("model", name, error) from error


def load_skeleton(name: str, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
    """The model without its weights, on the meta device: only its config is read.

    Raises:
        CliError: There is no config, or no causal language model of its kind.
    """
    with torch.device("meta"):
        if name == TINY:
            return _tiny_model().to(dtype)
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            if "Unrecognized configuration class" in str(error):  # and a list of all others
                kind = type(config).__name__
                raise CliError(f"{name} holds a {kind}: no causal language model") from error
            raise _unusable("config", name, error) from error


def _refuse_pickles(name: str) -> None:
    folder = Path(name)
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise CliError(
            f"{name} holds its weights as a pickle alone, which can run any code when it is read. "
            "If you trust it, convert it: AutoModelForCausalLM.from_pretrained("
            f"{name!r}, use_safetensors=False).save_pretrained(NEW_FOLDER)"
        )


def _unusable(what: str, name: str, error: Exception) -> CliError:
    folder = Path(name)
    if folder.is_dir() and not any(
        folder.glob("*config.json")
    ):  # an adapter's has a name of its own
        return CliError(f"{name} holds no model; name a folder that save_pretrained has written")
    if what == "tokenizer" and folder.is_dir():
        files = [*folder.glob("token*"), *folder.glob("vocab*"), *folder.glob("*.model")]
        if not files:
            return CliError(f"{name} holds a model without its tokenizer; save that there, too")
    code = "trust_remote_code" in str(error)
    remedy = " (the option here is --trust-remote-code)" if code else ""
    return CliError(f"cannot load the {what} of {name}: {error}{remedy}")


def _tiny_tokenizer() -> Any:
    """One token a byte, three special ones, and a chat template with marks."""
    specials = (_PAD, _START, _END)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*specials, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _tiny_model() -> Any:
    tokenizer = _tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
