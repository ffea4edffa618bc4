"""JanusFlow's outputs compared with upstream's."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..comparison import Accelerated, Comparison, Fixture, compared, each, same
from .config import JanusFlowConfig
from .images import image_span
from .model import JanusFlow
from .sampling import DenseStepper, SampleInputs, sample
from .understanding import answer_tokens, answer_tokens_batch

__all__ = ["comparisons", "model_of"]


def model_of(fixture: Fixture) -> JanusFlow:
    """The model that upstream ran."""
    return fixture.loaded(JanusFlow(JanusFlowConfig(**fixture.spec["model"])))


@torch.no_grad()
def comparisons(fixture: Fixture, accelerate: Accelerated, dense: bool) -> Iterator[Comparison]:
    """Everything in the folder; dense: also what an accelerated model does not compute by itself."""
    model, spec = model_of(fixture), fixture.spec
    drawn, asked = fixture.tensors("t2i"), fixture.tensors("mmu")
    pad, most = spec["token_ids"]["pad"], spec["mmu"]["max_new_tokens"]
    with accelerate(model):
        for i, draw in enumerate(spec["draws"]):
            noise, tokens = drawn[f"noise.{i}"], drawn[f"tokens.{i}"]
            arguments = {"steps": draw["steps"], "guidance_scale": draw["guidance"], "pad_token": pad}
            latents, velocity = sample(model, noise, tokens, **arguments, return_velocity=True)
            yield each(f"draw {i}: velocity", velocity, drawn[f"velocity.{i}"])
            yield compared(f"draw {i}: latents", latents, drawn[f"latents.{i}"])
            if dense:
                stepper = DenseStepper(model, SampleInputs.build(model, noise, tokens, **arguments))
                stepper.step(0)
                yield compared(f"draw {i}: language model's output", stepper.hidden, drawn[f"llm_output.{i}"])
                branches = stepper.branches.chunk(2)
                for name, own in zip(("cond", "uncond"), branches, strict=len(branches) > 1):
                    yield compared(f"draw {i}: first velocity, {name}", own, drawn[f"velocity_{name}.{i}"][0])
        pixels = [asked[f"pixel_values.{i}"].flatten(0, 1) for i in range(len(spec["mmu"]["questions"]))]
        for i, own in enumerate(pixels):
            tokens, expected = asked[f"tokens.{i}"], asked[f"output_tokens.{i}"][0]
            yield same(f"question {i}: words", answer_tokens(model, own, tokens, most), expected)
            if dense:
                yield from _prompt(model, i, asked, own)
        if "batch.tokens" in asked:
            rows = zip(asked["batch.tokens"], asked["batch.attention_mask"].bool(), strict=True)
            answers = answer_tokens_batch(model, torch.cat(pixels), [row[seen][None] for row, seen in rows], most)
            yield same("questions together: words", torch.stack(answers), asked["batch.output_tokens"])


def _prompt(model: JanusFlow, i: int, asked: dict[str, torch.Tensor], pixels: torch.Tensor) -> Iterator[Comparison]:
    tokens, llm = asked[f"tokens.{i}"], model.language_model
    start, count = image_span(model, tokens)
    embeds = llm.model.embed_tokens(tokens)
    embeds[:, start : start + count] = model.embed_image(pixels)
    yield compared(f"question {i}: image features", model.image_features(pixels), asked[f"image_features.{i}"])
    yield compared(f"question {i}: embeddings", embeds, asked[f"input_embeds.{i}"])
    logits = llm(inputs_embeds=embeds, use_cache=False).logits[:, -1]
    yield compared(f"question {i}: first logits", logits, asked[f"first_logits.{i}"])
