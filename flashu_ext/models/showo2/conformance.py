"""Show-o2's outputs compared with upstream's, and FlashU's with its settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...planning.config import FlashUConfig
from ...planning.plan import TaskPlan
from ..comparison import Accelerated, Comparison, Fixture, compared, each, same
from ..masks import additive
from .config import Showo2Config
from .model import Showo2
from .sampling import sample
from .understanding import answer_tokens, prompt_embeds

__all__ = ["comparisons", "flashu_config", "flashu_plan", "model_of"]

_INPUTS = ("noise", "text_tokens", "text_tokens_null", "modality_positions", "modality_positions_null")
_QUESTION = ("image_latents", "tokens_before_image", "tokens_after_boi")


def config_of(sizes: dict[str, Any]) -> Showo2Config:
    """Of a fixture's `model`."""
    m = sizes
    return Showo2Config(
        llm={
            "hidden_size": m["hidden"],
            "intermediate_size": m["inter"],
            "num_hidden_layers": m["layers"],
            "num_attention_heads": m["heads"],
            "num_key_value_heads": m["kv"],
            "vocab_size": m["vocab"],
            "rope_theta": m["rope_theta"],
            "rms_norm_eps": m["rms_norm_eps"],
            "tie_word_embeddings": m["tie_word_embeddings"],
        },
        vision={
            "hidden_size": m["clip"],
            "intermediate_size": 4 * m["clip"],
            "num_hidden_layers": m["clip_layers"] - 1,
            "num_attention_heads": 4,
        },
        head={
            "hidden_size": m["head_hidden"],
            "intermediate_size": m["head_inter"],
            "num_attention_heads": m["head_heads"],
            "num_key_value_heads": m["head_kv"],
            "head_dim": m["head_dim"],
            "num_layers": m["nd"],
        },
        image_latent_dim=m["image_latent_dim"],
        image_latent_height=m["grid"],
        image_latent_width=m["grid"],
        patch_size=m["patch_size"],
    )


def model_of(fixture: Fixture) -> Showo2:
    """The model that upstream ran."""
    return fixture.loaded(Showo2(config_of(fixture.spec["model"])))


def flashu_config(fixture: Fixture, **overrides: Any) -> FlashUConfig:
    """The settings of FlashU's run."""
    f = fixture.spec["flashu"]
    settings: dict[str, Any] = {
        "ffn_prune_ratio": f["r_p"],
        "full_network_steps": f["tau"],
        "layer_skip_ratio": f["r_LS"],
        "layer_skip_interval": f["T_LS"],
        "head_cache_interval": f["T_cache"],
        "steps": f["steps"],
        "guidance": [tuple(phase) for phase in f["schedule"]],
    }
    return FlashUConfig.paper(**{**settings, **overrides})


def flashu_plan(fixture: Fixture) -> TaskPlan:
    """The neurons of FlashU's run."""
    flashu = fixture.tensors("flashu")
    scores = [flashu[f"score.{i}"] for i in range(fixture.spec["model"]["layers"])]
    return TaskPlan.from_scores(generation=scores, ratio=fixture.spec["flashu"]["r_p"], multiple=64)


@torch.no_grad()
def comparisons(fixture: Fixture, accelerate: Accelerated, dense: bool) -> Iterator[Comparison]:
    """Everything in the folder; dense: also what an accelerated model does not compute by itself."""
    model, spec = model_of(fixture), fixture.spec
    drawn, asked, flashu = (fixture.tensors(name) for name in ("t2i", "mmu", "flashu"))
    inputs: dict[str, Any] = {name: drawn[name] for name in _INPUTS}
    inputs |= {name: spec[name] for name in ("guidance_scale", "time_shifting_factor")}
    question: dict[str, Any] = {name: asked[name] for name in _QUESTION}
    with accelerate(model):
        latents, velocity = sample(model, **inputs, steps=spec["num_steps"], return_velocity=True)
        yield each("drawing: velocity", velocity, drawn["velocity"])
        yield compared("drawing: latents", latents, drawn["latents"])
        most = spec["mmu"]["max_new_tokens"]
        yield same("question: words", answer_tokens(model, **question, max_new_tokens=most), asked["output_tokens"])
        if dense:
            embeds, allowed = prompt_embeds(model, *question.values())
            yield compared("question: embeddings", embeds, asked["input_embeds"])
            hidden = model.backbone(embeds, additive(allowed, embeds.dtype)[None, None])
            yield compared("question: first logits", model.showo.lm_head(hidden[:, -1]), asked["first_logits"])
    if flashu and not dense:
        # FlashU chooses layers by an average over the batch.
        config = flashu_config(fixture, batch_invariant=False)
        with accelerate(model, config, flashu_plan(fixture)):
            latents, velocity = sample(model, **inputs, return_velocity=True)
            yield each("FlashU's drawing: velocity", velocity, flashu["velocity"])
            yield compared("FlashU's drawing: latents", latents, flashu["latents"])
