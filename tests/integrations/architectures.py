"""Every language model of transformers' auto classes, in tiny size, and what the patch makes of it.

`python -m tests.integrations.architectures` writes architectures.json, a line for each: *matched* (a
patched model trains as its unpatched twin does with dense label smoothing, and how its loss is
made), *refused* by patch_model, and why, or *not built* here, and why. One that trains on something
else gets no line, and fails the command. Arguments, as `causal-lm/llama` or `seq2seq`, choose some
to print.
"""

import copy
import inspect
import json
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from levelhead.integrations import patch_model
from levelhead.integrations.patch.probe import probe_head

TABLE = Path(__file__).with_suffix(".json")
GROUPS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}

VOCAB_SIZE = 128
LENGTH = 16
WORDS = 96  # ids from here on are special tokens (images, audio, languages)
SMOOTHING = 0.1
# float32: both sides round sums of some hundred terms, at 6e-8 each, in another order, and the
# largest error of all architectures is 4e-6 (the Gemma 4 family; the others stay below 1e-6). The mistakes
# that test_architectures.py makes on purpose are off by 1e-4 and more.
TOLERANCE = 1e-5
HEADS, HEAD_DIM = 2, 16
HIDDEN_SIZE = HEADS * HEAD_DIM

# Fields that are set where a config has them. Scales and caps of logits are such that they bend the
# loss, router losses weigh as much as the cross-entropy, weights are large enough for both to show.
FIELDS: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "initializer_range": 0.1,
    "init_std": 0.1,
    "final_logit_softcapping": 0.7,
    "logits_soft_cap": 0.7,
    "output_logit_soft_cap": 0.7,
    "logits_scaling": 0.3,
    "logit_scale": 3.0,
    "lm_head_multiplier": 2.0,
    "output_multiplier": 0.25,
    "unpadded_vocab_size": VOCAB_SIZE - 8,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.1,
    "use_cache": False,
    "use_mamba_kernels": False,
}
# What has no meaning in tiny size, or follows from other fields.
KEPT = re.compile(
    r"^(num_|in_|out_|audio_)?channels$|^chunk_size_(feed_forward|lm_head)$|_interval$"
    r"|^(qk_head_dim|attention_hidden_size|attention_head_dim|hop_length|hidden_stride|seed)$"
)
OFF = re.compile(r"dropout|pdrop|layerdrop|jitter|drop_path|drop_rate")
# The largest value of a whole number in a config, by the first pattern its name fits.
LARGEST = [
    (r"type_vocab_size", 4),
    (r"vocab|num_embeddings|codebook_size", VOCAB_SIZE),
    (r"position|n_ctx|max_seq_len|context_length|max_length", 64),
    (r"layers$|n_layer$|depth$|num_blocks", 2),
    (r"n_mamba_heads|mamba_n_heads|mamba_num_heads", 4),
    (r"heads$|n_head$|num_query_groups", HEADS),
    (r"kv_channels|d_kv|d_head$|head_?dim$|dim_head$|head_size$|rotary_dim", HEAD_DIM),
    (r"experts_per_tok|top_?k|^moe_k$", 2),
    (r"topk_group|shared_experts$", 1),
    (r"n_group$|num_expert_group", 2),
    (r"experts|expert_num", 4),
    (r"n_?groups", 1),
    (r"_rank$", 8),
    (r"image_size|crop_size|img_size", 16),
    (r"patch_size", 4),
    (r"query_tokens|query_num|latents|image_tokens|image_seq_length|tokens_per_image", 4),
    (r"chunk|window|block|local_attention", 8),
    (r"mamba_d_ssm", 2 * HIDDEN_SIZE),
    (
        r"hidden|intermediate|d_model|n_embd|embed|dim$|ffn|dim_ff|d_ff|d_inner|d_state|n_inner|width"
        r"|_channels$|filters|projection|_size$",
        HIDDEN_SIZE,
    ),
]
# What the rules above get wrong: fields by model type; those of a config within by its name.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TIMM = {"model_type": "siglip_vision_model"}  # in place of a tower that needs the package timm
DOTS3 = {  # of its layers with a sliding window
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 2 * HEAD_DIM,
    "swa_qk_nope_head_dim": HEAD_DIM,
    "swa_v_head_dim": HEAD_DIM,
}
VIBEVOICE = {"num_filters": 1, "depths": (1,) * 7}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "hc_count": 2,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "image_token_offset": 100,
        "audio_token_offset": 108,
        "vision_config": {"codebook_size": 8},
        "audio_config": {"codebook_size": 8},
    },
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 100, "IMGIMGA": 101}},
    "codegen": {"n_head": 4, "rotary_dim": 4},  # heads in four parts, one a shard
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": ROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
    },
    "deepseek_v2": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    },
    "doge": {"is_moe": True},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 0},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": DOTS3},
    "dots3_note_text": DOTS3,
    "emu3": {
        "vocabulary_map": {"<image>": 100, "<|extra_200|>": 101, "<|visual token 000001|>": 102}
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}}},
    "exaone_moe": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "fast_vlm": {"vision_config": TIMM},
    "flint": {"layer_types": ["full_attention", "sliding_attention"], "mlp_only_layers": [0]},
    "florence2": {
        "vision_config": {
            "embed_dim": (8, 8, 8, 8),
            "num_heads": (1, 1, 1, 1),
            "num_groups": (1, 1, 1, 1),
        }
    },
    "glm5_next": {"text_config": {"index_topk": 4, "index_kpool": 2}},
    "granite4_vision": {
        "deepstack_layer_map": [(-1, 0)],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longt5": {"decoder_start_token_id": 0},
    "mamba2": {"num_heads": 4},
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "mistral4": {"head_dim": 2 * HEAD_DIM},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, 0]}},
    "muse_spark": {"audio_config": {"hidden_sizes": (8, 8, 8, 8)}},
    "nemo_speechlm": {"audio_config": {"diarization_config": {"chunk_right_context": 4}}},
    "paddleocr_vl": {"text_config": {"rope_parameters": ROPE | {"mrope_section": [4, 2, 2]}}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 100},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 100},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (4, 4),
        "max_position_embeddings": 16,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,
    },
    "step3p7": {"text_config": {"sliding_window": 8}},
    "switch_transformers": {"decoder_start_token_id": 0},
    "t5": {"decoder_start_token_id": 0},
    "udop": {"decoder_start_token_id": 0},
    "vibevoice_asr": {
        "acoustic_tokenizer_chunk_size": 3200,
        "acoustic_tokenizer_encoder_config": VIBEVOICE,
        "semantic_tokenizer_encoder_config": VIBEVOICE,
    },
    "xlstm": {"qk_dim_factor": 2.0, "v_dim_factor": 2.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
}

