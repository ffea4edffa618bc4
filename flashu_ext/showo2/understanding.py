"""Room: Show-o2. Answers about an image in upstream's layout, dense, or through the handle where the model is accelerated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..structure import Showo2Parts, position_table
from . import validate

__all__ = ["answer_tokens", "prompt_embeds"]


def prompt_embeds(
    model: Any, image_latents: Tensor, tokens_before_image: Tensor, tokens_after_boi: Tensor
) -> tuple[Tensor, Tensor]:
    """Embeddings [1, length, hidden] and visibility bool [length, length] of a question about an image.

    Layout: tokens_before_image, boi, time token (t = 1), image, eoi, question. The bidirectional span starts one token late:
    it covers the image tokens and eoi, not the time token. Upstream evaluates its checkpoints so (inference_mmu.py).
    """
    from ..runtime.encoder import embed_image

    parts = Showo2Parts.find(model)
    height, width = (size // parts.patch_size for size in image_latents.shape[2:])
    image = embed_image(parts, image_latents, position_table(parts, height, width))
    return span_embeds(parts, image, tokens_before_image, tokens_after_boi)


def span_embeds(parts: Showo2Parts, image: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """`prompt_embeds` from an encoded image [1, patches, hidden]."""
    from ..runtime.encoder import embed_time

    embed = parts.embed_tokens
    pieces = [embed(before), embed(after[:, :1])]
    if parts.has_time_token:
        pieces.append(embed_time(parts, torch.ones(1, dtype=torch.float32, device=image.device))[1][:, None])
    embeds = torch.cat([*pieces, image, embed(after[:, 1:])], dim=1)
    late = 1 if parts.has_time_token else 0
    spans = torch.tensor([[[before.shape[1] + 1 + late, image.shape[1] + late]]], device=image.device)
    return embeds, validate.omni_allowed(spans, embeds.shape[1])[0]


@torch.no_grad()
def answer_tokens(
    model: Any,
    image_latents: Tensor,
    tokens_before_image: Tensor,
    tokens_after_boi: Tensor,
    max_new_tokens: int = 64,
    eos_token: int | None = None,
) -> Tensor:
    """Greedy answer to a question about an image.

    Args:
        model: a Showo2 (or upstream Showo2Qwen2_5) model, accelerated or not.
        image_latents: [1, channels, H, W].
        tokens_before_image: int64 [1, n], everything before boi. tokens_after_boi: int64 [1, m]: boi, eoi, question.
        max_new_tokens: upper bound. eos_token: stop after this token, which is part of the result.

    Returns:
        int64 [at most max_new_tokens].

    Raises:
        TypeError, ValueError, IndexError: an argument is wrong; it is named, with what was expected and what came.
    """
    from ..runtime import find_runner

    validate.check_answer_inputs(model, image_latents, tokens_before_image, tokens_after_boi, max_new_tokens)
    runner = find_runner(model)
    if runner is not None:
        return runner.answer_tokens(image_latents, tokens_before_image, tokens_after_boi, max_new_tokens, eos_token)
    embeds, allowed = prompt_embeds(model, image_latents, tokens_before_image, tokens_after_boi)
    mask = torch.zeros(allowed.shape, dtype=embeds.dtype, device=embeds.device)
    mask.masked_fill_(~allowed, torch.finfo(embeds.dtype).min)
    generate: Any = model.mmu_generate
    tokens = generate(
        input_embeds=embeds,
        attention_mask=mask[None, None],
        max_new_tokens=max_new_tokens,
        top_k=1,
        eos_token=eos_token,
    )
    return torch.stack(tokens) if tokens else torch.empty(0, dtype=torch.int64, device=embeds.device)
