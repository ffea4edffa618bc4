"""JanusFlow's architecture, embedded: a causal language model between convolutions, 36 image tokens and a time token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.janusflow.calibration import GenerationSample, UnderstandingSample
from ..models.janusflow.config import JanusFlowConfig
from ..models.janusflow.model import JanusFlow
from ..models.janusflow.pipeline import Pipeline
from ..models.janusflow.prompts import ChatLayout
from ..models.janusflow.sampling import TIMES, sample
from ..models.janusflow.understanding import answer_tokens
from ..models.masks import additive, causal
from ..models.prompts import check_prompts, check_question
from ..planning.cost import Geometry
from . import codec
from .subject import ANSWER_TOKENS, Subject, folder_in_weights, packed, with_answers
from .tokenizer import layout, vocabulary
from .world import SIZE, Question

__all__ = ["SUBJECT"]

PATCH = 8
"""Pixels a side of an image encoder's token."""


def _config() -> JanusFlowConfig:
    """1.9 M parameters."""
    return JanusFlowConfig(
        hidden=128,
        inter=352,
        layers=6,
        heads=4,
        kv=4,
        vocab=len(vocabulary()),
        channels=64,
        blocks=2,
        grid=codec.GRID,
        vit=64,
        vit_layers=2,
        vit_heads=4,
        vit_ratio=3,
        vit_patch=PATCH,
        latent_channels=codec.CHANNELS,
        latent_size=2 * codec.GRID,
        image_size=SIZE,
    )


class _Layout(ChatLayout):
    """The embedded model's own words around prompts and questions."""

    def drawing(self, prompts: Sequence[str]) -> list[list[int]]:
        check_prompts(prompts)
        return [_prompt(each) for each in prompts]

    def question(self, text: str, device: torch.device | str = "cpu") -> Tensor:
        check_question(text)
        return torch.tensor([_question(text)], dtype=torch.int64, device=device)


class _Janus(Subject):
    family = "janusflow"
    folder = folder_in_weights("janusflow")
    guidance = 2.5

    def build(self) -> JanusFlow:
        return JanusFlow(_config())

    def load(self, directory: Path) -> JanusFlow:
        return JanusFlow.from_pretrained(directory, torch.float32)

    def pipeline(self, model: Any) -> Pipeline:
        words, tokens = layout(), (SIZE // PATCH) ** 2
        markers = (words.bos, words.eos, words.boi, words.eoi, words.pad, words.img_pad, words.boi)
        own = _Layout(words.encode, words.decode, *markers, tokens)
        pixels = SIZE // model.config.latent_size
        return Pipeline(model, own, codec.GridCodec(), self.guidance, latent_pixels=pixels)

    def velocity(self, model: Any, prompts: Sequence[str], null: Tensor, mixed: Tensor, t: Tensor) -> Tensor:
        words, device = layout(), mixed.device
        rows = [_prompt(prompt)[:-1] for prompt in prompts]
        own = torch.tensor([len(row) for row in rows], device=device)
        time = model.vision_gen_enc_model.time_embed(t * TIMES)
        encoded = model.vision_gen_enc_model(codec.grid(mixed), time)
        span = model.span(encoded, time)
        # Each row's span stands right behind its prompt: what follows the shorter ones is not seen, as tokens are causal.
        llm = model.language_model.model
        places = own[:, None] + torch.arange(span.shape[1], device=device)
        length = int(own.max()) + span.shape[1]
        text = llm.embed_tokens(packed(rows, words.pad, device))
        embeds = torch.nn.functional.pad(text, (0, 0, 0, span.shape[1]))
        index = places[..., None].expand(-1, -1, span.shape[-1])
        embeds = embeds.scatter(1, index, span)
        position = torch.arange(length, device=device)
        hidden = null[:, None] & (position >= 1) & (position < own[:, None])
        allowed = causal(length, device) & ~hidden[:, None]
        out = llm(
            inputs_embeds=embeds, attention_mask=additive(allowed, embeds.dtype)[:, None], use_cache=False
        ).last_hidden_state
        patches = out.gather(1, index)[:, 1:]
        return codec.ungrid(model.velocity(patches, encoded, time))

    def answered(self, model: Any, latents: Tensor, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        device = latents.device
        asked = [_question(question.text) for question in questions]
        tokens, predicting = with_answers(asked, questions, device)
        llm = model.language_model.model
        image = model.embed_image(codec.decode(latents))
        first = asked[0].index(layout().boi)
        embeds = llm.embed_tokens(tokens)
        embeds = torch.cat([embeds[:, :first], image, embeds[:, first + image.shape[1] :]], dim=1)
        hidden = llm(inputs_embeds=embeds, use_cache=False).last_hidden_state
        states, chosen = hidden[:, :-1][predicting], tokens[:, 1:][predicting]
        return model.language_model.lm_head(states), chosen

    def generate(
        self,
        model: Any,
        prompts: Sequence[str],
        noise: Tensor,
        steps: int | None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        device = model.beg_of_und_embed.device
        rows = [_prompt(prompt) for prompt in prompts]
        drawn = torch.empty_like(noise, device=device)
        # Images of one call have prompts of one length.
        for length in sorted(set(map(len, rows))):
            alike = [index for index, row in enumerate(rows) if len(row) == length]
            latents = sample(
                model,
                codec.grid(noise[alike].to(device)),
                torch.tensor([rows[index] for index in alike], device=device),
                steps=None if steps is None else steps - 1,
                guidance_scale=self.guidance,
                pad_token=layout().pad,
                callback=callback,
            )
            drawn[alike] = codec.ungrid(latents)
        return drawn

    def answer(self, model: Any, latents: Tensor, question: Question) -> tuple[str, list[int]]:
        device, words = model.beg_of_und_embed.device, layout()
        pixels = codec.decode(latents.to(device))
        tokens = torch.tensor([_question(question.text)], device=device)
        given = answer_tokens(model, pixels, tokens, max_new_tokens=ANSWER_TOKENS, eos_token=words.eos)
        return words.answer(given), given.tolist()

    def generation_sample(self, latents: Tensor, prompt: str) -> GenerationSample:
        return GenerationSample(codec.grid(latents), torch.tensor(_prompt(prompt)), layout().pad)

    def understanding_sample(self, latents: Tensor, question: Question) -> UnderstandingSample:
        answer = layout().encode(question.answer)
        tokens = torch.tensor([[*_question(question.text), *answer]])
        return UnderstandingSample(codec.decode(latents), tokens, len(answer))

    def geometry(self, prompt: str) -> Geometry:
        prefix, span = len(_prompt(prompt)) - 1, 1 + codec.GRID**2
        return Geometry(prefix, span, prefix + span)


def _prompt(text: str) -> list[int]:
    """bos, role, caption, role, and the tag of drawing."""
    words = layout()
    return [*words.before_image, *words.encode(text), *words.after_question, words.boi]


def _question(text: str) -> list[int]:
    words = layout()
    image = [words.boi, *[words.img_pad] * (SIZE // PATCH) ** 2, words.eoi]
    return [*words.before_image, *image, *words.encode(text), *words.after_question]


SUBJECT = _Janus()
