"""The head of a model and what counts beside it, read off its config: no weight is loaded."""

from dataclasses import dataclass

import torch

from ..errors import CliError, missing_extra


@dataclass(frozen=True)
class Architecture:
    """What memory and time of a model's head depend on.

    Attributes:
        model: The model as the user named it.
        hidden: Width of the head's input.
        vocabulary: Rows of the head.
        softcap: The cap of its logits; None: there is none.
        tied: The head's weight is that of the input embeddings.
        parameters: Numbers in the whole model, a tied head counted once.
        layers: Blocks of the body.
    """

    model: str
    hidden: int
    vocabulary: int
    softcap: float | None
    tied: bool
    parameters: int
    layers: int


def read_architecture(
    model: str, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> Architecture:
    """The architecture of a model: a name on the hub, a folder with a config.json, or `tiny`.

    Raises:
        CliError: It cannot be read, is no causal language model, or its loss is not that of a head that Levelhead
            can serve; `transformers` is missing.
    """
    try:
        from levelhead.integrations.patch.heads import output_heads
        from levelhead.integrations.patch.probe import probe_head

        from ..models import load_skeleton
    except ModuleNotFoundError as error:
        raise missing_extra(error, "transformers", {"transformers", "tokenizers"}) from error
    skeleton = load_skeleton(model, dtype, trust_remote_code=trust_remote_code)
    try:
        (head, *_) = output_heads(skeleton)
        transform = probe_head(skeleton)
    except ValueError as error:
        raise CliError(f"{model}: {error}") from error
    embeddings = skeleton.get_input_embeddings()
    return Architecture(
        model=model,
        hidden=head.in_features,
        vocabulary=head.out_features,
        softcap=transform.softcap,
        tied=head.weight is getattr(embeddings, "weight", None),
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        layers=skeleton.config.get_text_config().num_hidden_layers,
    )
