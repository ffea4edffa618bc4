"""A model of a new family, with the adapter that makes it fast: docs/adding-a-model.md goes through it.

`Sketch` draws small images by rectified flow and answers questions about them, with one Llama for both. Run it: it draws the
same image dense and accelerated, prints how far apart they are, and draws it once more with the neurons that drawings use most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import flashu_ext as fx
from flashu_ext.models import known
from flashu_ext.models.adapter import AttentionShape, Kit
from flashu_ext.models.calibration import DensePass, Noise, Sample, noised
from flashu_ext.models.embedding import TimestepEmbedder
from flashu_ext.models.llm import language_model
from flashu_ext.models.masks import additive, causal, omni_allowed
from flashu_ext.models.sampling import DrawInputs, integrate
from flashu_ext.models.shapes import layer_shape, linear_flops
from flashu_ext.models.velocity import guide, patchify, unpatchify
from flashu_ext.planning.cost import EncoderShape, ModelShape

SIDE, CHANNELS, HIDDEN = 8, 4, 64
LLAMA = dict.fromkeys(
    ("LlamaForCausalLM", "LlamaModel", "LlamaDecoderLayer"), ("transformers.models.llama.modeling_llama",)
)
"""Classes that the runtime passes over."""


class Sketch(nn.Module):
    """Text tokens, then a time token and 16 image tokens that see each other."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
        self.llm: Any = language_model("Llama", {**sizes, "num_key_value_heads": 4, "vocab_size": 64})
        self.sketch_in = nn.Conv2d(CHANNELS, HIDDEN, kernel_size=2, stride=2)
        self.time = TimestepEmbedder(HIDDEN)
        self.sketch_out = nn.Linear(HIDDEN, 4 * CHANNELS)

    def velocity(self, latents: Tensor, t: Tensor, tokens: Tensor, spans: Tensor) -> Tensor:
        """The whole sequence at once: latents [rows, channels, H, W], t [rows], tokens int64 [rows, length]."""
        embeds = self.llm.model.embed_tokens(tokens)
        image = self.sketch_in(latents).flatten(2).transpose(1, 2)
        span = torch.cat([self.time(t, embeds.dtype)[:, None], image], dim=1)
        for row, (start, count) in enumerate(spans[:, 0].tolist()):
            embeds[row, start : start + count] = span[row]
        mask = additive(omni_allowed(spans, tokens.shape[1])[:, None], embeds.dtype)
        hidden = self.llm.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        image = torch.stack([hidden[row, s + 1 : s + n] for row, (s, n) in enumerate(spans[:, 0].tolist())])
        return unpatchify(self.sketch_out(image), latents.shape)


@dataclass(frozen=True)
class SketchSample(Sample):
    """Images [B, channels, H, W] with their prompts int64 [B, n], from which neurons are scored."""

    kind: ClassVar[str] = "generation"
    family: ClassVar[str | None] = "sketch"
    latents: Tensor
    prompts: Tensor


def sequences(prompts: Tensor, latents: Tensor, guided: bool = True) -> tuple[Tensor, Tensor]:
    """Tokens and spans of the prompts and, under guidance, of rows that have token 0 in the prompt's place."""
    span = 1 + latents.shape[2] * latents.shape[3] // 4
    rows = torch.cat([prompts, torch.zeros_like(prompts)]) if guided else prompts
    tokens = nn.functional.pad(rows, (0, span))
    return tokens, torch.tensor([[[prompts.shape[1], span]]]).repeat(len(tokens), 1, 1)