# What a model wants besides tokens: the number of tokens an image takes, tensors as lists,
# random ones by their shape, switches.
INPUTS: dict[str, dict[str, Any]] = {
    "image-text/llava": {"images": 16, "pixel_values": (2, 3, 16, 16)},
    "image-text/paligemma": {
        "images": 16,
        "pixel_values": (2, 3, 16, 16),
        "token_type_ids": [[0] * 16 + [1] * 16] * 2,
    },
    "image-text/gemma3": {
        "images": 4,
        "pixel_values": (2, 3, 16, 16),
        "token_type_ids": [[1] * 4 + [0] * 16] * 2,
    },
    "image-text/qwen2_vl": {
        "images": 4,
        "pixel_values": (32, 96),
        "image_grid_thw": [[1, 4, 4]] * 2,
        "mm_token_type_ids": [[1] * 4 + [0] * LENGTH] * 2,
    },
    "image-text/qwen2_5_vl": {
        "images": 4,
        "pixel_values": (32, 96),
        "image_grid_thw": [[1, 4, 4]] * 2,
        "mm_token_type_ids": [[1] * 4 + [0] * LENGTH] * 2,
    },
    "seq2seq/voxtral_realtime": {"input_features": (2, 128, 128), "num_delay_tokens": 1},
    "seq2seq/switch_transformers": {"output_router_logits": True},
    "image-text/molmo2": {"mm_token_type_ids": [[0] * LENGTH] * 2},
}


