"""Checks of call inputs, before anything runs. Torch only: the runtime uses it on upstream models too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_eos, check_sampling, check_tensor, check_tokens, guidance_scale_of
from ..velocity import Scale, guided
from .positions import stored_table, table_side

__all__ = ["check_answer_inputs", "check_mmu_inputs", "check_sample_inputs", "check_t2i_inputs"]


def _latents(name: str, value: Any, model: Any, device: torch.device) -> tuple[int, int]:
    """Checks latents and returns (rows, patches)."""
    check_tensor(name, value, 4, "a floating-point tensor", device)
    channels, patch = int(model.image_embedder_gen.proj.in_channels), int(model.config.patch_size)
    rows, got, height, width = value.shape
    if rows == 0:
        raise ValueError(f"{name}: expected at least one image, got an empty batch")
    if got != channels or height % patch or width % patch or height == 0 or width == 0:
        raise ValueError(
            f"{name}: expected [batch, {channels}, H, W] with H and W multiples of {patch}, got {tuple(value.shape)}"
        )
    table = model.position_embedding.weight.shape[0]
    patches = (height // patch) * (width // patch)
    if not stored_table(model, patches) and table_side(model) is None:
        raise ValueError(
            f"{name}: expected {table} patches as the model was built for, got {patches} ({tuple(value.shape)})"
        )
    return rows, patches


def _spans(name: str, value: Any, latents: tuple[str, int, int], length: int, model: Any, device: torch.device) -> None:
    """latents: the argument's name, its rows and their patches."""
    of, rows, patches = latents
    time = 1 if model.config.add_time_embeds else 0
    span, own = patches + time, model.image_position_ids.shape[-1]
    check_tensor(name, value, 3, "int64", device)
    if tuple(value.shape) != (rows, 1, 2):
        raise ValueError(f"{name}: expected shape ({rows}, 1, 2), one (offset, length) a row, got {tuple(value.shape)}")
    for row, ((offset, got),) in enumerate(value.tolist()):
        if got == own + time != span:  # a span of the model's own size is rather meant than latents of another
            raise ValueError(f"{of}: expected {own} patches, as many as the span in {name}[{row}] has, got {patches}")
        if got != span:
            raise ValueError(f"{name}[{row}]: expected a span of {span} tokens for these latents, got {got}")
        if offset < 0 or offset + got > length:
            raise IndexError(
                f"{name}[{row}]: span [{offset}, {offset + got}) is outside the sequence of {length} tokens"
            )


def check_t2i_inputs(
    model: Any, image_latents: Tensor, t: Tensor, text_tokens: Tensor, modality_positions: Tensor, guided: bool
) -> None:
    """Inputs of one evaluation (`t2i_generate`). Raises TypeError, ValueError or IndexError naming the argument."""
    device = model.showo.model.embed_tokens.weight.device
    rows, patches = _latents("image_latents", image_latents, model, device)
    if guided and rows % 2:
        raise ValueError(f"image_latents: expected an even number of rows under guidance, got {rows}")
    check_tensor("t", t, 1, "a floating-point tensor", device)
    if t.shape[0] != rows:
        raise ValueError(f"t: expected {rows} times, one for each row, got {t.shape[0]}")
    check_tokens("text_tokens", text_tokens, rows, model.showo.model.embed_tokens)
    latents = ("image_latents", rows, patches)
    _spans("modality_positions", modality_positions, latents, text_tokens.shape[1], model, device)


