"""BAGEL's outputs compared with upstream's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..comparison import Accelerated, Comparison, Fixture, compared, each, same
from .config import BagelConfig
from .latents import grid_of
from .model import Bagel, Image, Text
from .sampling import TaylorSeer, branch_contexts, check_inputs, sample
from .understanding import answer_tokens

__all__ = ["comparisons", "model_of"]

_SETTINGS = (
    "num_timesteps",
    "cfg_text_scale",
    "cfg_img_scale",
    "cfg_interval",
    "timestep_shift",
    "cfg_renorm_min",
    "cfg_renorm_type",
)
_BRANCHES = (
    ("velocity_cond", None),
    ("velocity_without_text", "text_guided"),
    ("velocity_without_image", "image_guided"),
)


def model_of(fixture: Fixture) -> Bagel:
    """The model that upstream ran."""
    return fixture.loaded(Bagel(BagelConfig(**fixture.spec["model"])))


@torch.no_grad()
def comparisons(fixture: Fixture, accelerate: Accelerated, dense: bool) -> Iterator[Comparison]:
    """Everything in the folder; dense: also what an accelerated model does not compute by itself."""
    model, spec = model_of(fixture), fixture.spec
    drawn, edited, seen = (fixture.tensors(name) for name in ("t2i", "edit", "taylorseer"))
    with accelerate(model):
        for i, draw in enumerate(spec.get("draws", ())):
            yield from _drawing(model, spec, f"draw {i}", draw, tuple(draw["size"]), [], drawn, f".{i}", dense)
        for i, edit in enumerate(spec.get("edits", ())):
            image = Image(*(edited[f"{name}.{i}"] for name in ("image_latents", "vit_tokens", "vit_position_ids")))
            pixels = spec["model"]["vae_downsample"]
            size = tuple(pixels * side for side in edited[f"image_latents.{i}"].shape[2:])
            yield from _drawing(model, spec, f"edit {i}", edit, size, [image], edited, f".{i}", dense)
        if draw := spec.get("taylorseer"):
            seer = TaylorSeer(draw["max_order"], draw["first_enhance"], draw["fresh_threshold"])
            for turn in ("", " again"):  # its state is the image's own
                name = f"TaylorSeer{turn}"
                yield from _drawing(model, spec, name, draw, tuple(draw["size"]), [], seen, "", False, taylorseer=seer)
        yield from _answers(model, fixture, dense)


def _drawing(
    model: Bagel,
    spec: Mapping[str, Any],
    name: str,
    draw: Mapping[str, Any],
    size: Any,
    before: list[Image],
    expected: Mapping[str, Tensor],
    suffix: str,
    dense: bool,
    **arguments: Any,
) -> Iterator[Comparison]:
    inputs: list[Text | Image] = [*before, Text(torch.tensor(draw["prompt"]))]
    settings = {key: draw[key] for key in _SETTINGS}
    noise = expected[f"noise{suffix}"]
    tokens, velocity = sample(
        model, noise, inputs, size, spec["token_ids"], **settings, **arguments, return_velocity=True
    )
    yield each(f"{name}: velocity", velocity, expected[f"velocity{suffix}"])
    yield compared(f"{name}: latents", model.unpacked(tokens, size), expected[f"latents{suffix}"])
    if not dense:
        return
    ids = check_inputs(model, inputs, spec["token_ids"])
    contexts = branch_contexts(model, inputs, ids)
    for (branch, guided), context in zip(_BRANCHES, contexts, strict=True):
        own = expected.get(f"{branch}{suffix}", expected[f"noise{suffix}"][:0])
        at = range(len(own)) if guided is None else torch.nonzero(expected[f"{guided}{suffix}"]).flatten().tolist()
        trajectory, times = (expected[f"{key}{suffix}"] for key in ("trajectory", "timesteps"))
        got = [
            model.velocity(model.hidden(trajectory[k], times[k : k + 1], grid_of(size, model.config), context, ids))
            for k in at
        ]
        if got:
            yield each(f"{name}: {branch}", torch.stack(got), own)


def _answers(model: Bagel, fixture: Fixture, dense: bool) -> Iterator[Comparison]:
    asked, mmu = fixture.tensors("mmu"), fixture.spec["mmu"]
    for i, question in enumerate(mmu["questions"]):
        tokens, places = asked[f"vit_tokens.{i}"], asked[f"vit_position_ids.{i}"]
        inputs: list[Text | Image] = [Image(None, tokens, places), Text(torch.tensor(question["prompt"]))]
        words, logits = answer_tokens(
            model, inputs, fixture.spec["token_ids"], mmu["max_new_tokens"], stop=False, return_logits=True
        )
        yield same(f"question {i}: words", words, asked[f"output_tokens.{i}"])
        yield compared(f"question {i}: first logits", logits[0], asked[f"first_logits.{i}"])
        yield each(f"question {i}: logits", logits, asked[f"logits.{i}"])
        if dense:
            features = model.vit_model(tokens, places)
            yield compared(f"question {i}: image features", features, asked[f"vit_features.{i}"])
            yield compared(f"question {i}: connector", model.connector(features), asked[f"connector_output.{i}"])
