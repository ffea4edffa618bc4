"""BAGEL as the runtime sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...planning.cost import EncoderShape, ModelShape
from ...planning.decoders import check_parts
from .. import known
from ..adapter import Adapter, AttentionShape, Kit, Question, Sizes
from ..calibration import DensePass, Noise, Sample, TokenSample
from ..masks import causal
from ..sampling import Segment
from ..shapes import layer_shape, linear_flops
from . import calibration
from .config import BagelConfig, config_of
from .latents import latent_places, packed
from .model import Bagel, Image, Text, TokenIds
from .sampling import MARKERS, extent

__all__ = ["BagelAdapter", "adapter", "with_places"]

_REQUIRED = (
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers.0.mlp_moe_gen",
    "language_model.model.norm_moe_gen",
    "language_model.lm_head",
    "time_embedder",
    "vae2llm.weight",
    "llm2vae",
    "latent_pos_embed",
    "vit_model.vision_model.encoder",
    "connector",
    "vit_pos_embed",
)
_OWN, _THEIRS = "flashu_ext.models.bagel", "modeling.bagel"
_MODELS = {"Bagel": (f"{_OWN}.model", f"{_THEIRS}.bagel")}
_LLM = {
    **dict.fromkeys(("LanguageModel", "Stack", "DecoderLayer", "Attention", "Rotary"), (f"{_OWN}.layers",)),
    **dict.fromkeys(("Qwen2ForCausalLM", "Qwen2Model", "Qwen2MoTDecoderLayer"), (f"{_THEIRS}.qwen2_navit",)),
    "Qwen2RotaryEmbedding": ("modeling.qwen2.modeling_qwen2",),
}
_PARTS = {
    **dict.fromkeys(
        ("PositionTable", "Connector", "Embeddings", "VisionTransformer", "VisionModel"), (f"{_OWN}.model",)
    ),
    **dict.fromkeys(("PositionEmbedding", "MLPconnector"), (f"{_THEIRS}.modeling_utils",)),
    **dict.fromkeys(
        ("SiglipVisionModel", "SiglipVisionTransformer", "SiglipVisionEmbeddings"), (f"{_THEIRS}.siglip_navit",)
    ),
}


@dataclass(frozen=True)
class _Attention:
    """The drawing expert's part of an attention, under the names of a layer of its own."""

    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    q_norm: Any
    k_norm: Any


@dataclass(frozen=True)
class _Expert:
    """The drawing expert's part of a layer, under the names of a layer of its own."""

    input_layernorm: Any
    self_attn: _Attention
    post_attention_layernorm: Any
    mlp: Any

    @classmethod
    def of(cls, layer: Any) -> _Expert:
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        attention = _Attention(*(getattr(layer.self_attn, f"{name}_moe_gen") for name in names))
        return cls(layer.input_layernorm_moe_gen, attention, layer.post_attention_layernorm_moe_gen, layer.mlp_moe_gen)


