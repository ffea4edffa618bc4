"""BAGEL's architecture, embedded: two experts a layer, 36 latent tokens between two markers, at one rotary position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.bagel.calibration import GenerationSample, UnderstandingSample
from ..models.bagel.config import BagelConfig
from ..models.bagel.latents import latent_places
from ..models.bagel.layers import Experts
from ..models.bagel.model import Bagel, Image, Text, TokenIds
from ..models.bagel.pipeline import Pipeline
from ..models.bagel.prompts import SequenceLayout
from ..models.bagel.sampling import MARKERS, Guidance, sample
from ..models.bagel.understanding import answer_tokens
from ..planning.cost import Geometry
from . import codec
from .subject import ANSWER_TOKENS, Subject, folder_in_weights, packed, with_answers
from .tokenizer import layout, vocabulary
from .world import SIZE, Question

__all__ = ["SUBJECT", "token_ids"]

PATCH = 8
"""Pixels a side of a token, of the image encoder's and of the latents'."""

GUIDED = (0.0, 1.0)
"""Times at which drawings are guided."""
SHIFT = 1.5


def _config() -> BagelConfig:
    """1.6 M parameters, about half of which a token meets."""
    return BagelConfig(
        hidden=96,
        inter=320,
        layers=6,
        heads=4,
        kv=2,
        vocab=len(vocabulary()),
        vit=64,
        vit_inter=192,
        vit_layers=3,
        vit_layers_kept=2,
        vit_heads=4,
        vit_side=SIZE // PATCH,
        vit_patch=PATCH,
        latent_side=codec.GRID,
        latent_channels=codec.CHANNELS,
        vae_downsample=PATCH // 2,
        rope_theta=10000.0,
    )


class _Bagel(Subject):
    family = "bagel"
    folder = folder_in_weights("bagel")
    guidance = 2.5

    def build(self) -> Bagel:
        return Bagel(_config())

    def load(self, directory: Path) -> Bagel:
        return Bagel.from_pretrained(directory, torch.float32)

    def pipeline(self, model: Any) -> Pipeline:
        words, side = layout(), (SIZE, SIZE)
        return Pipeline(
            model,
            SequenceLayout(words.encode, words.decode, words.bos, words.eos, words.boi, words.eoi),
            codec.GridCodec(),
            vae_sides=side,
            vit_sides=side,
            size=side,
            guidance=Guidance(self.guidance, interval=GUIDED),
            timestep_shift=SHIFT,
        )

    def velocity(self, model: Any, prompts: Sequence[str], null: Tensor, mixed: Tensor, t: Tensor) -> Tensor:
        device, ids = mixed.device, token_ids()
        texts = [_between(ids, prompt) for prompt in prompts]
        own = torch.tensor([len(row) for row in texts], device=device)
        run = model.language_model.model
        text = run.embed_tokens(packed(texts, layout().pad, device))
        tokens = _latent_tokens(codec.grid(mixed))
        # BAGEL's time runs the other way: 1 is noise.
        time = model.time_embedder(1 - t, text.dtype)[:, None]
        places = model.latent_pos_embed(latent_places((codec.GRID, codec.GRID), model.config, device))
        image = _marked(model, ids, model.vae2llm(tokens) + time + places)
        before, count = text.shape[1], image.shape[1]
        position = torch.arange(before + count, device=device)
        positions = torch.where(position < before, position, own[:, None])
        seen = (position < torch.where(null, 0, own)[:, None]) | (position >= before)
        inside = position >= before
        allowed = (position[:, None] >= position) | (inside[:, None] & inside)
        allowed = allowed & (seen[:, None] | ~inside[:, None])
        experts = Experts(before + 1, before + count - 1)
        hidden = _run(run, torch.cat([text, image], dim=1), experts, positions, allowed)
        towards = -model.velocity(hidden[:, experts.first : experts.last])
        columns = towards.unflatten(2, (4, codec.CHANNELS)).transpose(2, 3).flatten(2).transpose(1, 2)
        return codec.ungrid(F.fold(columns, (2 * codec.GRID, 2 * codec.GRID), 2, stride=2))

    def answered(self, model: Any, latents: Tensor, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        device, ids = latents.device, token_ids()
        asked = [[*_between(ids, question.text), ids.bos_token_id] for question in questions]
        tokens, predicting = with_answers(asked, questions, device)
        vision = model.vit_model.vision_model
        places = torch.arange((SIZE // PATCH) ** 2, device=device)
        seen = vision.embeddings.patch_embedding(_patches(latents)) + vision.embeddings.position_embedding(places)
        features = vision.post_layernorm(vision.encoder(inputs_embeds=seen).last_hidden_state)
        image = _marked(model, ids, model.connector(features) + model.vit_pos_embed(places))
        run, count = model.language_model.model, image.shape[1]
        position = torch.arange(count + tokens.shape[1], device=device)
        inside = position < count
        allowed = (position[:, None] >= position) | (inside[:, None] & inside)
        positions = torch.where(inside, 0, position - count + 1).expand(len(tokens), -1)
        sequence = torch.cat([image, run.embed_tokens(tokens)], dim=1)
        hidden = _run(run, sequence, Experts(), positions, allowed)[:, count:]
        states, chosen = hidden[:, :-1][predicting], tokens[:, 1:][predicting]
        return model.language_model.lm_head(run.norm(states)), chosen

    def generate(
        self,
        model: Any,
        prompts: Sequence[str],
        noise: Tensor,
        steps: int | None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        device = model.vae2llm.weight.device
        drawn = []
        for prompt, own in zip(prompts, codec.grid(noise.to(device)).split(1), strict=True):
            tokens = sample(
                model,
                model.packed(own),
                [_text(prompt, device)],
                (SIZE, SIZE),
                token_ids(),
                num_timesteps=steps,
                cfg_text_scale=self.guidance,
                cfg_interval=GUIDED,
                timestep_shift=SHIFT,
                callback=callback,
            )
            drawn.append(codec.ungrid(model.unpacked(tokens, (SIZE, SIZE))))
        return torch.cat(drawn)

    def answer(self, model: Any, latents: Tensor, question: Question) -> tuple[str, list[int]]:
        device = model.vae2llm.weight.device
        inputs: list[Image | Text] = [_image(latents.to(device)), _text(question.text, device)]
        given = answer_tokens(model, inputs, token_ids(), max_new_tokens=ANSWER_TOKENS)
        return layout().answer(given), given.tolist()

    def generation_sample(self, latents: Tensor, prompt: str) -> GenerationSample:
        tokens = _latent_tokens(codec.grid(latents))[0]
        return GenerationSample(tokens, (_text(prompt, latents.device),), (SIZE, SIZE), token_ids())

    def understanding_sample(self, latents: Tensor, question: Question) -> UnderstandingSample:
        inputs = (_image(latents), _text(question.text, latents.device))
        return UnderstandingSample(inputs, tuple(layout().encode(question.answer)), token_ids())

    def geometry(self, prompt: str) -> Geometry:
        prefix, span = len(_between(token_ids(), prompt)), codec.GRID**2 + MARKERS
        return Geometry(prefix, span, prefix + span)


def token_ids() -> TokenIds:
    words = layout()
    return TokenIds(words.bos, words.eos, words.boi, words.eoi)


def _between(ids: TokenIds, text: str) -> list[int]:
    return [ids.bos_token_id, *layout().encode(text), ids.eos_token_id]


def _text(text: str, device: torch.device) -> Text:
    return Text(torch.tensor(layout().encode(text), dtype=torch.int64, device=device))


def _latent_tokens(grid: Tensor) -> Tensor:
    """`Bagel.packed` for a batch: [B, 16, 12, 12] -> [B, n, row in token x column in token x channel]."""
    patches = F.unfold(grid, 2, stride=2).transpose(1, 2)  # the channel comes first
    return patches.unflatten(2, (codec.CHANNELS, 4)).transpose(2, 3).flatten(2)


def _image(latents: Tensor) -> Image:
    """A picture [1, 16, 72, 2] as a question reads it."""
    tokens = _patches(latents)[0]
    return Image(vit_tokens=tokens, vit_position_ids=torch.arange(len(tokens), device=latents.device))


def _patches(latents: Tensor) -> Tensor:
    """Pictures of the latents as the image encoder's tokens, [B, patches, row x column x channel]."""
    pixels = codec.decode(latents)
    side = SIZE // PATCH
    grid = pixels.reshape(len(pixels), 3, side, PATCH, side, PATCH)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(len(pixels), side * side, -1)


def _marked(model: Any, ids: TokenIds, image: Tensor) -> Tensor:
    """Tokens [B, n, hidden] between an image's markers."""
    markers = torch.tensor([ids.start_of_image, ids.end_of_image], device=image.device)
    start, end = model.language_model.model.embed_tokens(markers).expand(len(image), -1, -1).split(1, dim=1)
    return torch.cat([start, image, end], dim=1)


def _run(stack: Any, x: Tensor, experts: Experts, positions: Tensor, allowed: Tensor) -> Tensor:
    """`Stack` for a batch, whose rows need places and a mask of their own.

    Args:
        x: [B, n, hidden]. positions: int64 [B, n]. allowed: bool [n, n] or [B, n, n].

    Returns:
        [B, n, hidden] before the experts' final norms.
    """
    cos, sin = (each[:, None] for each in stack.rotary_emb(x, positions))
    for layer in stack.layers:
        x, _, _ = layer(x, experts, (cos, sin), None, allowed if allowed.dim() == 2 else allowed[:, None])
    return x


SUBJECT = _Bagel()