@dataclass(frozen=True, kw_only=True)
class SketchAdapter(fx.Adapter):
    family: ClassVar[str] = "sketch"
    samples: ClassVar[tuple[type[Sample], ...]] = (SketchSample,)
    patches: Any = None
    time: Any = None
    out: Any = None
    lead = 1
    latent_channels = CHANNELS
    latent_size = (SIDE, SIDE)

    def on(self, kit: Kit) -> SketchAdapter:
        of = self.model
        made = {"patches": kit.patches(of.sketch_in), "time": kit.time(of.time), "out": kit.linear(of.sketch_out)}
        return replace(self, lm_head=kit.linear(self.lm_head), **made)

    def sizes(self, latent_size: tuple[int, int]) -> fx.Sizes:
        patches = latent_size[0] * latent_size[1] // 4
        return fx.Sizes(patches=patches, velocity=(patches, 4 * CHANNELS), cached=HIDDEN)

    def embed_time(self, t: Tensor) -> Tensor:
        return self.time(t, self.dtype)

    def time_token(self, time: Tensor) -> Tensor:
        return time

    def span(self, latents: Tensor, features: Any, early: Any, token: Tensor) -> Tensor:
        return torch.cat([token[:, None], self.patches(latents.to(self.dtype))], dim=1)

    def velocity(self, x: Tensor, modulation: Tensor, early: Any) -> Tensor:
        return self.out(x[:, 1:].contiguous())

    def embed_image(self, image: Tensor) -> Tensor:
        return self.patches(image.to(self.dtype))

    def question(self, images: Sequence[Tensor], before: Tensor, after: Tensor) -> fx.Question:
        embeds = torch.cat([self.embed_tokens(before), *images, self.embed_tokens(after)], dim=1)
        counts = [image.shape[1] for image in images]
        spans = [(before.shape[1] + sum(counts[:i]), count) for i, count in enumerate(counts)]
        return fx.Question(embeds, causal(embeds.shape[1], embeds.device), tuple(spans))

    def passes(self, sample: SketchSample, times: Sequence[float], noise: Noise) -> Iterator[DensePass]:
        tokens, spans = sequences(sample.prompts, sample.latents)
        for row, t in enumerate(times):
            latents = noised(sample.latents, t, noise).repeat(2, 1, 1, 1)
            yield DensePass(
                partial(self.model.velocity, latents, torch.full((len(tokens),), t), tokens, spans), row=row
            )

    def shape(self) -> ModelShape:
        layers = tuple(layer_shape(layer, self.llm_attention) for layer in self.layers)
        encoder, head = EncoderShape(2.0 * self.model.sketch_in.weight.numel(), 0, HIDDEN), linear_flops(self.lm_head)
        return ModelShape(layers, (), encoder, 0.0, linear_flops(self.model.sketch_out), 0.0, head, True)

    def refused(self) -> Iterator[tuple[str, str]]:
        yield from known.refused_model(self.model, {"Sketch": (Sketch.__module__,)}, self.methods)
        yield from known.refused_decoder(".llm", self.model.llm, self.llm_rope, len(self.layers))
        for path, module in (("llm", self.model.llm), ("llm.model", self.model.llm.model)):
            if reason := known.why_replaced(module, LLAMA):
                yield f".{path}", reason
        for i, layer in enumerate(self.layers):
            if reason := known.why_replaced(layer, LLAMA):
                yield f".llm.model.layers.{i}", reason
            yield from known.refused_layer(
                f".llm.model.layers.{i}", layer, self.llm_attention, self.embed_tokens.weight
            )


def adapter(model: Any) -> SketchAdapter:
    llm = model.llm
    return SketchAdapter(
        model=model,
        embed_tokens=llm.model.embed_tokens,
        layers=llm.model.layers,
        final_norm=llm.model.norm,
        llm_rope=llm.model.rotary_emb,
        lm_head=llm.lm_head,
        llm_attention=AttentionShape(4, 4, HIDDEN // 4),
    )


fx.register_family("sketch", fx.Family("Sketch", "sketch_in", "llm.model", __name__))


class SketchInputs(DrawInputs):
    def schedule(self, grid_points: int) -> tuple[Tensor, Tensor]:
        times = torch.linspace(0, 1, grid_points)
        return times[:-1], times.diff()


@torch.no_grad()
def sample(model: Sketch, noise: Tensor, prompts: Tensor, steps: int = 10, scale: float = 3.0) -> Tensor:
    """Latents [B, channels, H, W] of prompts int64 [B, n]."""
    tokens, spans = sequences(prompts, noise, scale > 0)
    inputs = SketchInputs(noise, tokens, spans, steps + 1, scale)
    handle = fx.handle_of(model)
    if handle is not None:
        latents: Tensor = integrate(handle.stepper(inputs))
        return latents
    times, dt = inputs.schedule(steps + 1)
    for t, step in zip(times, dt, strict=True):
        rows = model.velocity(noise.repeat(len(tokens) // len(noise), 1, 1, 1), t.expand(len(tokens)), tokens, spans)
        noise = noise + step * (guide(rows, scale) if scale > 0 else rows)
    return noise


def main() -> None:
    torch.manual_seed(0)
    model, prompts = Sketch().eval(), torch.randint(1, 64, (2, 7))
    noise = torch.randn(2, CHANNELS, SIDE, SIDE)
    dense = sample(model, noise, prompts)
    with fx.accelerate(model) as handle:
        fast = sample(model, noise, prompts)
        print(f"exact: {(fast - dense).norm() / dense.norm():.1e} from the dense images; {handle.summary().steps}")
    plan = fx.calibrate(model, [SketchSample(dense, prompts)], ratio=0.25, multiple=16, progress=False)
    with fx.accelerate(model, fx.FlashUConfig(ffn_prune_ratio=0.25, prune_multiple=16), plan):
        pruned = sample(model, noise, prompts)
        print(f"without a quarter of the neurons: {(pruned - dense).norm() / dense.norm():.1e}")
    assert math.isfinite(float(fast.sum())) and patchify(fast, 2).shape == (2, 16, 16)


if __name__ == "__main__":
    main()
