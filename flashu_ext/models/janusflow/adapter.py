"""JanusFlow as the runtime sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...planning.cost import EncoderShape, ModelShape
from ...planning.decoders import check_parts
from .. import known
from ..adapter import Adapter, AttentionShape, Kit, Question, Sizes
from ..calibration import DensePass, Noise, Sample
from ..embedding import sinusoids
from ..masks import causal
from ..shapes import layer_shape, linear_flops
from ..velocity import patchify
from . import calibration
from .config import PATCH, JanusFlowConfig, config_of
from .model import JanusFlow
from .sampling import DEFAULT_STEPS

__all__ = ["JanusFlowAdapter", "adapter"]

_REQUIRED = (
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers.0",
    "language_model.lm_head",
    "vision_und_enc_model.vision_tower.patch_embed.proj",
    "vision_und_enc_model.vision_tower.blocks.0.attn",
    "vision_und_enc_aligner",
    "beg_of_und_embed",
    "vision_gen_enc_model.time_embed",
    "vision_gen_enc_aligner",
    "vision_gen_dec_aligner_norm",
    "vision_gen_dec_aligner",
    "vision_gen_dec_model.mid_block",
)
_LLAMA = ("transformers.models.llama.modeling_llama",)
_OWN, _THEIRS = "flashu_ext.models.janusflow", "janus.janusflow.models"
_MODELS = {"JanusFlow": (f"{_OWN}.model",), "MultiModalityCausalLM": (f"{_THEIRS}.modeling_vlm",)}
_ROPES = dict.fromkeys(("LlamaRotaryEmbedding", "LlamaLinearScalingRotaryEmbedding"), _LLAMA)
_LANGUAGE_MODELS = dict.fromkeys(("LlamaForCausalLM", "LlamaModel", "LlamaDecoderLayer"), _LLAMA)
_LATENTS = {
    **dict.fromkeys(
        ("LatentEncoder", "LatentDecoder", "LatentBlocks", "LatentBlock", "TimeEmbed", "Unpatch", "ResponseNorm"),
        (f"{_OWN}.latents",),
    ),
    **dict.fromkeys(
        ("ShallowUViTEncoder", "ShallowUViTDecoder", "UVitBlock", "ConvNextBlock", "Unpatchify", "GlobalResponseNorm"),
        (f"{_THEIRS}.uvit",),
    ),
    **dict.fromkeys(("Timesteps", "TimestepEmbedding"), ("diffusers.models.embeddings",)),
}
_VISION: known.Known = {
    **dict.fromkeys(("ImageEncoder", "VisionTower", "SelfAttention"), (f"{_OWN}.vision",)),
    "Block": (f"{_OWN}.vision", f"{_THEIRS}.siglip_vit"),
    "Mlp": (f"{_OWN}.vision", "timm.layers.mlp"),
    **dict.fromkeys(("VisionTransformer", "Attention"), (f"{_THEIRS}.siglip_vit",)),
    "CLIPVisionTower": (f"{_THEIRS}.clip_encoder",),
}


@dataclass(frozen=True)
class _Block:
    """A block of the latent encoder or decoder. Its convolution and response norm run as themselves, image by image: the bits of
    torch's depend on the number of images."""

    module: Any
    norm: Any
    up: Any
    down: Any

    @classmethod
    def on(cls, module: Any, kit: Kit) -> _Block:
        up, down = kit.linear(module.channelwise_linear_1), kit.linear(module.channelwise_linear_2)
        return cls(module, kit.norm(module.norm), up, down)

    def __call__(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [rows, H, W, width], modulation [rows, 2 * width] -> the shape of x."""
        convolve, respond = self.module.depthwise, self.module.channelwise_norm
        mixed = [convolve(each.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for each in x.contiguous().split(1)]
        raised = self.up(self.norm(torch.cat(mixed).flatten(1, 2)), epilogue="gelu").unflatten(1, x.shape[1:3])
        responded = torch.cat([respond(each) for each in raised.split(1)])
        x = self.down(responded, residual=x)
        scale, shift = modulation[:, None, None].chunk(2, dim=-1)
        return x * (1 + scale) + shift


@dataclass(frozen=True)
class _VisionBlock:
    module: Any
    qkv: Any
    proj: Any
    up: Any
    down: Any
    attention: Any
    heads: int

    @classmethod
    def on(cls, module: Any, kit: Kit, heads: int) -> _VisionBlock:
        attention, mlp = module.attn, module.mlp
        qkv, proj, up, down = map(kit.linear, (attention.qkv, attention.proj, mlp.fc1, mlp.fc2))
        return cls(module, qkv, proj, up, down, kit.attention, heads)

    def __call__(self, x: Tensor) -> Tensor:
        heads = self.heads
        projected = self.qkv(self.module.norm1(x)).chunk(3, dim=-1)
        attended = self.attention(*(each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in projected))
        x = self.proj(attended.flatten(2), residual=x)
        return self.down(self.up(self.module.norm2(x), epilogue="gelu"), residual=x)


@dataclass(frozen=True, kw_only=True)
class JanusFlowAdapter(Adapter):
    """Causal image tokens behind a time token; a latent encoder whose output the decoder reads too."""

    family: ClassVar[str] = "janusflow"
    samples: ClassVar[tuple[type[Sample], ...]] = (calibration.GenerationSample, calibration.UnderstandingSample)
    causal: ClassVar[bool] = True
    drops_unit_guidance: ClassVar[bool] = True
    grid_points: ClassVar[int] = DEFAULT_STEPS + 1

    config: JanusFlowConfig
    time_1: Any = None
    time_2: Any = None
    in_conv: Any = None
    encoder: tuple[_Block, ...] = ()
    decoder: tuple[_Block, ...] = ()
    mappers: tuple[Any, ...] = ()
    gen_aligner: Any = None
    out_norm: Any = None
    out_aligner: Any = None
    input_norm: Any = None
    unpatch_norm: Any = None
    unpatch: Any = None
    patch_embed: Any = None
    tower: tuple[_VisionBlock, ...] = ()
    und_aligner: Any = None

    @property
    def lead(self) -> int:
        return 1

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.config.latent_size, self.config.latent_size

    def on(self, kit: Kit) -> JanusFlowAdapter:
        model = self.model
        encoder, decoder = model.vision_gen_enc_model, model.vision_gen_dec_model
        tower = model.vision_und_enc_model.vision_tower
        blocks = [*encoder.mid_block.res_blocks, *decoder.mid_block.res_blocks]
        last = decoder.out_convs[0]
        return replace(
            self,
            lm_head=kit.linear(self.lm_head),
            time_1=kit.linear(encoder.time_embed.linear_1),
            time_2=kit.linear(encoder.time_embed.linear_2),
            in_conv=kit.patches(encoder.in_conv),
            encoder=tuple(_Block.on(each, kit) for each in encoder.mid_block.res_blocks),
            decoder=tuple(_Block.on(each, kit) for each in decoder.mid_block.res_blocks),
            mappers=tuple(kit.linear(each.cond_embeds_mapper) for each in blocks),
            gen_aligner=kit.linear(model.vision_gen_enc_aligner),
            out_norm=kit.norm(model.vision_gen_dec_aligner_norm),
            out_aligner=kit.linear(model.vision_gen_dec_aligner),
            input_norm=kit.norm(decoder.input_norm),
            unpatch_norm=kit.norm(last.norm),
            unpatch=kit.patches(last.unpatch_conv),
            patch_embed=kit.patches(tower.patch_embed),
            tower=tuple(
                _VisionBlock.on(each, kit, _heads_of(each.attn, self.config.vit_heads)) for each in tower.blocks
            ),
            und_aligner=kit.linear(model.vision_und_enc_aligner),
        )

    # ---- drawing

    def sizes(self, latent_size: tuple[int, int]) -> Sizes:
        config = self.config
        patches = latent_size[0] // PATCH * (latent_size[1] // PATCH)
        return Sizes(
            patches=patches,
            velocity=(patches, 4 * config.latent_channels),
            modulation=6 * config.blocks * config.channels,
            early=(patches, config.channels),
            cached=config.hidden,
            signal=config.channels,
        )

    def embed_time(self, t: Tensor) -> Tensor:
        waves = sinusoids(t, self.model.vision_gen_enc_model.time_embed.linear_1.in_features).to(self.dtype)
        return self.time_2(self.time_1(waves, epilogue="silu"))

    def time_token(self, time: Tensor) -> Tensor:
        return time

    def modulation(self, time: Tensor) -> Tensor:
        """Scale and shift of every block: the encoder's, then the decoder's, which are twice as wide."""
        active = torch.stack([F.silu(each) for each in time])
        return torch.cat([mapper(active) for mapper in self.mappers], dim=1)

    def _modulated(self, x: Tensor, blocks: tuple[_Block, ...], modulation: Tensor) -> Tensor:
        """x [rows, patches, width] through blocks, whose parts of the modulation are given."""
        side = math.isqrt(x.shape[1])
        x = x.unflatten(1, (side, side))
        for block, own in zip(blocks, modulation.chunk(len(blocks), dim=1), strict=True):
            x = block(x, own)
        return x.flatten(1, 2)

    def _parts(self, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's and the decoder's part."""
        config = self.config
        first = 2 * config.blocks * config.channels
        return modulation[:, :first], modulation[:, first:]

    def early(self, latents: Tensor, modulation: Tensor) -> Tensor:
        """The latent encoder's output, which the decoder reads beside the language model's."""
        return self._modulated(self.in_conv(latents.to(self.dtype)), self.encoder, self._parts(modulation)[0])

    def span(self, latents: Tensor, features: Tensor | None, early: Tensor | None, token: Tensor) -> Tensor:
        return torch.cat([token[:, None], self.gen_aligner(early)], dim=1)

    def signal(self, latents: Tensor, token: Tensor) -> Tensor:
        """The encoder's first convolution."""
        return self.in_conv(latents.to(self.dtype)).contiguous()

    def velocity(self, x: Tensor, modulation: Tensor, early: Tensor | None) -> Tensor:
        assert early is not None
        side = math.isqrt(x.shape[1])  # the time token is less than a row
        aligned = self.input_norm(self.out_aligner(self.out_norm(x[:, 1:].contiguous())))
        both = torch.cat([aligned, early], dim=-1)
        decoded = self.unpatch_norm(self._modulated(both, self.decoder, self._parts(modulation)[1]))
        pixels = self.unpatch(decoded.unflatten(1, (side, side)).permute(0, 3, 1, 2))
        image = F.pixel_shuffle(pixels.unflatten(1, (side, side)).permute(0, 3, 1, 2), 2)
        return patchify(image, 2)

    # ---- answering

    @property
    def question_tokens(self) -> int:
        return 1 + config_of(self.model).vit_tokens

    def embed_image(self, image: Tensor) -> Tensor:
        """Pixels [images, 3, side, side]."""
        tower = self.model.vision_und_enc_model.vision_tower
        image = image.to(self.dtype)
        normalize = getattr(self.model.vision_und_enc_model, "image_norm", None)
        x = self.patch_embed(image if normalize is None else normalize(image)) + tower.pos_embed
        for block in self.tower:
            x = block(x)
        first = self.model.beg_of_und_embed.expand(len(x), 1, -1).to(x.dtype)
        return torch.cat([first, self.und_aligner(tower.norm(x))], dim=1)

    def question(self, images: Sequence[Tensor], before: Tensor, after: Tensor) -> Question:
        start, rest = self.embed_tokens(before), self.embed_tokens(after)
        embeds = torch.cat([start, *images, rest], dim=1)
        spans, at = [], before.shape[1]
        for image in images:
            spans.append((at + 1, image.shape[1] - 1))  # the learned begin stays
            at += image.shape[1]
        return Question(embeds, causal(embeds.shape[1], embeds.device), tuple(spans))

    # ---- calibration

    def passes(self, sample: Any, times: Sequence[float], noise: Noise) -> Iterator[DensePass]:
        return calibration.passes(self, sample, times, noise)

    # ---- what is known

    def shape(self) -> ModelShape:
        model = self.model
        encoder = linear_flops(model.vision_gen_enc_model.mid_block) + linear_flops(model.vision_gen_enc_aligner)
        tower, config = model.vision_und_enc_model.vision_tower, config_of(model)
        asked = linear_flops(tower.blocks) + linear_flops(model.vision_und_enc_aligner)
        return ModelShape(
            layers=tuple(layer_shape(layer, self.llm_attention) for layer in self.layers),
            blocks=(),
            encoder=EncoderShape(linear=encoder, layers=0, width=self.config.channels),
            head_input=linear_flops(model.vision_gen_dec_aligner),
            final=linear_flops(model.vision_gen_dec_model.mid_block),
            final_modulation=0.0,
            lm_head=linear_flops(model.language_model.lm_head),
            time_token=True,
            asked=EncoderShape(asked, len(tower.blocks), config.vit, config.vit_heads),
        )

    def refused(self) -> Iterator[tuple[str, str]]:
        model, like = self.model, self.embed_tokens.weight
        yield from known.refused_model(model, _MODELS, self.own(""))
        yield from known.refused_decoder(".language_model", model.language_model, self.llm_rope, len(self.layers))
        for path, module, kinds in self._passed_over():
            if reason := known.why_replaced(module, kinds, self.own(path)):
                yield f".{path}", reason
        for index, block in enumerate(model.vision_und_enc_model.vision_tower.blocks):
            if known.epilogue_of(block.mlp.act) != "gelu":
                yield f".vision_und_enc_model.vision_tower.blocks.{index}.mlp.act", "is another activation"
        for index, layer in enumerate(self.layers):
            yield from known.refused_layer(f".language_model.model.layers.{index}", layer, self.llm_attention, like)

    def _passed_over(self) -> Iterator[tuple[str, Any, known.Known]]:
        """(path, module, its classes) of what the methods above compute from its parts."""
        model = self.model
        yield "language_model", model.language_model, _LANGUAGE_MODELS
        yield "language_model.model", model.language_model.model, _LANGUAGE_MODELS
        for i, layer in enumerate(self.layers):
            yield f"language_model.model.layers.{i}", layer, _LANGUAGE_MODELS
        for name in ("vision_gen_enc_model", "vision_gen_dec_model"):
            ends = getattr(model, name)
            yield name, ends, _LATENTS
            yield f"{name}.mid_block", ends.mid_block, _LATENTS
            for i, block in enumerate(ends.mid_block.res_blocks):
                yield f"{name}.mid_block.res_blocks.{i}", block, _LATENTS
                yield f"{name}.mid_block.res_blocks.{i}.channelwise_norm", block.channelwise_norm, _LATENTS
        yield "vision_gen_enc_model.time_embed", model.vision_gen_enc_model.time_embed, _LATENTS
        yield "vision_gen_dec_model.out_convs.0", model.vision_gen_dec_model.out_convs[0], _LATENTS
        tower = model.vision_und_enc_model.vision_tower
        yield "vision_und_enc_model", model.vision_und_enc_model, _VISION
        yield "vision_und_enc_model.vision_tower", tower, _VISION
        for i, block in enumerate(tower.blocks):
            for name, module in (("", block), (".attn", block.attn), (".mlp", block.mlp)):
                yield f"vision_und_enc_model.vision_tower.blocks.{i}{name}", module, _VISION


@dataclass(frozen=True, kw_only=True)
class UpstreamJanusFlowAdapter(JanusFlowAdapter):
    """Of upstream's class. It has no method that draws: its demo's loop calls the language model, which the runtime takes over,
    as its answers (`flashu_ext.upstream.janusflow`)."""

    methods: ClassVar[tuple[str, ...]] = ("language_model.model.forward", "language_model.generate")

    def refused(self) -> Iterator[tuple[str, str]]:
        yield from super().refused()
        ropes = [getattr(layer.self_attn, "rotary_emb", None) for layer in self.layers]
        for index, rope in enumerate(ropes):
            path = f".language_model.model.layers.{index}.self_attn.rotary_emb"
            if rope is not None and (reason := known.why_replaced(rope, _ROPES)):
                yield path, reason
            elif rope is not None and not torch.equal(rope.inv_freq, self.llm_rope.inv_freq):
                yield path, "has frequencies of its own"
        yield from self._refused_latents()
        yield from self._refused_vision()

    def _refused_latents(self) -> Iterator[tuple[str, str]]:
        encoder, decoder = self.model.vision_gen_enc_model, self.model.vision_gen_dec_model
        waves, embed = encoder.time_proj, encoder.time_embed
        if reason := known.why_replaced(waves, _LATENTS):
            yield ".vision_gen_enc_model.time_proj", reason
        elif not waves.flip_sin_to_cos or waves.downscale_freq_shift != 0 or getattr(waves, "scale", 1) != 1:
            yield ".vision_gen_enc_model.time_proj", "has other sinusoids"
        if known.epilogue_of(embed.act) != "silu" or embed.post_act is not None or embed.cond_proj is not None:
            yield ".vision_gen_enc_model.time_embed", "is more than two linear layers and SiLU"
        if len(decoder.out_convs) != 1 or decoder.out_convs[0].patch_size != PATCH:
            yield ".vision_gen_dec_model.out_convs", "are not one, of patches of 2"
        for name, ends in (("vision_gen_enc_model", encoder), ("vision_gen_dec_model", decoder)):
            for sampling in ("downsample", "upsample"):
                if getattr(ends.mid_block, sampling) is not None:
                    yield f".{name}.mid_block.{sampling}", "is there"
            for index, block in enumerate(ends.mid_block.res_blocks):
                path = f".{name}.mid_block.res_blocks.{index}"
                if known.epilogue_of(block.channelwise_act) != "gelu":
                    yield f"{path}.channelwise_act", "is another activation"
                if _drops(block.channelwise_dropout):
                    yield f"{path}.channelwise_dropout", _DROPS

    def _refused_vision(self) -> Iterator[tuple[str, str]]:
        encoder, path = self.model.vision_und_enc_model, ".vision_und_enc_model"
        tower = encoder.vision_tower
        if encoder.forward_kwargs or not tower.ignore_head or tower.num_prefix_tokens or tower.dynamic_img_size:
            yield f"{path}.vision_tower", "is another kind of SigLIP"
        for name in ("pos_drop", "patch_drop", "norm_pre"):
            if _drops(getattr(tower, name)):
                yield f"{path}.vision_tower.{name}", _DROPS
        for index, block in enumerate(tower.blocks):
            attention, mlp = block.attn, block.mlp
            parts = {"ls1": block.ls1, "ls2": block.ls2, "drop_path1": block.drop_path1, "drop_path2": block.drop_path2}
            parts |= {
                "attn.q_norm": attention.q_norm,
                "attn.k_norm": attention.k_norm,
                "attn.attn_drop": attention.attn_drop,
            }
            parts |= {
                "attn.proj_drop": attention.proj_drop,
                "mlp.drop1": mlp.drop1,
                "mlp.norm": mlp.norm,
                "mlp.drop2": mlp.drop2,
            }
            for name, module in parts.items():
                if _drops(module):
                    yield f"{path}.vision_tower.blocks.{index}.{name}", _DROPS


_DROPS = "does something"


def _drops(module: Any) -> bool:
    """Whether a module is more than an identity, as a dropout of 0 or in eval mode is one."""
    if type(module) is nn.Dropout:
        return bool(module.training and module.p)
    return type(module) is not nn.Identity


def _heads_of(attention: Any, heads: int) -> int:
    """Of an attention of the image encoder: its own number, which timm's have under another name. heads: the config's."""
    own: Any = getattr(attention, "heads", None) or getattr(attention, "num_heads", heads)
    return int(own)


def adapter(model: Any) -> JanusFlowAdapter:
    """Look the parts up.

    Raises:
        TypeError: some are missing; the message lists them.
    """
    check_parts(model, "JanusFlow", _REQUIRED)
    llm, config = model.language_model, config_of(model)
    kind = JanusFlowAdapter if isinstance(model, JanusFlow) else UpstreamJanusFlowAdapter
    # Up to transformers 4.47 every layer has rotary frequencies of its own.
    rope = getattr(llm.model, "rotary_emb", None) or llm.model.layers[0].self_attn.rotary_emb
    return kind(
        model=model,
        config=config,
        embed_tokens=llm.model.embed_tokens,
        layers=llm.model.layers,
        final_norm=llm.model.norm,
        llm_rope=rope,
        lm_head=llm.lm_head,
        llm_attention=AttentionShape(config.heads, config.kv, config.hidden // config.heads),
    )