@dataclass(frozen=True, kw_only=True)
class BagelAdapter(Adapter):
    """A span is the patches, then both markers: all of them have one position and see each other, so their order is free."""

    family: ClassVar[str] = "bagel"
    samples: ClassVar[tuple[type[Sample], ...]] = (
        calibration.GenerationSample,
        calibration.UnderstandingSample,
        TokenSample,
        calibration.PromptSample,
    )
    flat: ClassVar[bool] = True
    drops_unit_guidance: ClassVar[bool] = True
    norms_span: ClassVar[bool] = False
    skips_tokens: ClassVar[bool] = False

    config: BagelConfig
    latents_in: Any = None
    time: Any = None
    latents_out: Any = None
    patch_embedding: Any = None
    vision: Any = None
    connector: tuple[Any, ...] = ()

    @property
    def trail(self) -> int:
        return MARKERS

    @property
    def latent_channels(self) -> int:
        """Numbers of a latent token: the runtime's latents are a grid of tokens."""
        return int(self.config.patch_width)

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.config.latent_side, self.config.latent_side

    def on(self, kit: Kit) -> BagelAdapter:
        model, vit = self.model, self.model.vit_model.vision_model
        return replace(
            self,
            lm_head=kit.linear(self.lm_head),
            latents_in=kit.linear(model.vae2llm),
            time=kit.time(model.time_embedder),
            expert_norm=kit.norm(self.expert_norm),
            latents_out=kit.linear(model.llm2vae),
            patch_embedding=kit.linear(vit.embeddings.patch_embedding),
            vision=kit.vision(vit.encoder),
            connector=(kit.linear(model.connector.fc1), kit.linear(model.connector.fc2)),
        )

    # ---- drawing

    def sizes(self, latent_size: tuple[int, int]) -> Sizes:
        patches, width = latent_size[0] * latent_size[1], self.latent_channels
        return Sizes(patches=patches, velocity=(patches, width), cached=self.hidden, signal=width)

    def embed_time(self, t: Tensor) -> Tensor:
        return self.time(t, self.dtype)

    def time_token(self, time: Tensor) -> Tensor:
        return time

    def span(self, latents: Tensor, features: Tensor | None, early: Tensor | None, token: Tensor) -> Tensor:
        rows, columns = latents.shape[2:]
        places = self.model.latent_pos_embed(latent_places((rows, columns), self.config, latents.device))
        # The time's embedding first, as in the model: sums of three numbers depend on their order.
        return self.latents_in(self.signal(latents, token)) + token[:, None] + places.to(self.dtype)

    def signal(self, latents: Tensor, token: Tensor) -> Tensor:
        """The latent tokens."""
        return latents.to(self.dtype).flatten(2).transpose(1, 2).contiguous()

    def velocity(self, x: Tensor, modulation: Tensor, early: Tensor | None) -> Tensor:
        return self.latents_out(self.expert_norm(x[:, :-MARKERS].contiguous()))

    # ---- sequences

    def markers(self, ids: TokenIds) -> Tensor:
        """[1, 2, hidden]."""
        return self.embed_tokens(torch.tensor([[ids.start_of_image, ids.end_of_image]], device=self.device))

    def segments(self, item: Text | Image, ids: TokenIds, position: int) -> list[Segment]:
        """A text or an image of a sequence, whose first token has this rotary position."""
        if isinstance(item, Text):
            first, last = item.ids.new_tensor([ids.bos_token_id, ids.eos_token_id]).split(1)
            embeds = self.embed_tokens(torch.cat([first, item.ids, last])[None])
            positions = position + torch.arange(embeds.shape[1], device=self.device)
            return [Segment(embeds, positions, causal=True)]
        made: list[Segment] = []
        for tokens, drawn in ((self._context_latents(item), True), (self._context_image(item), False)):
            if tokens is not None:
                made.append(self._between(tokens, ids, position + len(made), drawn))
        return made

    def _context_latents(self, item: Image) -> Tensor | None:
        if item.latents is None:
            return None
        patch = self.config.latent_patch
        rows, columns = (length // patch for length in item.latents.shape[2:])
        grid = packed(item.latents, self.config).reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
        time = self.time_token(self.embed_time(torch.zeros(1, dtype=torch.float32, device=self.device)))
        return self.span(grid, None, None, time)

    def _context_image(self, item: Image) -> Tensor | None:
        return None if item.vit_tokens is None else self.embed_image(with_places(item))

    @property
    def question_tokens(self) -> int:
        return config_of(self.model).vit_side ** 2 + MARKERS

    def embed_image(self, image: Tensor) -> Tensor:
        """The image encoder's tokens and their places (`with_places`), [images, n, numbers + 1] -> [images, n, hidden]."""
        model, vit = self.model, self.model.vit_model.vision_model
        tokens, places = image[..., :-1].to(self.dtype).contiguous(), image[..., -1].long()
        x = self.patch_embedding(tokens) + vit.embeddings.position_embedding(places)
        x = vit.post_layernorm(self.vision(x)["last_hidden_state"])
        raise_, lower = self.connector
        return lower(raise_(x, epilogue="gelu_tanh")) + model.vit_pos_embed(places).to(x.dtype)

    def question(self, images: Sequence[Tensor], before: Sequence[Text | Image], after: TokenIds) -> Question:
        """A sequence of texts and images, of which the images [1, n, hidden] are encoded, and the answer's first marker.

        Args:
            before: the sequence. after: ids of the markers.
        """
        encoded = iter(images)
        segments: list[Segment] = []
        spans, place, position = [], 0, 0
        for item in before:
            if isinstance(item, Text):
                made = self.segments(item, after, position)
            else:
                made = [self._between(next(encoded), after, position)]
                spans.append((place, made[0].embeds.shape[1] - MARKERS))
            segments += made
            place += made[0].embeds.shape[1]
            position += extent(self.config, item)[1]
        start = torch.tensor([[after.bos_token_id]], device=self.device)
        segments.append(Segment(self.embed_tokens(start), torch.full_like(start[0], position), causal=True))
        allowed = causal(place + 1, self.device)
        for first, count in spans:
            allowed[first : first + count + MARKERS, first : first + count + MARKERS] = True
        positions = torch.cat([segment.positions for segment in segments])
        return Question(torch.cat([s.embeds for s in segments], dim=1), allowed, tuple(spans), positions)

    def _between(self, tokens: Tensor, ids: TokenIds, position: int, drawn: bool = False) -> Segment:
        """An image's tokens [1, n, hidden] with its markers behind them."""
        embeds = torch.cat([tokens, self.markers(ids)], dim=1)
        positions = torch.full((embeds.shape[1],), position, device=self.device)
        return Segment(embeds, positions, causal=False, drawn=tokens.shape[1] if drawn else 0)

    # ---- calibration

    def passes(self, sample: Any, times: Sequence[float], noise: Noise) -> Iterator[DensePass]:
        return calibration.passes(self, sample, times, noise)

    # ---- what is known

    def shape(self) -> ModelShape:
        model, config = self.model, config_of(self.model)
        asked = linear_flops(model.vit_model) + linear_flops(model.connector)
        return ModelShape(
            layers=tuple(layer_shape(layer, self.llm_attention) for layer in self.experts),
            blocks=(),
            encoder=EncoderShape(linear=linear_flops(model.vae2llm), layers=0, width=self.hidden),
            head_input=0.0,
            final=linear_flops(model.llm2vae),
            final_modulation=0.0,
            lm_head=linear_flops(model.language_model.lm_head),
            time_token=False,
            asked=EncoderShape(asked, config.vit_layers_kept, config.vit, config.vit_heads),
        )

    def refused(self) -> Iterator[tuple[str, str]]:
        model, like = self.model, self.embed_tokens.weight
        yield from known.refused_model(model, _MODELS, self.methods)
        for path, module in self._passed_over():
            if reason := known.why_replaced(module, _LLM if "language_model" in path else _PARTS):
                yield f".{path}", reason
        for index, layer in enumerate(self.layers):
            yield from known.refused_layer(f".language_model.model.layers.{index}", layer, self.llm_attention, like)

    def _passed_over(self) -> Iterator[tuple[str, Any]]:
        """(path, module) of what the methods above compute from its parts."""
        model = self.model
        yield "language_model", model.language_model
        yield "language_model.model", model.language_model.model
        yield "language_model.model.rotary_emb", model.language_model.model.rotary_emb
        for i, layer in enumerate(self.layers):
            yield f"language_model.model.layers.{i}", layer
        for path in ("vit_model", "vit_model.vision_model", "vit_model.vision_model.embeddings"):
            yield path, model.get_submodule(path)
        for path in ("connector", "latent_pos_embed", "vit_pos_embed"):
            yield path, model.get_submodule(path)


@dataclass(frozen=True, kw_only=True)
class UpstreamBagelAdapter(BagelAdapter):
    """Of upstream's class, whose own entry points the runtime takes over (`flashu_ext.upstream.bagel`)."""

    methods: ClassVar[tuple[str, ...]] = (
        "forward_cache_update_text",
        "forward_cache_update_vit",
        "forward_cache_update_vae",
        "generate_image",
        "generate_text",
    )

    def refused(self) -> Iterator[tuple[str, str]]:
        yield from super().refused()
        for name, weight in self.model.named_parameters():
            if weight.device != self.device:
                yield f".{name}", f"is on {weight.device}, other weights on {self.device}"
                break
        model, vit = self.model, self.model.vit_model.vision_model
        yield from known.refused_decoder(".language_model", model.language_model, self.llm_rope, len(self.layers))
        # Their own signatures are others, so that they cannot be called as they are.
        if reason := known.why_not_vision(vit.encoder):
            yield ".vit_model.vision_model.encoder", reason
        if reason := known.why_not_time(model.time_embedder):
            yield ".time_embedder", reason
        if vit.config.rope:
            yield ".vit_model.vision_model", "rotates its queries and keys"
        if isinstance(vit.embeddings.patch_embedding, nn.Conv2d):
            yield (
                ".vit_model.vision_model.embeddings",
                "is a convolution; upstream's convert_conv2d_to_linear changes it",
            )
        if known.epilogue_of(model.connector.activation_fn) != "gelu_tanh":
            yield ".connector.activation_fn", "is another activation than gelu_pytorch_tanh"


def with_places(item: Image) -> Tensor:
    """An image's tokens of the image encoder, with their places as a last number, fp32 [1, n, numbers + 1]."""
    assert item.vit_tokens is not None and item.vit_position_ids is not None, "sampling.check_inputs has looked"
    return torch.cat([item.vit_tokens.float(), item.vit_position_ids[:, None].float()], dim=1)[None]


def adapter(model: Any) -> BagelAdapter:
    """Look the parts up.

    Raises:
        TypeError: some are missing; the message lists them.
    """
    check_parts(model, "BAGEL", _REQUIRED)
    llm, config = model.language_model.model, config_of(model)
    kind = BagelAdapter if isinstance(model, Bagel) else UpstreamBagelAdapter
    return kind(
        model=model,
        config=config,
        embed_tokens=llm.embed_tokens,
        layers=llm.layers,
        experts=tuple(_Expert.of(layer) for layer in llm.layers),
        expert_norm=llm.norm_moe_gen,
        final_norm=llm.norm,
        llm_rope=llm.rotary_emb,
        lm_head=model.language_model.lm_head,
        llm_attention=AttentionShape(config.heads, config.kv, config.hidden // config.heads),
    )
