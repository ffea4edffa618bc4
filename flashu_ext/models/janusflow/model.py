"""The model: transformers' Llama between a latent encoder and decoder, under upstream's parameter names."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..llm import fill_tied_head, language_model
from ..norms import RMSNorm
from . import checkpoint
from .config import JanusFlowConfig
from .latents import LatentDecoder, LatentEncoder
from .vision import ImageEncoder

__all__ = ["JanusFlow"]


class JanusFlow(nn.Module):
    """JanusFlow as published: one Llama that answers questions and draws by rectified flow. Image tokens are causal.

    Dense: every method computes what upstream's computes. `flashu_ext.accelerate` makes it fast.
    """

    # A module of transformers, untyped because its parts are accessed by attribute.
    language_model: Any

    def __init__(self, config: JanusFlowConfig):
        super().__init__()
        self.config = config
        fields = {
            "hidden_size": config.hidden,
            "intermediate_size": config.inter,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv,
            "vocab_size": config.vocab,
            "rms_norm_eps": config.eps,
            "rope_theta": config.rope_theta,
            "tie_word_embeddings": config.tie_word_embeddings,
            "max_position_embeddings": 2048,  # transformers 4.38 makes a mask of so many rows and columns, larger on demand
        }
        self.language_model = language_model("Llama", fields)
        self.vision_und_enc_model = ImageEncoder(config)
        self.vision_und_enc_aligner = nn.Linear(config.vit, config.hidden)
        self.beg_of_und_embed = nn.Parameter(torch.zeros(1, config.hidden))
        self.vision_gen_enc_model = LatentEncoder(config)
        self.vision_gen_enc_aligner = nn.Linear(config.channels, config.hidden)
        self.vision_gen_dec_aligner_norm = RMSNorm(config.hidden, config.eps)
        self.vision_gen_dec_aligner = nn.Linear(config.hidden, config.channels)
        self.vision_gen_dec_model = LatentDecoder(config)
        self.register_load_state_dict_pre_hook(partial(fill_tied_head, language_model="language_model"))

    # ---- drawing

    def span(self, encoded: Tensor, time: Tensor) -> Tensor:
        """What the language model reads of an image: the encoder's output [rows, patches, channels] and the time's embedding
        [rows, hidden] -> [rows, 1 + patches, hidden]."""
        return torch.cat([time[:, None], self.vision_gen_enc_aligner(encoded)], dim=1)

    def backbone(self, tokens: Tensor, seen: Tensor, span: Tensor) -> Tensor:
        """The language model on a prompt and an image.

        Args:
            tokens: int64 [rows, length], the tokens before the span.
            seen: int64 [rows], how many of them, from the first, are seen; positions count all.
            span: [rows, n, hidden].

        Returns:
            Final hidden states [rows, length + n, hidden].
        """
        embeds = torch.cat([self.language_model.model.embed_tokens(tokens), span], dim=1)
        rows, length = embeds.shape[:2]
        positions = torch.arange(length, device=tokens.device).expand(rows, -1)
        # The prompt's end is hidden; the rest is causal. Up to transformers 4.38 a mask of all pairs is not understood.
        shown = (positions < seen[:, None]) | (positions >= tokens.shape[1])
        run = self.language_model.model
        return run(
            inputs_embeds=embeds, attention_mask=shown.long(), position_ids=positions, use_cache=False
        ).last_hidden_state

    def velocity(self, hidden: Tensor, encoded: Tensor, time: Tensor) -> Tensor:
        """Final hidden states of the patches [rows, patches, hidden], and what `span` had -> [rows, channels, 2g, 2g]."""
        aligned = self.vision_gen_dec_aligner(self.vision_gen_dec_aligner_norm(hidden))
        return self.vision_gen_dec_model(aligned, encoded, time)

    # ---- answering

    def image_features(self, pixels: Tensor) -> Tensor:
        """Pixels [images, 3, side, side] -> [images, tokens, vit]."""
        return self.vision_und_enc_model(pixels)

    def embed_image(self, pixels: Tensor) -> Tensor:
        """What the language model reads of an image that is asked about: [images, 1 + tokens, hidden]."""
        tokens = self.vision_und_enc_aligner(self.image_features(pixels))
        return torch.cat([self.beg_of_und_embed.expand(len(pixels), 1, -1).to(tokens.dtype), tokens], dim=1)

    # ---- files

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], dtype: torch.dtype | None = None) -> JanusFlow:
        """Load a checkpoint directory, upstream's or ours; see `checkpoint.load`."""
        return checkpoint.load(directory, cls, dtype)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors; see `checkpoint.save`."""
        checkpoint.save(self, directory)
