"""The heads of known models, (V, D): what benchmarks and tests mean by a model's name."""

SHAPES = {
    "SmolLM2 135M": (49152, 576),
    "GPT-2": (50257, 768),
    "Qwen2.5 0.5B": (151936, 896),
    "Qwen2.5 7B": (152064, 3584),
    "Gemma-2 2B": (256000, 2304),
    "Llama-3 8B": (128256, 4096),
}

# Heads of no model, of which one size grows.
OVER_VOCABULARY, OVER_TOKENS = "vocabulary sweep", "token sweep"