def check_sample_inputs(
    model: Any,
    noise: Tensor,
    text_tokens: Tensor,
    text_tokens_null: Tensor | None,
    modality_positions: Tensor,
    modality_positions_null: Tensor | None,
    guidance_scale: Any,
    time_shifting_factor: float | None,
) -> Scale:
    """Inputs of a whole image (`sample`); returns the guidance scale. Raises TypeError, ValueError or IndexError naming the
    argument."""
    device = model.showo.model.embed_tokens.weight.device
    rows, patches = _latents("noise", noise, model, device)
    latents = ("noise", rows, patches)
    scale = guidance_scale_of(guidance_scale, rows)
    if time_shifting_factor is not None and (
        not isinstance(time_shifting_factor, (int, float)) or not 0 <= time_shifting_factor < float("inf")
    ):
        raise ValueError(f"time_shifting_factor: expected None or a finite number >= 0, got {time_shifting_factor!r}")
    check_tokens("text_tokens", text_tokens, rows, model.showo.model.embed_tokens)
    _spans("modality_positions", modality_positions, latents, text_tokens.shape[1], model, device)
    if guided(scale):
        if text_tokens_null is None or modality_positions_null is None:
            raise ValueError("text_tokens_null, modality_positions_null: expected tensors under guidance, got None")
        check_tokens("text_tokens_null", text_tokens_null, rows, model.showo.model.embed_tokens)
        if text_tokens_null.shape != text_tokens.shape:
            raise ValueError(
                f"text_tokens_null: expected shape {tuple(text_tokens.shape)} as text_tokens, got {tuple(text_tokens_null.shape)}"
            )
        _spans("modality_positions_null", modality_positions_null, latents, text_tokens.shape[1], model, device)
    return scale


def check_answer_inputs(
    model: Any,
    images: Sequence[Any],
    tokens_before_image: Any,
    tokens_after_boi: Any,
    max_new_tokens: int,
    eos_token: int | None = None,
    row: str = "",
) -> None:
    """Inputs of `answer_tokens`: one question and its images. row: its index in a batch, as '[3]', for messages."""
    device = model.showo.model.embed_tokens.weight.device
    length = 0
    for index, latents in enumerate(images):
        name = f"image_latents{row}" + (f"[{index}]" if len(images) > 1 else "")
        rows, patches = _latents(name, latents, model, device)
        length += patches + (3 if model.config.add_time_embeds else 2)  # with boi and eoi
        if rows != 1:
            raise ValueError(f"{name}: expected one image, got {rows}; several images of one question are a list")
    check_tokens(f"tokens_before_image{row}", tokens_before_image, 1, model.showo.model.embed_tokens)
    check_tokens(f"tokens_after_boi{row}", tokens_after_boi, 1, model.showo.model.embed_tokens)
    if tokens_after_boi.shape[1] < 2:
        raise ValueError(
            f"tokens_after_boi{row}: expected boi, eoi and a question, got {tokens_after_boi.shape[1]} tokens"
        )
    length += tokens_before_image.shape[1] + tokens_after_boi.shape[1] - 2
    limit = model.showo.config.max_position_embeddings
    if length > limit:
        raise ValueError(
            f"image_latents{row}, tokens_after_boi{row}: expected images and a question of at most {limit} tokens, which this "
            f"language model has positions for, got {length} of {len(images)} image{'s' if len(images) > 1 else ''}"
        )
    check_count("max_new_tokens", max_new_tokens)
    check_eos(eos_token)


def check_mmu_inputs(
    model: Any,
    input_embeds: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
) -> None:
    """Inputs of `mmu_generate` for one prompt."""
    weight = model.showo.model.embed_tokens.weight
    check_tensor("input_embeds", input_embeds, 3, "a floating-point tensor", weight.device)
    if input_embeds.shape[1] == 0 or input_embeds.shape[2] != weight.shape[1]:
        raise ValueError(f"input_embeds: expected [1, length >= 1, {weight.shape[1]}], got {tuple(input_embeds.shape)}")
    length = input_embeds.shape[1]
    if attention_mask.numel() != length * length or tuple(attention_mask.shape[-2:]) != (length, length):
        raise ValueError(f"attention_mask: expected [1, 1, {length}, {length}], got {tuple(attention_mask.shape)}")
    check_count("max_new_tokens", max_new_tokens)
    check_sampling(temperature, top_k, None)
    if temperature == 0:
        raise ValueError("temperature: expected a finite number > 0, got 0 (top_k=1 is greedy)")
