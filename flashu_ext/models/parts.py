"""Finds the parts of a Show-o2 model, ours or upstream's, by attribute names and shapes, importing neither.

The runtime reads a model only through `Showo2Parts`, so differences between model versions are handled here alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..planning.cost import EncoderShape, LayerShape, ModelShape

__all__ = ["Showo2Parts", "layer_shapes", "model_shape"]

_REQUIRED = (
    "showo.model.embed_tokens",
    "showo.model.layers",
    "showo.model.norm",
    "showo.model.rotary_emb",
    "showo.lm_head",
    "image_embedder_und",
    "image_embedder_gen",
    "position_embedding",
    "image_position_ids",
    "und_trans",
    "fusion_proj",
    "time_embed",
    "diffusion_head_a",
    "diffusion_head_b.norm_final",
    "diffusion_head_b.linear",
    "diffusion_head_b.adaLN_modulation",
    "config.patch_size",
    "t2i_generate",
    "mmu_generate",
)
_LAYER = ("input_layernorm", "post_attention_layernorm", *(f"self_attn.{n}_proj" for n in "qkvo"))
_FFN = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_BLOCK = (*_LAYER, *_FFN, "adaLN_modulation", "self_attn.rotary_emb")


def _get(root: Any, path: str) -> Any:
    for name in path.split("."):
        if not hasattr(root, name):
            return None
        root = getattr(root, name)
    return root


@dataclass(frozen=True)
class AttentionShape:
    """Heads of one attention: `heads` queries and `kv_heads` keys and values of `head_dim` each."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Showo2Parts:
    """A Show-o2 model's parts. Modules are the model's own objects; nothing is copied."""

    model: Any
    embed_tokens: Any
    layers: Any
    final_norm: Any
    llm_rope: Any
    lm_head: Any
    llm_attention: AttentionShape
    patch_und: Any
    patch_gen: Any
    position_embedding: Any
    vision: Any
    fusion: Any
    time_embed: Any
    time_proj: Any
    diff_proj: Any
    blocks: Any
    head_attention: AttentionShape
    final_layer: Any
    patch_size: int
    latent_channels: int
    has_time_token: bool

    @classmethod
    def from_model(cls, model: Any) -> Showo2Parts:
        """Look the parts up.

        Raises:
            TypeError: the object is not a Show-o2 model; the message lists what is missing.
        """
        missing = [path for path in _REQUIRED if _get(model, path) is None]
        if not missing:
            for i, layer in enumerate(model.showo.model.layers):
                missing += [f"showo.model.layers.{i}.{path}" for path in (*_LAYER, *_FFN) if _get(layer, path) is None]
            for i, block in enumerate(model.diffusion_head_a):
                missing += [f"diffusion_head_a.{i}.{path}" for path in _BLOCK if _get(block, path) is None]
        if missing:
            hint = "; pass its .model" if _get(model, "model.showo") is not None else ""
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise TypeError(
                f"model: expected a Show-o2 model (Showo2 or Showo2Qwen2_5), got {type(model).__name__} without "
                f"{', '.join(missing[:4])}{more}{hint}"
            )
        llm = model.showo.model
        blocks: Any = model.diffusion_head_a
        for name, stack in (("showo.model.layers", llm.layers), ("diffusion_head_a", blocks)):
            if len(stack) == 0:
                raise TypeError(f"model.{name}: expected at least one layer, got none")
        llm_config = model.showo.config
        hidden = llm.embed_tokens.weight.shape[1]
        heads = llm_config.num_attention_heads
        kv_heads = getattr(llm_config, "num_key_value_heads", None) or heads
        head_dim = getattr(llm_config, "head_dim", None) or hidden // heads
        head_first = blocks[0].self_attn
        patch_gen: Any = model.image_embedder_gen
        return cls(
            model=model,
            embed_tokens=llm.embed_tokens,
            layers=llm.layers,
            final_norm=llm.norm,
            llm_rope=llm.rotary_emb,
            lm_head=model.showo.lm_head,
            llm_attention=AttentionShape(heads, kv_heads, head_dim),
            patch_und=model.image_embedder_und,
            patch_gen=patch_gen,
            position_embedding=model.position_embedding,
            vision=model.und_trans,
            fusion=model.fusion_proj,
            time_embed=model.time_embed,
            time_proj=getattr(model, "time_embed_proj", None),
            diff_proj=getattr(model, "diff_proj", None),
            blocks=blocks,
            head_attention=_attention_shape(head_first, head_first.head_dim),
            final_layer=model.diffusion_head_b,
            patch_size=int(model.config.patch_size),
            latent_channels=int(patch_gen.proj.in_channels),
            has_time_token=bool(model.config.add_time_embeds),
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def hidden(self) -> int:
        return int(self.embed_tokens.weight.shape[1])


def _attention_shape(attention: Any, head_dim: int) -> AttentionShape:
    return AttentionShape(
        out_features(attention.q_proj) // head_dim, out_features(attention.k_proj) // head_dim, head_dim
    )


def out_features(projection: Any) -> int:
    """Of a linear layer, or of one that wraps it."""
    for owner in (projection, *projection.children()):
        if (width := getattr(owner, "out_features", None)) is not None:
            return int(width)
    raise TypeError(
        f"model: expected a linear layer, or one that wraps it, with out_features, got {type(projection).__name__}"
    )


def norm_eps(norm: nn.Module) -> float:
    """The epsilon of an RMSNorm, under either of its names."""
    for name in ("variance_epsilon", "eps"):
        value = getattr(norm, name, None)
        if value is not None:
            return float(value)
    raise TypeError(f"{type(norm).__name__}: expected variance_epsilon or eps")


def table_side(model: Any) -> int | None:
    """Side of the square position table that other grids than the model's own are resampled from.

    None where the table has no square grid: it then serves the model's own grid alone.
    """
    rows, config = int(model.position_embedding.weight.shape[0]), model.config
    side = math.isqrt(rows)
    own = (config.image_latent_height, config.image_latent_width)
    stored = rows != model.image_position_ids.shape[-1] or own == (side, side)
    return side if stored and side * side == rows else None


def stored_table(model: Any, patches: int) -> bool:
    """Whether a grid of so many patches takes the position table as it is: upstream compares the numbers alone."""
    return model.position_embedding.weight.shape[0] == model.image_position_ids.shape[-1] == patches


def position_table(parts: Showo2Parts, height: int, width: int) -> Tensor:
    """SigLIP's position embeddings for a grid of height x width patches: [1, height * width, clip].

    The stored table where it fits, else resampled bicubically (upstream's `interpolate_pos_encoding`). Upstream resamples only
    in models whose own grid does not fit the table. Resampling in the others too gives what a model built for this grid
    gives: one checkpoint draws several sizes, whatever grid its config names (Show-o pull request 104).

    Raises:
        ValueError: the table has no square grid, and this is not the model's own.
    """
    table = parts.position_embedding.weight
    if stored_table(parts.model, height * width):
        return table[None]
    side = table_side(parts.model)
    if side is None:
        raise ValueError(
            f"image_latents: expected a grid of {table.shape[0]} patches, as the model was built for, got {height} x {width}"
        )
    grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(1, height * width, -1)


def model_shape(parts: Showo2Parts) -> ModelShape:
    """The sizes that the cost model needs."""
    llm, head = parts.llm_attention, parts.head_attention
    config = getattr(parts.vision, "config", None)
    patch_embedding = 2.0 * parts.patch_gen.proj.weight.numel()
    return ModelShape(
        layers=tuple(_layer_shape(layer, llm) for layer in parts.layers),
        blocks=tuple(_layer_shape(block, head, _linear(block.adaLN_modulation)) for block in parts.blocks),
        encoder=EncoderShape(
            linear=_linear(parts.vision) + _linear(parts.fusion) + 2 * patch_embedding,
            layers=int(getattr(config, "num_hidden_layers", 0)),
            width=int(parts.position_embedding.weight.shape[1]),
        ),
        head_input=0.0 if parts.diff_proj is None else _linear(parts.diff_proj),
        final=_linear(parts.final_layer.linear),
        final_modulation=_linear(parts.final_layer.adaLN_modulation),
        lm_head=_linear(parts.lm_head),
        time_token=parts.has_time_token,
    )


def layer_shapes(parts: Showo2Parts) -> dict[tuple[str, str], LayerShape]:
    """Sizes of the transformer layers of every (task, phase) but the image encoder's."""
    llm, block = _layer_shape(parts.layers[0], parts.llm_attention), _layer_shape(parts.blocks[0], parts.head_attention)
    return {
        ("generation", "backbone"): llm,
        ("generation", "head"): block,
        ("generation", "measuring"): llm,
        ("understanding", "prefill"): llm,
        ("understanding", "decode"): llm,
    }


def _layer_shape(layer: Any, attention: AttentionShape, modulation: float = 0.0) -> LayerShape:
    key_value = _linear(layer.self_attn.k_proj) + _linear(layer.self_attn.v_proj)
    return LayerShape(
        key_value=key_value,
        attention=_linear(layer.self_attn) - key_value,
        ffn=_linear(layer.mlp),
        heads=attention.heads,
        head_dim=attention.head_dim,
        width=int(layer.input_layernorm.weight.shape[0]),
        key_value_width=attention.kv_heads * attention.head_dim,
        modulation=modulation,
    )


def _linear(module: nn.Module) -> float:
    """Operations per token of all linear layers inside."""
    return sum(2.0 * m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))
