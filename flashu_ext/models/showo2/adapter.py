"""Show-o2 as the runtime sees it: ours, or upstream's `Showo2Qwen2_5`, by attribute names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...planning.cost import EncoderShape, ModelShape
from ...planning.decoders import check_parts, find
from .. import known
from ..adapter import BLOCK_PARTS, Adapter, AttentionShape, Kit, Question, Sizes, out_features
from ..calibration import DensePass, Noise, Sample
from ..masks import omni_allowed
from ..sampling import DrawInputs, Stepper
from ..shapes import layer_shape, linear_flops
from . import calibration
from .positions import stored_table, table_side

__all__ = ["Showo2Adapter", "adapter"]

_REQUIRED = (
    "showo.model.embed_tokens.weight",
    "showo.model.layers.0",
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
    "diffusion_head_a.0",
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

_QWEN2 = ("transformers.models.qwen2.modeling_qwen2", "models.qwen2")
_HEAD = ("flashu_ext.models.showo2.head", "models.modules")
_MODELS = {"Showo2": ("flashu_ext.models.showo2.model",), "Showo2Qwen2_5": ("models.modeling_showo2_qwen2_5",)}
_LANGUAGE_MODELS = {"Qwen2ForCausalLM": _QWEN2, "Qwen2Model": _QWEN2}
_LAYERS = {"Qwen2DecoderLayer": _QWEN2, "ModulatedAttentionBlock": _HEAD, "DecoderLayer": _HEAD}
_FINAL = {"FinalLayer": _HEAD}
_ROPES = {"RotaryEmbedding": _HEAD}

FINAL_PARTS = 2
"""Shift and scale of the final layer."""


@dataclass(frozen=True, kw_only=True)
class Showo2Adapter(Adapter):
    """Dual-path image embeddings, one bidirectional span, a head of modulated attention blocks."""

    family: ClassVar[str] = "showo2"
    samples: ClassVar[tuple[type[Sample], ...]] = (calibration.GenerationSample, calibration.UnderstandingSample)
    methods: ClassVar[tuple[str, ...]] = ("t2i_generate", "mmu_generate")
    evaluates: ClassVar[str | None] = "t2i_generate"

    patch_und: Any
    patch_gen: Any
    position_embedding: Any
    vision: Any
    fusion: Any
    time_embed: Any
    time_proj: Any
    diff_proj: Any
    final_layer: Any
    modulations: tuple[Any, ...]
    """The adaLN projections of every block, and of the final layer."""
    head_norm: Any
    head_out: Any

    @property
    def lead(self) -> int:
        """The time token."""
        return 1 if self.model.config.add_time_embeds else 0

    @property
    def patch_size(self) -> int:
        return int(self.model.config.patch_size)

    @property
    def latent_channels(self) -> int:
        return int(self.model.image_embedder_gen.proj.weight.shape[1])

    @property
    def latent_size(self) -> tuple[int, int]:
        config = self.model.config
        return config.image_latent_height * self.patch_size, config.image_latent_width * self.patch_size

    def on(self, kit: Kit) -> Showo2Adapter:
        def maybe(make: Callable[[Any], Any], module: Any) -> Any:
            return None if module is None else make(module)

        return replace(
            self,
            lm_head=kit.linear(self.lm_head),
            patch_und=kit.patches(self.patch_und),
            patch_gen=kit.patches(self.patch_gen),
            vision=kit.vision(self.vision),
            fusion=kit.chain(self.fusion),
            time_embed=kit.time(self.time_embed),
            time_proj=maybe(kit.linear, self.time_proj),
            diff_proj=maybe(kit.chain, self.diff_proj),
            modulations=tuple(map(kit.chain, self.modulations)),
            head_norm=kit.norm(self.head_norm),
            head_out=kit.linear(self.head_out),
        )

    def dense(self, inputs: DrawInputs) -> Stepper:
        from .sampling import DenseStepper, SampleInputs

        assert isinstance(inputs, SampleInputs)
        return DenseStepper(self.model, inputs)

    # ---- drawing

    def grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """Patches of latents (H, W), (rows, columns)."""
        height, width = latent_size
        return height // self.patch_size, width // self.patch_size

    def sizes(self, latent_size: tuple[int, int]) -> Sizes:
        rows, columns = self.grid(latent_size)
        width = int(self.blocks[0].input_layernorm.weight.shape[0])
        return Sizes(
            patches=rows * columns,
            velocity=(rows * columns, self.patch_size**2 * self.latent_channels),
            modulation=(BLOCK_PARTS * len(self.blocks) + FINAL_PARTS) * width,
            features=int(self.position_embedding.weight.shape[1]),
            cached=width,
            signal=self.hidden,
        )

    def embed_time(self, t: Tensor) -> Tensor:
        return self.time_embed(t, self.dtype)

    def time_token(self, time: Tensor) -> Tensor:
        return time if self.time_proj is None else self.time_proj(time)

    def modulation(self, time: Tensor) -> Tensor:
        # One product per block for all times of an image, so weights are read once per image, not once per evaluation.
        return torch.cat([project(time) for project in self.modulations], dim=1)

    def place(self, latent_size: tuple[int, int]) -> Tensor:
        """SigLIP's position embeddings for a grid: [1, patches, clip].

        The stored table where it fits, else resampled bicubically (upstream's `interpolate_pos_encoding`). Upstream resamples
        only in models whose own grid does not fit the table. Resampling in the others too gives what a model built for this
        grid gives: one checkpoint draws several sizes, whatever grid its config names (Show-o pull request 104).

        Raises:
            ValueError: the table has no square grid, and this is not the model's own.
        """
        height, width = self.grid(latent_size)
        table = self.position_embedding.weight
        if stored_table(self.model, height * width):
            return table[None]
        side = table_side(self.model)
        if side is None:
            raise ValueError(
                f"image_latents: expected a grid of {table.shape[0]} patches, as the model was built for, got {height} x {width}"
            )
        grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return grid.permute(0, 2, 3, 1).reshape(1, height * width, -1)

    def features(self, latents: Tensor, place: Tensor) -> Tensor:
        """The SigLIP path."""
        return self.vision(self.patch_und(latents.to(self.dtype)) + place)["last_hidden_state"]

    def span(self, latents: Tensor, features: Tensor | None, early: Tensor | None, token: Tensor) -> Tensor:
        return self.with_time(self.fused(latents, features), token)

    def fused(self, latents: Tensor, features: Tensor | None) -> Tensor:
        """Both paths: [images, patches, hidden]."""
        assert features is not None
        return self.fusion(torch.cat([features, self.patch_gen(latents.to(self.dtype))], dim=-1))

    def with_time(self, image: Tensor, token: Tensor) -> Tensor:
        """An image's span: [rows, patches, hidden] after token [rows, hidden] in models with a time token."""
        return torch.cat([token[:, None], image], dim=1) if self.lead else image

    def signal(self, latents: Tensor, token: Tensor) -> Tensor:
        """Low-level patch embeddings plus the time token: one convolution, whose change between steps estimates the change of
        the network's output.

        Source: the idea of TeaCache (arXiv 2411.19108), which watches a time-modulated input; here it is taken before encoder
        and language model, because a cached step skips both.
        """
        return (self.patch_gen(latents.to(self.dtype)) + token[:, None]).contiguous()

    def head_input(self, hidden: Tensor) -> Tensor:
        # The blocks overwrite their input. Without a projection that is `hidden`, which is not read again.
        return hidden if self.diff_proj is None else self.diff_proj(hidden)

    def velocity(self, x: Tensor, modulation: Tensor, early: Tensor | None) -> Tensor:
        """Source: Show-o2 `FinalLayer`."""
        x = x[:, self.lead :]
        shift, scale = modulation[:, -FINAL_PARTS * x.shape[-1] :].chunk(FINAL_PARTS, dim=1)
        return self.head_out(self.head_norm(x, shift, scale))

    # ---- answering

    def embed_image(self, image: Tensor) -> Tensor:
        """Latents [images, channels, H, W] -> [images, patches, hidden]."""
        height, width = image.shape[2:]
        return self.fused(image, self.features(image, self.place((height, width))))

    def question(self, images: Sequence[Tensor], before: Tensor, after: Tensor) -> Question:
        """See `understanding.prompt_embeds`."""
        start, rest = self.embed_tokens(before), self.embed_tokens(after)
        token = self.time_token(self.embed_time(torch.ones(1, dtype=torch.float32, device=start.device)))
        late = self.lead
        pieces, spans, length = [start], [], before.shape[1]
        for image in images:
            pieces += [rest[:, :1], self.with_time(image, token), rest[:, 1:2]]
            spans.append((length + 1 + late, image.shape[1] + late))
            length += 1 + late + image.shape[1] + 1
        embeds = torch.cat([*pieces, rest[:, 2:]], dim=1)
        allowed = omni_allowed(torch.tensor([spans], device=embeds.device), embeds.shape[1])[0]
        return Question(embeds, allowed, tuple((start, count - late) for start, count in spans))

    # ---- calibration

    def passes(self, sample: Any, times: Sequence[float], noise: Noise) -> Iterator[DensePass]:
        return calibration.passes(self, sample, times, noise)

    # ---- what is known

    def shape(self) -> ModelShape:
        llm, head = self.llm_attention, self.head_attention
        config = getattr(self.vision, "config", None)
        patch_embedding = 2.0 * self.patch_gen.proj.weight.numel()
        return ModelShape(
            layers=tuple(layer_shape(layer, llm) for layer in self.layers),
            blocks=tuple(layer_shape(block, head, linear_flops(block.adaLN_modulation)) for block in self.blocks),
            encoder=EncoderShape(
                linear=linear_flops(self.vision) + linear_flops(self.fusion) + 2 * patch_embedding,
                layers=int(getattr(config, "num_hidden_layers", 0)),
                width=int(self.position_embedding.weight.shape[1]),
                heads=int(getattr(config, "num_attention_heads", 1)),
            ),
            head_input=0.0 if self.diff_proj is None else linear_flops(self.diff_proj),
            final=linear_flops(self.final_layer.linear),
            final_modulation=linear_flops(self.final_layer.adaLN_modulation),
            lm_head=linear_flops(self.lm_head),
            time_token=bool(self.lead),
        )

    def refused(self) -> Iterator[tuple[str, str]]:
        model, like = self.model, self.embed_tokens.weight
        layers = [(f".showo.model.layers.{i}", layer, self.llm_attention) for i, layer in enumerate(self.layers)]
        layers += [(f".diffusion_head_a.{i}", block, self.head_attention) for i, block in enumerate(self.blocks)]
        ropes = [block.self_attn.rotary_emb for block in self.blocks]
        named: list[tuple[str, Any, known.Known]] = [
            (".showo", model.showo, _LANGUAGE_MODELS),
            (".showo.model", model.showo.model, _LANGUAGE_MODELS),
            (".position_embedding", self.position_embedding, known.EMBEDDING),
            (".diffusion_head_b", self.final_layer, _FINAL),
            *((path, layer, _LAYERS) for path, layer, _ in layers),
            *((f".diffusion_head_a.{i}.self_attn.rotary_emb", rope, _ROPES) for i, rope in enumerate(ropes)),
        ]
        yield from known.refused_model(model, _MODELS, self.methods)
        yield from known.refused_decoder(".showo", model.showo, self.llm_rope, len(self.layers))
        for path, module, classes in named:
            if reason := known.why_replaced(module, classes):
                yield path, reason
        for path, layer, shape in layers:
            yield from known.refused_layer(path, layer, shape, like)
        for index, rope in enumerate(ropes[1:], 1):
            # One rotary table serves all blocks.
            if not torch.equal(rope.inv_freq, ropes[0].inv_freq):
                yield (
                    f".diffusion_head_a.{index}.self_attn.rotary_emb",
                    "its frequencies are not those of the first block",
                )


def adapter(model: Any) -> Showo2Adapter:
    """Look the parts up.

    Raises:
        TypeError: some are missing; the message lists them.
    """
    check_parts(model, "Show-o2", _required(model))
    llm, config = model.showo.model, model.showo.config
    hidden, heads = llm.embed_tokens.weight.shape[1], config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    blocks, final = model.diffusion_head_a, model.diffusion_head_b
    head = blocks[0].self_attn
    return Showo2Adapter(
        model=model,
        embed_tokens=llm.embed_tokens,
        layers=llm.layers,
        final_norm=llm.norm,
        llm_rope=llm.rotary_emb,
        lm_head=model.showo.lm_head,
        llm_attention=AttentionShape(heads, kv_heads, getattr(config, "head_dim", None) or hidden // heads),
        blocks=blocks,
        head_attention=AttentionShape(
            out_features(head.q_proj) // head.head_dim, out_features(head.k_proj) // head.head_dim, head.head_dim
        ),
        patch_und=model.image_embedder_und,
        patch_gen=model.image_embedder_gen,
        position_embedding=model.position_embedding,
        vision=model.und_trans,
        fusion=model.fusion_proj,
        time_embed=model.time_embed,
        time_proj=getattr(model, "time_embed_proj", None),
        diff_proj=getattr(model, "diff_proj", None),
        final_layer=final,
        modulations=tuple(each.adaLN_modulation for each in (*blocks, final)),
        head_norm=final.norm_final,
        head_out=final.linear,
    )


def _required(model: Any) -> Iterator[str]:
    yield from _REQUIRED
    for stack, paths in (("showo.model.layers", (*_LAYER, *_FFN)), ("diffusion_head_a", _BLOCK)):
        for i in range(len(find(model, stack) or ())):
            yield from (f"{stack}.{i}.{path}" for path in paths)
