"""Show-o2's architecture, embedded: 36 image tokens and a time token, and a diffusion head of three blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..calibration.calibrate import GenerationSample, UnderstandingSample
from ..models.showo2.config import Showo2Config
from ..models.showo2.model import Showo2
from ..models.showo2.pipeline import Pipeline
from ..models.showo2.sampling import sample
from ..models.showo2.understanding import answer_tokens
from ..planning.cost import Geometry
from . import codec
from .subject import ANSWER_TOKENS, DATA, Subject, with_answers
from .tokenizer import layout, vocabulary
from .world import SIZE, Question

__all__ = ["SHIFT", "SUBJECT", "nano_config"]

SHIFT = 1.5
"""Time shift."""


def nano_config() -> Showo2Config:
    """Show-o2's architecture at about 2.7 M parameters; 36 image tokens and a time token."""
    return Showo2Config(
        llm={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(vocabulary()),
            "max_position_embeddings": 256,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        },
        vision={"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
        head={
            "hidden_size": 160,
            "intermediate_size": 480,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "head_dim": 32,
            "num_layers": 3,
        },
        image_latent_dim=codec.CHANNELS,
        image_latent_height=codec.GRID * codec.GRID,
        image_latent_width=1,
    )


class _Showo2(Subject):
    family = "showo2"
    folder = DATA
    guidance = 2.5
    # No layers are skipped: one of six is a sixth of the depth, and without it 27 of 100 images are correct (96 with it;
    # `flashu-ext report`). In answers the half of the visual tokens with the *smallest* value norms is dropped: dropping the
    # largest, as in the paper, leaves 45 % of the answers correct here (93 % without dropping; `flashu-ext report`).
    paper: ClassVar[Mapping[str, Any]] = {
        "layer_skip_ratio": 0.0,
        "token_prune_ratio": 0.5,
        "token_prune_score": "value_norm_small",
    }

    def build(self) -> Showo2:
        return Showo2(nano_config())

    def load(self, directory: Path) -> Showo2:
        return Showo2.from_pretrained(directory, torch.float32)

    def pipeline(self, model: Any) -> Pipeline:
        return Pipeline(model, layout(), codec, SIZE, self.guidance, SHIFT)

    def velocity(self, model: Any, prompts: Sequence[str], null: Tensor, mixed: Tensor, t: Tensor) -> Tensor:
        inputs = layout().generation(prompts, mixed.device)
        tokens = torch.where(null[:, None], inputs.text_tokens_null, inputs.text_tokens)
        spans = torch.where(null[:, None, None], inputs.modality_positions_null, inputs.modality_positions)
        end = int(spans[:, 0].sum(-1).max())  # tokens after the image do not affect it
        mask = model.omni_mask(spans, end)
        embeds, time_embeds = model.embed_sequence(tokens[:, :end], mixed, t, spans)
        velocity: Tensor = model.velocity(model.backbone(embeds, mask), time_embeds, mask, spans, mixed.shape)
        return velocity

    def answered(self, model: Any, latents: Tensor, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        words, device = layout(), latents.device
        asked = []
        for question in questions:
            before, after = words.question(question.text)
            image = [words.boi, *[words.img_pad] * words.image_tokens]
            asked.append([*before[0].tolist(), *image, *after[0, 1:].tolist()])
        tokens, predicting = with_answers(asked, questions, device)
        offset = len(words.before_image) + 1
        spans = torch.tensor([[[offset, words.image_tokens]]], device=device).expand(len(tokens), 1, 2)
        embeds, _ = model.embed_sequence(tokens, latents, torch.ones(len(tokens), device=device), spans)
        late = spans + torch.tensor([1, 0], device=device)  # the span starts one token late, as upstream answers
        hidden = model.backbone(embeds, model.omni_mask(late, tokens.shape[1]))
        states, chosen = hidden[:, :-1][predicting], tokens[:, 1:][predicting]
        return model.showo.lm_head(states), chosen

    def generate(
        self,
        model: Any,
        prompts: Sequence[str],
        noise: Tensor,
        steps: int | None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        device = model.showo.model.embed_tokens.weight.device
        inputs = layout().generation(list(prompts), device)
        latents = sample(
            model,
            noise.to(device),
            **vars(inputs),
            steps=steps,
            guidance_scale=self.guidance,
            time_shifting_factor=SHIFT,
            callback=callback,
        )
        assert isinstance(latents, Tensor)
        return latents

    def answer(self, model: Any, latents: Tensor, question: Question) -> tuple[str, list[int]]:
        words = layout()
        device = model.showo.model.embed_tokens.weight.device
        before, after = (tokens.to(device) for tokens in words.question(question.text))
        given = answer_tokens(
            model, latents.to(device), before, after, max_new_tokens=ANSWER_TOKENS, eos_token=words.eos
        )
        return words.answer(given), given.tolist()

    def generation_sample(self, latents: Tensor, prompt: str) -> GenerationSample:
        return GenerationSample(latents=latents, **vars(layout().generation([prompt])))

    def understanding_sample(self, latents: Tensor, question: Question) -> UnderstandingSample:
        words = layout()
        before, after = words.question(question.text)
        answer = torch.tensor([words.encode(question.answer)], dtype=torch.int64)
        return UnderstandingSample(latents, before, torch.cat([after, answer], dim=1), answer.shape[1])

    def geometry(self, prompt: str) -> Geometry:
        rows = layout().generation([prompt])
        prefix, span = (int(value) for value in rows.modality_positions[0, 0])
        return Geometry(prefix, span, rows.text_tokens.shape[1])


SUBJECT = _Showo2()
