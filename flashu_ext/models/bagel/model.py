"""The model under upstream's parameter names: what a context is made of, and the parts of a drawing step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..embedding import TimestepEmbedder, sinusoids
from ..llm import fill_tied_head, siglip_encoder
from . import checkpoint
from .config import BagelConfig
from .layers import Context, Experts, LanguageModel

__all__ = ["Bagel", "Image", "Text", "TokenIds"]


@dataclass(frozen=True)
class TokenIds:
    """Of the markers around texts and images."""

    bos_token_id: int
    eos_token_id: int
    start_of_image: int
    end_of_image: int


@dataclass(frozen=True)
class Text:
    """A text of a sequence: token ids int64 [n], without markers."""

    ids: Tensor


@dataclass(frozen=True)
class Image:
    """An image of a sequence, as latents, as the image encoder's tokens, or (to be edited) both.

    Attributes:
        latents: [1, channels, H, W].
        vit_tokens: [n, numbers of a patch].
        vit_position_ids: int64 [n].
    """

    latents: Tensor | None = None
    vit_tokens: Tensor | None = None
    vit_position_ids: Tensor | None = None


class PositionTable(nn.Module):
    """Fixed sines [side * side, width], rows of the grid one after another: the first half of the numbers is the column's."""

    def __init__(self, side: int, width: int):
        super().__init__()
        places = torch.arange(side, dtype=torch.float32)
        half = sinusoids(places, width // 2)
        cosines, sines = half.chunk(2, dim=-1)
        of = torch.cat([sines, cosines], dim=-1)
        table = torch.cat([of.repeat(side, 1), of.repeat_interleave(side, dim=0)], dim=-1)
        self.pos_embed = nn.Parameter(table, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.pos_embed[ids]


class Connector(nn.Module):
    """Features of the image encoder [n, vit] -> [n, hidden]."""

    def __init__(self, config: BagelConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.vit, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Embeddings(nn.Module):
    def __init__(self, config: BagelConfig):
        super().__init__()
        self.patch_embedding = nn.Linear(3 * config.vit_patch**2, config.vit)
        self.position_embedding = nn.Embedding(config.vit_side**2, config.vit)


class VisionTransformer(nn.Module):
    """Patches [n, row x column x channel] and their places -> features [n, vit]."""

    encoder: Any

    def __init__(self, config: BagelConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = siglip_encoder(
            {
                "hidden_size": config.vit,
                "intermediate_size": config.vit_inter,
                "num_hidden_layers": config.vit_layers_kept,
                "num_attention_heads": config.vit_heads,
                "layer_norm_eps": config.vit_eps,
            }
        )
        self.post_layernorm = nn.LayerNorm(config.vit, config.vit_eps)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        x = self.embeddings.patch_embedding(tokens) + self.embeddings.position_embedding(places)
        return self.post_layernorm(self.encoder(inputs_embeds=x[None]).last_hidden_state[0])


class VisionModel(nn.Module):
    def __init__(self, config: BagelConfig):
        super().__init__()
        self.vision_model = VisionTransformer(config)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        return self.vision_model(tokens, places)


class Bagel(nn.Module):
    """BAGEL as published: one Qwen2 with two experts a layer that answers, draws and edits.

    Dense: every method computes what upstream's computes.
    """

    def __init__(self, config: BagelConfig):
        super().__init__()
        self.config = config
        self.language_model = LanguageModel(config)
        self.time_embedder = TimestepEmbedder(config.hidden)
        self.vae2llm = nn.Linear(config.patch_width, config.hidden)
        self.llm2vae = nn.Linear(config.hidden, config.patch_width)
        self.latent_pos_embed = PositionTable(config.latent_side, config.hidden)
        self.vit_model = VisionModel(config)
        self.connector = Connector(config)
        self.vit_pos_embed = PositionTable(config.vit_side, config.hidden)
        self.register_load_state_dict_pre_hook(partial(fill_tied_head, language_model="language_model"))

    # ---- tokens

    def packed(self, latents: Tensor) -> Tensor:
        """Latents [1, channels, H, W] -> tokens [n, row in patch x column in patch x channel]."""
        patch = self.config.latent_patch
        _, channels, height, width = latents.shape
        rows = latents[0].reshape(channels, height // patch, patch, width // patch, patch)
        return rows.permute(1, 3, 2, 4, 0).reshape(-1, self.config.patch_width)

    def unpacked(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """The inverse of `packed` for an image of (height, width) pixels: [1, channels, H, W]."""
        patch, (rows, columns) = self.config.latent_patch, self.grid(size)
        grid = tokens.reshape(rows, columns, patch, patch, self.config.latent_channels)
        return grid.permute(4, 0, 2, 1, 3).reshape(1, self.config.latent_channels, rows * patch, columns * patch)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Latent tokens (rows, columns) of an image of (height, width) pixels."""
        height, width = (length // self.config.token_pixels for length in size)
        return height, width

    def latent_places(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """int64 [n]: indices into the table of all places, whatever the grid."""
        rows, columns = (torch.arange(count, device=device) for count in grid)
        return (rows[:, None] * self.config.latent_side + columns).flatten()

    def embed_latents(self, tokens: Tensor, t: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latent tokens [n, numbers] at a time fp32 [1] in [0, 1] -> [n, hidden]."""
        time = self.time_embedder(t, self.vae2llm.weight.dtype)
        places = self.latent_pos_embed(self.latent_places(grid, tokens.device))
        return self.vae2llm(tokens.to(time.dtype)) + time + places.to(time.dtype)

    def embed_image(self, tokens: Tensor, places: Tensor) -> Tensor:
        """The image encoder's tokens [n, numbers] at places int64 [n] -> [n, hidden]."""
        features = self.connector(self.vit_model(tokens.to(self.vae2llm.weight.dtype), places))
        return features + self.vit_pos_embed(places).to(features.dtype)

    def between(self, ids: TokenIds, image: Tensor) -> Tensor:
        """An image's tokens [n, hidden] between its markers: [n + 2, hidden]."""
        markers = torch.tensor([ids.start_of_image, ids.end_of_image], device=image.device)
        start, end = self.language_model.model.embed_tokens(markers).split(1)
        return torch.cat([start, image, end])

    # ---- contexts

    def append(self, context: Context, item: Text | Image, ids: TokenIds) -> Context:
        """A context with a text or an image behind it."""
        run = self.language_model.model
        if isinstance(item, Text):
            markers = item.ids.new_tensor([ids.bos_token_id, ids.eos_token_id]).split(1)
            text = run.embed_tokens(torch.cat([markers[0], item.ids, markers[1]]))
            return run(text, Experts(), context, causal=True, step=1)[1]
        if item.latents is not None:
            _, _, height, width = item.latents.shape
            grid = height // self.config.latent_patch, width // self.config.latent_patch
            time = torch.zeros(1, device=item.latents.device)
            block = self.between(ids, self.embed_latents(self.packed(item.latents), time, grid))
            context = run(block, Experts(1, len(block) - 1), context, causal=False, step=0)[1]
        if item.vit_tokens is not None:
            assert item.vit_position_ids is not None, "sampling.check_inputs has looked"
            block = self.between(ids, self.embed_image(item.vit_tokens, item.vit_position_ids))
            context = run(block, Experts(), context, causal=False, step=0)[1]
        return context

    def context(self, items: Sequence[Text | Image], ids: TokenIds) -> Context:
        context = Context()
        for item in items:
            context = self.append(context, item, ids)
        return context

    # ---- drawing

    def hidden(self, tokens: Tensor, t: Tensor, grid: tuple[int, int], context: Context, ids: TokenIds) -> Tensor:
        """The last layer's output [n, hidden] for latent tokens [n, numbers] at a time fp32 [1], after a context."""
        block = self.between(ids, self.embed_latents(tokens, t, grid))
        out, _ = self.language_model.model(block, Experts(1, len(block) - 1), context, causal=False, step=0)
        return out[1:-1]

    def velocity(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> fp32 [n, numbers], from data to noise."""
        return self.llm2vae(self.language_model.model.norm_moe_gen(hidden)).float()

    # ---- files

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Bagel:
        """Load a checkpoint directory, upstream's or ours; see `checkpoint.load`."""
        return checkpoint.load(directory, cls, dtype)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors; see `checkpoint.save`."""
        checkpoint.save(self, directory)


def without_latents(image: Image) -> Image:
    """An image as a question reads it."""
    return replace(image, latents=None)
