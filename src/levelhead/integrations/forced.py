"""What a model finds likely at the positions of a given text: its k largest probabilities, without its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import TopK, linear_topk
from .heads import language_model, output_heads, refusal
from .probe import HeadTransform, probe_head


class ForcedDecoder:
    """Reads given texts with a causal language model, and keeps the k largest logits of what it would say.

    The forward ends where the hidden states enter the head, so neither its logits nor a loss are computed.

    Args:
        model: what `levelhead.patch_model` takes, not patched; set to eval mode.
        k: how many of the largest logits, at most the size of the vocabulary.

    Raises:
        ValueError: the logits of the model are not those of a plain head, or its labels are not those of the
            next position.

    Example:
        >>> decoder = ForcedDecoder(AutoModelForCausalLM.from_pretrained(name), k=5)
        >>> top = decoder(input_ids, attention_mask, counts)
        >>> top.indices, top.log_probs
    """

    def __init__(self, model: nn.Module, k: int) -> None:
        self._model = language_model(model).eval()
        self._head = output_heads(self._model)[0]
        self._transform: HeadTransform = probe_head(self._model)
        if not self._transform.shift:
            raise refusal(
                self._model,
                "it predicts the label of a position at that position, not before it",
                "Pass a causal language model",
            )
        self._k = k

    @property
    def vocabulary(self) -> int:
        """How many logits the model has."""
        return self._transform.vocab_size or self._head.out_features

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, counts: Tensor) -> TopK:
        """The k largest logits at each position that counts.

        Args:
            input_ids: shape (B, T).
            attention_mask: shape (B, T).
            counts: bool, shape (B, T - 1): positions whose next token is asked for.

        Returns:
            TopK with fields of shape (P, k) and (P,), the P positions in the order of `counts`.
        """
        hidden = self._hidden(input_ids=input_ids, attention_mask=attention_mask)[:, :-1][counts]
        size = self.vocabulary
        bias: Tensor | None = self._head.bias
        return linear_topk(
            hidden.to(self._head.weight.dtype),
            self._head.weight[:size],
            self._k,
            linear_bias=None if bias is None else bias[:size],
            softcap=self._transform.softcap,
            logit_scale=self._transform.logit_scale,
        )

    def _hidden(self, **inputs: Any) -> Tensor:
        """The hidden states (B, T, D) that the forward of the model hands to its head."""

        def stop(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            raise _ReachedHead(arguments[0])

        hook = self._head.register_forward_pre_hook(stop)
        try:
            self._model(**inputs, use_cache=False)
        except _ReachedHead as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise RuntimeError(f"{type(self._model).__name__} did not call its head")


class _ReachedHead(Exception):  # noqa: N818 (no error: the forward got as far as it should)
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
