"""Several translation models as one: each next token has the mean of their probabilities."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

# What a translation begins, ends and is filled with; one search asks all members for it.
TOKENS = ("decoder_start_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id")


class Ensemble(PreTrainedModel, GenerationMixin):
    """Translates with ``generate`` as any model does; its logits are the logarithm of the mean probability.

    Args:
        members: Encoder-decoder models of one vocabulary, whatever their families and sizes are. Settings of
            ``generate`` are those of the first.

    Raises:
        ValueError: There are fewer than two, or their vocabularies or their special tokens differ.
    """

    def __init__(self, members: Sequence[PreTrainedModel]) -> None:
        if len(members) < 2:
            raise ValueError(f"ensemble: needs two models or more, got {len(members)}")
        first = members[0]
        for other in members[1:]:
            sizes = [vocabulary(model) for model in (first, other)]
            if sizes[0] != sizes[1]:
                raise ValueError(f"ensemble: models have one vocabulary, got {sizes[0]:,} and {sizes[1]:,} tokens")
            for name in TOKENS:
                given = [getattr(model.generation_config, name, None) for model in (first, other)]
                if given[0] != given[1]:
                    raise ValueError(f"ensemble: {name} is one for all models, got {given[0]} and {given[1]}")
        super().__init__(type(first.config).from_dict(first.config.to_dict()))
        self.generation_config = copy.deepcopy(first.generation_config)
        self.members = nn.ModuleList(members)
        self.encoders = Encoders(members)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """All encoders as one."""
        return self.encoders

    def get_decoder(self) -> nn.Module:
        """All decoders, for those who ask how many positions there are."""
        return nn.ModuleList([member.get_decoder() for member in self.members])

    def get_input_embeddings(self) -> nn.Module:
        """Those of the first."""
        return self.members[0].get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Those of the first."""
        return self.members[0].get_output_embeddings()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As of any model, with a cache for each member."""
        return super().generate(*args, **{"past_key_values": Caches(len(self.members)), **kwargs})

    def forward(
        self,
        decoder_input_ids: Tensor,
        encoder_outputs: Any,
        attention_mask: Tensor | None = None,
        past_key_values: Caches | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        """One step.

        Args:
            decoder_input_ids: ``[batch, target]``.
            encoder_outputs: What `Encoders` gives.
            attention_mask: ``[batch, source]``.
            past_key_values: A cache for each member; without them all of the target is computed.
            **_: What members are not asked for, such as their attention.

        Returns:
            Log-probabilities as logits, ``[batch, target, vocabulary]``, in fp32.
        """
        caches = past_key_values.members if past_key_values is not None else [None] * len(self.members)
        states = encoder_outputs[0].split(self.encoders.widths, dim=-1)
        total: Tensor | None = None
        for member, state, cache in zip(self.members, states, caches, strict=True):
            output = member(
                encoder_outputs=BaseModelOutput(last_hidden_state=state),
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            )
            own = output.logits.float().log_softmax(dim=-1)
            total = own if total is None else torch.logaddexp(total, own)
        assert total is not None
        return Seq2SeqLMOutput(logits=total - math.log(len(self.members)), past_key_values=past_key_values)


class Encoders(nn.Module):
    """The encoders of several models as one, whose states stand side by side: ``[batch, source, sum of widths]``.

    Side by side they are one tensor, whose rows ``generate`` repeats for its beams.
    """

    def __init__(self, members: Sequence[PreTrainedModel]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([member.get_encoder() for member in members])
        self.widths = [member.config.hidden_size for member in members]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """The states of a batch of sources, ``[batch, source]``."""
        states = [encoder(input_ids=input_ids, attention_mask=attention_mask)[0] for encoder in self.encoders]
        return BaseModelOutput(last_hidden_state=torch.cat(states, dim=-1))


class Caches(Cache):
    """A cache for each member, which all hold as many tokens and follow the same beams."""

    def __init__(self, count: int) -> None:
        super().__init__(layers=[])
        self.members = [EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(count)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens they hold."""
        length: int = self.members[0].get_seq_length(layer_idx)
        return length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follows the beams."""
        for member in self.members:
            member.reorder_cache(beam_idx)


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens a model chooses among."""
    return len(model.get_output_embeddings().weight)  # type: ignore[union-attr, arg-type]
