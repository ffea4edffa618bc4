"""The model: transformers' Qwen2 and SigLIP encoder with our head, under upstream's parameter names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import guidance_scale_of
from ..decoding import TokenSampler
from ..embedding import TimestepEmbedder
from ..llm import fill_tied_head, language_model, siglip_encoder
from ..masks import additive, omni_allowed
from ..norms import RMSNorm
from ..velocity import guide, guided, unpatchify
from . import checkpoint, validate
from .adapter import adapter
from .config import HeadConfig, Showo2Config
from .decoding import decode_dense
from .embedders import PatchEmbed
from .head import FinalLayer, ModulatedAttentionBlock

__all__ = ["Showo2"]


class Showo2(nn.Module):
    """Show-o2 as published: one Qwen2 that answers questions and, with a diffusion head, generates images.

    Dense: every method computes what upstream's computes. `flashu_ext.accelerate` makes it fast.
    One image per row; all rows of a batch have image spans of the same length.
    """

    image_position_ids: Tensor
    # Modules of transformers and torch, untyped because their parts are accessed by attribute.
    showo: Any
    image_embedder_und: Any
    image_embedder_gen: Any
    position_embedding: Any
    und_trans: Any
    fusion_proj: Any
    time_embed: Any
    time_embed_proj: Any
    diff_proj: Any
    diffusion_head_a: Any
    diffusion_head_b: Any

    def __init__(self, config: Showo2Config):
        super().__init__()
        self.config = config
        hidden, clip = config.hidden_size, config.clip_latent_dim
        head = HeadConfig(**config.head)
        self.showo = language_model("Qwen2", dict(config.llm))
        self.image_embedder_und = PatchEmbed(config.patch_size, config.image_latent_dim, clip)
        self.image_embedder_gen = PatchEmbed(config.patch_size, config.image_latent_dim, hidden)
        self.position_embedding = nn.Embedding(config.position_rows, clip)
        self.und_trans = siglip_encoder(dict(config.vision))
        grid = config.image_latent_height * config.image_latent_width
        self.register_buffer("image_position_ids", torch.arange(grid).expand((1, -1)), persistent=False)
        self.fusion_proj = nn.Sequential(
            RMSNorm(clip + hidden), nn.Linear(clip + hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.time_embed = TimestepEmbedder(head.hidden_size)
        if hidden != head.hidden_size:
            width = head.hidden_size
            self.diff_proj = nn.Sequential(nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, width))
            self.time_embed_proj = nn.Linear(width, hidden)
        self.diffusion_head_a = nn.ModuleList(ModulatedAttentionBlock(head) for _ in range(head.num_layers))
        self.diffusion_head_b = FinalLayer(head.hidden_size, config.patch_size, config.image_latent_dim)
        self._initialise()
        self.register_load_state_dict_pre_hook(partial(fill_tied_head, language_model="showo"))

    def _initialise(self) -> None:
        """Upstream's initialisation: zero modulation and output layers, small time embedding."""
        for embedder in (self.image_embedder_und, self.image_embedder_gen):
            nn.init.xavier_uniform_(embedder.proj.weight.flatten(1))
            nn.init.zeros_(embedder.proj.bias)
        for index in (0, 2):
            nn.init.normal_(self.time_embed.mlp[index].weight, std=0.02)
        silent: list[Any] = [self.diffusion_head_b.linear, self.diffusion_head_b.adaLN_modulation[1]]
        silent += [block.adaLN_modulation[1] for block in self.diffusion_head_a]
        for linear in silent:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    # ---- differentiable parts, which training and calibration compose

    def embed_image(self, latents: Tensor) -> Tensor:
        """Latents [B, channels, H, W] -> image embeddings [B, patches, hidden]: semantic and low-level paths, fused."""
        return adapter(self).embed_image(latents)

    def embed_sequence(
        self, text_tokens: Tensor, image_latents: Tensor, t: Tensor, modality_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Token embeddings with the image span inserted: ([rows, length, hidden], time embedding [rows, head width])."""
        embeds = self.showo.model.embed_tokens(text_tokens)
        own = adapter(self)
        time = own.embed_time(t)
        span = own.with_time(own.embed_image(image_latents.to(embeds.dtype)), own.time_token(time))
        rows = torch.arange(text_tokens.shape[0], device=text_tokens.device)[:, None]
        columns = modality_positions[:, 0, :1] + torch.arange(span.shape[1], device=text_tokens.device)
        return embeds.index_put((rows, columns), span), time

    def backbone(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """The language model: embeds [rows, length, hidden], mask additive [rows, 1, length, length] -> final hidden states."""
        return self.showo.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state

    def velocity(
        self, hidden: Tensor, time: Tensor, mask: Tensor, modality_positions: Tensor, shape: torch.Size
    ) -> Tensor:
        """The diffusion head: hidden [rows, length, hidden], time [rows, width] -> velocity of `shape` [rows, channels, H, W]."""
        if hasattr(self, "diff_proj"):
            hidden = self.diff_proj(hidden)
        position = torch.arange(hidden.shape[1], device=hidden.device)
        start, length = modality_positions[:, 0, :1], int(modality_positions[0, 0, 1])
        inside = ((position >= start) & (position < start + length))[..., None]
        for block in self.diffusion_head_a:
            hidden = block(hidden, time, mask, position[None], inside)
        first = 1 if self.config.add_time_embeds else 0
        columns = start + torch.arange(first, length, device=hidden.device)
        span = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[2]))
        return unpatchify(self.diffusion_head_b(span, time), shape)

    def omni_mask(self, modality_positions: Tensor, length: int) -> Tensor:
        """Additive attention mask [rows, 1, length, length]: causal, but bidirectional within image spans."""
        dtype = self.showo.model.embed_tokens.weight.dtype
        return additive(omni_allowed(modality_positions, length)[:, None], dtype)

    # ---- upstream's entry points

    def forward(
        self,
        text_tokens: Tensor,
        image_latents: Tensor | None = None,
        t: Tensor | None = None,
        attention_mask: Tensor | None = None,
        modality_positions: Tensor | None = None,
        text_labels: Tensor | None = None,
        image_labels: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """One pass over a sequence.

        Args:
            text_tokens: int64 [rows, length].
            image_latents: [rows, channels, H, W].
            t: [rows].
            attention_mask: additive [rows, 1, length, length]; None builds the omni mask.
            modality_positions: int64 [rows, 1, 2].
            text_labels: int64 [rows, length], -100 ignored.
            image_labels: velocity to learn [rows, channels, H, W].

        Returns:
            Without an image the language model's output; without labels (logits, velocity); with labels logits followed by
            the next-token loss, the flow loss, or both.
        """
        if image_latents is None:
            return self.showo(input_ids=text_tokens, attention_mask=attention_mask)
        if t is None or modality_positions is None:
            raise ValueError("t, modality_positions: expected tensors with image_latents, got None")
        validate.check_t2i_inputs(self, image_latents, t, text_tokens, modality_positions, False)
        mask = self.omni_mask(modality_positions, text_tokens.shape[1]) if attention_mask is None else attention_mask
        embeds, time = self.embed_sequence(text_tokens, image_latents, t, modality_positions)
        hidden = self.backbone(embeds, mask)
        logits = self.showo.lm_head(hidden)
        losses = []
        if text_labels is not None:
            losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), text_labels[:, 1:].flatten()))
        if text_labels is not None and image_labels is None:
            return logits, *losses
        velocity = self.velocity(hidden, time, mask, modality_positions, image_latents.shape)
        if image_labels is None:
            return logits, velocity
        return logits, *losses, F.mse_loss(velocity.float(), image_labels.float())

    @torch.no_grad()
    def t2i_generate(
        self,
        image_latents: Tensor,
        t: Tensor,
        text_tokens: Tensor,
        attention_mask: Tensor | None = None,
        modality_positions: Tensor | None = None,
        max_seq_len: int | None = None,
        guidance_scale: float | Sequence[float] | Tensor = 0.0,
        **_: Any,
    ) -> Tensor:
        """One ODE evaluation as upstream's: velocity [rows, channels, H, W]; under guidance both halves are equal."""
        scale = guidance_scale_of(guidance_scale, image_latents.shape[0] // 2)
        if modality_positions is None:
            raise ValueError("modality_positions: expected a tensor, got None")
        validate.check_t2i_inputs(self, image_latents, t, text_tokens, modality_positions, guided(scale))
        _, velocity = self(text_tokens, image_latents, t, attention_mask, modality_positions)
        if not guided(scale):
            return velocity
        velocity = guide(velocity, scale)
        return torch.cat([velocity, velocity])

    @torch.no_grad()
    def mmu_generate(
        self,
        input_embeds: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        eos_token: int | None = None,
    ) -> list[Tensor]:
        """Continue a prompt as upstream does: the whole sequence again for every token, no cache.

        Args:
            input_embeds: [1, length, hidden].
            attention_mask: additive [1, 1, length, length], 0 where a row may attend to a column.
        """
        validate.check_mmu_inputs(self, input_embeds, attention_mask, max_new_tokens, temperature, top_k)
        length = input_embeds.shape[1]
        embeds = input_embeds.to(self.showo.model.embed_tokens.weight.dtype)
        allowed = (attention_mask == 0).reshape(length, length)
        sampler = TokenSampler(temperature, top_k)
        return decode_dense(self, embeds, allowed, max_new_tokens, sampler, eos_token)

    # ---- files

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Showo2:
        """Load a checkpoint directory, upstream's or ours; see `checkpoint.load`."""
        return checkpoint.load(directory, cls, dtype)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors; see `checkpoint.save`."""
        checkpoint.save(self, directory)