class Architecture(NamedTuple):
    """An entry of an auto mapping."""

    group: str
    model_type: str
    name: str

    def __str__(self) -> str:
        return f"{self.group}/{self.model_type}"


def architectures() -> list[Architecture]:
    """All entries of the installed transformers."""
    return [
        Architecture(group, model_type, name if isinstance(name, str) else name[0])
        for group, mapping in GROUPS.items()
        for model_type, name in getattr(modeling_auto, mapping).items()
    ]


def _shrunk(config: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the class of `config` (its default one) that make it tiny."""
    values = {name: value for name, value in vars(config).items() if name[0] != "_"}
    depth = getattr(config, "num_hidden_layers", None)
    by_layer = {k: v for k, v in values.items() if isinstance(v, list | tuple) and len(v) == depth}
    # A layer of every kind, as far as four go; two of a kind if there is but one.
    kinds = [repr(kind) for kind in zip(*by_layer.values(), strict=True)]
    layers = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]][:4]
    layers = layers if len(layers) > 1 else [0, 1]
    tiny: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, transformers.PreTrainedConfig):
            tiny[name] = _tiny_config(value, overrides.get(name, {}))
        elif name in overrides:
            tiny[name] = overrides[name]
        elif name in FIELDS:
            tiny[name] = FIELDS[name]
        elif name in by_layer:
            tiny[name] = [value[i] for i in layers]
        elif name == "rope_parameters" and _is_multimodal_rope(config):
            tiny[name] = (value or ROPE) | {"mrope_section": _rope_sections(value or ROPE)}
        elif isinstance(value, bool) or not isinstance(value, int | float) or KEPT.search(name):
            continue
        elif OFF.search(name):
            tiny[name] = type(value)(0)
        elif isinstance(value, int) and re.search("_(id|index)$", name):
            if value >= WORDS:
                tiny[name] = _special_token(name)
        elif isinstance(value, int):
            largest = next((size for pattern, size in LARGEST if re.search(pattern, name)), value)
            largest = (
                len(layers) if value == depth and name.endswith(("layers", "layer")) else largest
            )
            tiny[name] = min(value, largest)
    return tiny | {k: v for k, v in overrides.items() if k not in values}


def _tiny_config(default: Any, overrides: dict[str, Any]) -> Any:
    overrides = dict(overrides)
    if "model_type" in overrides:  # another than the default one
        default = CONFIG_MAPPING[overrides.pop("model_type")]()
    return type(default)(**_shrunk(default, overrides))


def _is_multimodal_rope(config: Any) -> bool:
    return "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ())


def _rope_sections(rope: dict[str, Any]) -> list[int]:
    """How the pairs of rotated channels divide into time, height and width."""
    pairs = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
    return [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]


def _special_token(name: str) -> int:
    """An id beyond the words, the same one for a field in a config and in those within it."""
    name = name.removesuffix("_index").removesuffix("_id")
    others = VOCAB_SIZE - 8 - WORDS - 1  # eight less, because some models cut their vocabulary
    return WORDS if name == "image_token" else WORDS + 1 + crc32(name.encode()) % others


def build(architecture: Architecture, **fields: Any) -> Any:
    """The architecture as a tiny model in training mode; the same one at every call.

    Args:
        architecture: what to build.
        **fields: fields of its config, over those that make it tiny.
    """
    overrides = OVERRIDES.get(architecture.model_type, {}) | fields
    config = _tiny_config(CONFIG_MAPPING[architecture.model_type](), overrides)
    model_class = getattr(transformers, architecture.name)
    if not isinstance(config, model_class.config_class):  # a text model takes the text's own
        within = [getattr(config, name) for name in config.sub_configs]
        config = next((c for c in within if isinstance(c, model_class.config_class)), config)
    if architecture.group == "causal-lm" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(0)
    # The default experts run grouped matrix products, which not every CPU build of torch has.
    model = model_class._from_config(config, dtype=torch.float32, experts_implementation="eager")
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        nn.init.normal_(bias, std=0.3)  # zero, as transformers sets it, would hide a mistake
    return model.train()


def batch(architecture: Architecture, model: Any) -> dict[str, Tensor]:
    """Two rows of tokens, the second with padding; the labels leave out some of them."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, WORDS, (2, LENGTH), generator=generator)
    mask = torch.ones_like(input_ids)
    input_ids[1, -2:] = mask[1, -2:] = 0
    if model.config.is_encoder_decoder:
        labels = torch.randint(3, WORDS, (2, 9), generator=generator)
    else:
        labels = input_ids.clone()
    labels[0, :4] = labels[1, 6] = labels[1, -2] = -100
    labels[1, -1] = 3  # on padding, where only few models would not count it
    inputs: dict[str, Any] = {}
    for name, value in INPUTS.get(str(architecture), {}).items():
        if name == "images":  # each row begins with its image
            tokens = torch.full((2, value), _special_token("image_token"))
            input_ids = torch.cat([tokens, input_ids], dim=1)
            mask = torch.cat([torch.ones_like(tokens), mask], dim=1)
            labels = torch.cat([torch.full_like(tokens, -100), labels], dim=1)
        elif isinstance(value, tuple):
            inputs[name] = torch.randn(value, generator=generator)
        else:
            inputs[name] = torch.tensor(value) if isinstance(value, list) else value
    return inputs | {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


class Mismatch(Exception):  # noqa: N818 (what the sweep is for, not an error of its own)
    """A patched model does not train as its unpatched twin does."""


def outcome(architecture: Architecture) -> dict[str, str]:
    """What the patch makes of the architecture; raises Mismatch where it trains on something else."""
    row = {"class": architecture.name}
    try:
        plain = build(architecture)
        patched = copy.deepcopy(plain)
    except Exception as error:
        return row | {"outcome": "not built", "why": _sentence(error)}
    try:
        patch_model(patched, SMOOTHING)
    except ValueError as error:
        return row | {"outcome": "refused", "why": _sentence(error)}
    inputs = batch(architecture, plain)
    try:
        run(plain, inputs)
    except Exception as error:
        return row | {"outcome": "not built", "why": f"it does not run: {_sentence(error)}"}
    try:
        compare(plain, patched, inputs)
    except RuntimeError as error:
        if "unpatch_model" not in str(error):  # the way out that a refusal of the call names
            raise
        return row | {"outcome": "refused", "why": _sentence(error)}
    return row | {"outcome": "matched", "how": describe(plain, inputs)}


def _sentence(error: Exception) -> str:
    """The first sentence of a message, which in a refusal is its reason."""
    text = " ".join(str(error).split())
    text = re.sub(r"^patch_model cannot serve \w+: ", "", text)
    return re.split(r"\.(?= [A-Z]|$)", text)[0]


def run(model: Any, inputs: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return model(**inputs)


def compare(plain: Any, patched: Any, inputs: dict[str, Any]) -> None:
    """Check that `patched` trains as `plain` does with dense label smoothing; Mismatch if not.

    All that the model adds to its cross-entropy, a router loss above all, counts as it is.
    """
    want, got = run(plain, inputs), run(patched, inputs)
    if "logits" in got:
        raise Mismatch("a training call returns logits")
    smooth = cross_entropy(plain, want, inputs, SMOOTHING)
    want_loss = want.loss - cross_entropy(plain, want, inputs) + smooth
    _check("the loss", got.loss, want_loss, want_loss.abs())
    want_gradients, got_gradients = _gradients(plain, want_loss), _gradients(patched, got.loss)
    head = next(n for n, m in plain.named_modules() if m is plain.get_output_embeddings())
    largest = max(gradient.abs().max() for gradient in want_gradients.values())
    for name, gradient in want_gradients.items():
        # Against the largest one, because some are sums that cancel, and as small as their
        # rounding; what the head gets does not hide behind it.
        scale = gradient.abs().max() if name.startswith(f"{head}.") else largest
        _check(f"the gradient of {name}", got_gradients[name], gradient, scale)
    plain.eval(), patched.eval()
    with torch.no_grad():
        want, got = run(plain, inputs), run(patched, inputs)
    if not (torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)):
        raise Mismatch("logits or loss of an eval call differ")


def _check(what: str, got: Tensor, want: Tensor, scale: Tensor) -> None:
    error = (got - want).abs().max() / scale
    if not error <= TOLERANCE:  # NaN fails, too
        raise Mismatch(f"{what} is off by {error:.2g} times {scale:.3g}")


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """By name; zero where the loss does not depend on a parameter."""
    names, parameters = zip(
        *((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True
    )
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, gradients, strict=True))


def cross_entropy(
    plain: Any, output: Any, inputs: dict[str, Any], smoothing: float = 0.0
) -> Tensor:
    """The cross-entropy of the logits in an output of `plain`, on the labels as it takes them."""
    return _cross_entropy(output.logits, inputs["labels"], _shifts_labels(plain, inputs), smoothing)


def _cross_entropy(logits: Tensor, labels: Tensor, shift: bool, smoothing: float = 0.0) -> Tensor:
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)


def _shifts_labels(plain: Any, inputs: dict[str, Any]) -> bool:
    """Whether `plain` compares the logits of a position with the next label, or with its own.

    Two batches that differ in their labels alone have the same router loss, so their losses differ
    by what their cross-entropies do, if those are spelled as the model spells its own.
    """
    first = inputs["labels"]
    second = torch.where(first == -100, first, (first + 7) % WORDS)
    fixed = dict(inputs)
    if "decoder_input_ids" in inspect.signature(plain.forward).parameters:
        fixed["decoder_input_ids"] = first.clamp(min=0)
    with torch.no_grad():
        outputs = [run(plain, fixed | {"labels": labels}) for labels in (first, second)]
    for shift in (True, False):
        rest = [
            output.loss - _cross_entropy(output.logits, labels, shift)
            for output, labels in zip(outputs, (first, second), strict=True)
        ]
        if abs(rest[0] - rest[1]) <= TOLERANCE * outputs[0].loss:
            return shift
    raise Mismatch("the model's own loss is no cross-entropy of its logits")


def describe(plain: Any, inputs: dict[str, Any]) -> str:
    """What tells the loss of a matched model from the plain cross-entropy of head(hidden)."""
    head = plain.get_output_embeddings()
    path = next(name for name, module in plain.named_modules() if module is head)
    transform = probe_head(plain)
    output = run(plain, inputs)
    extra = output.loss - cross_entropy(plain, output, inputs)
    marks = {
        "nested head": "." in path,
        "head bias": head.bias is not None,
        f"scale {transform.logit_scale:.6g}": transform.logit_scale != 1,
        f"softcap {transform.softcap}": transform.softcap is not None,
        f"cut to {transform.vocab_size} of {head.out_features}": transform.vocab_size is not None,
        "labels not shifted": not _shifts_labels(plain, inputs),
        "own loss": transform.own_loss,
        "router loss": abs(extra) > TOLERANCE * output.loss,
        "image": "pixel_values" in inputs,
    }
    return ", ".join(mark for mark, holds in marks.items() if holds) or "plain"


def table() -> dict[str, Any]:
    """The committed outcomes by architecture, and the version of transformers they are for."""
    return json.loads(TABLE.read_text())


def main(selected: list[str]) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows: dict[str, dict[str, str]] = {}
    wrong = []
    for architecture in architectures():
        if not selected or {str(architecture), architecture.group} & set(selected):
            try:
                rows[str(architecture)] = outcome(architecture)
            except Exception as error:
                wrong.append(f"{architecture}: {type(error).__name__}: {error}")
    if selected:
        for name, row in sorted(rows.items()):
            print(name, *row.values(), sep="  ")  # noqa: T201 (a command)
    else:
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(rows.items()))
        version = json.dumps(transformers.__version__)
        TABLE.write_text(f'{{"transformers": {version}, "architectures": {{\n{lines}\n}}}}\n')
    counts = Counter(f"{name.split('/')[0]} {row['outcome']}" for name, row in rows.items())
    print(*(f"{n} {what}" for what, n in sorted(counts.items())), sep="\n")  # noqa: T201
    if wrong:
        sys.exit("\n".join([f"{len(wrong)} wrong, and not in the table:", *wrong]))


if __name__ == "__main__":
    main(sys.argv[1:])
