"""The device memory that images of one shape are drawn in: allocated once, loaded anew for every image.

What evaluations read and write lies at fixed addresses, so that a captured evaluation can be replayed for the next step,
prompt and image. Lengths of prompts and the number of the step are values in this memory, not in the code that runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.masks import slot_mask
from ..models.parts import Showo2Parts, position_table
from ..ops.kernel_sets import KernelSet
from ..planning.config import FlashUConfig
from .head_cache import AdaptiveGate, HeadCache
from .history import MEASUREMENTS
from .modules.attention import Rope, RowGeometry, SpanPass, rope_table
from .token_router import TokenRouter

__all__ = ["Shape", "Workspace"]

PREFIX_STEP, TIMES_STEP = 64, 64
"""Where memory is kept for the next image, room for prompts and times is rounded up to these, so that most images fit."""

SLOT_STEP = 16
"""A mask's rows are read in wide pieces, which a length of odd numbers would have copied for every layer."""


def rounded_up(count: int, step: int) -> int:
    """The first multiple of step that is not below count."""
    return -(-count // step) * step


@dataclass(frozen=True)
class Shape:
    """What images must have in common to be drawn in the same memory.

    Attributes:
        rows: of an evaluation, both branches of guidance counted. images: latents.
        latent_size: (H, W). length: of the rows of text tokens.
        prefix: room for text tokens before the image. times: room for evaluations, or for rows with times of their own.
    """

    rows: int
    images: int
    latent_size: tuple[int, int]
    length: int
    prefix: int
    times: int

    def rounded(self) -> Shape:
        """With room for other prompts and steps."""
        return Shape(
            self.rows,
            self.images,
            self.latent_size,
            self.length,
            min(rounded_up(self.prefix, PREFIX_STEP), self.length),
            rounded_up(self.times, TIMES_STEP),
        )

    def holds(self, other: Shape) -> bool:
        """Whether images of another shape can be drawn in memory of this one."""
        same = (self.rows, self.images, self.latent_size, self.length)
        return (
            same == (other.rows, other.images, other.latent_size, other.length)
            and self.prefix >= other.prefix
            and self.times >= other.times
        )


class Workspace:
    """Memory for images of one shape.

    Attributes:
        shape: what it is for. span: tokens of the image span. grid: patches, (rows, columns).
        text_tokens: int64 [rows, length]. spans: int64 [rows, 1, 2], (offset, length) of each row's span.
        latents: fp32 [rows, channels, H, W]; where guided rows share one latent the first `images` are used.
        time_rows: int64 [rows], the rows of the time tables in force.
        time_token, modulation: tables [times, ...] of the time token and of the head's modulation.
        scale, dt: fp32 [times], guidance scale and time step of every evaluation.
        llm, head: keys and values [layers, 2, rows, span + prefix, kv_heads, head_dim] of the language model and the head.
        llm_rope, head_rope: of the span. text_rope, head_text_rope: of positions 0 and up.
        mask: additive [rows, 1, 1, span + prefix], where lengths are read on the device, else None.
        hidden: the language model's result [rows, span, hidden], consumed by the head.
        velocity: the head's [rows, patches, patch * patch * channels].
        importance: fp32 [layers], of the last measurement.
        semantic: the encoder's features [rows, patches, clip] where later evaluations use them again, else None.
        cache, gate, router: what later steps use again of the head, of the adaptive cache's signal, of measured tokens.
        geometry: where the rows' spans lie, on the host; read where `mask` is None.
    """

    def __init__(self, parts: Showo2Parts, config: FlashUConfig, shape: Shape, fixed: bool):
        """fixed: lengths of prompts are read on the device, so that captured work can be replayed for other prompts."""
        dtype, device = parts.dtype, parts.device
        self.shape = shape
        height, width = shape.latent_size
        self.grid = (height // parts.patch_size, width // parts.patch_size)
        patches = self.grid[0] * self.grid[1]
        self.span = span = patches + parts.has_time_token
        slots, rows = span + shape.prefix, shape.rows
        if fixed:
            slots = rounded_up(slots, SLOT_STEP)
        llm, head = parts.llm_attention, parts.head_attention
        first_block = parts.blocks[0]
        clip = int(parts.position_embedding.weight.shape[1])
        modulation = sum(int(b.adaLN_modulation[-1].weight.shape[0]) for b in (*parts.blocks, parts.final_layer))

        def new(*sizes: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(sizes, dtype=of, device=device)

        self.text_tokens = new(rows, shape.length, of=torch.int64)
        self.spans = new(rows, 1, 2, of=torch.int64)
        self.latents = new(rows, parts.latent_channels, height, width, of=torch.float32)
        self.time_rows = new(rows, of=torch.int64)
        self.time_token = new(shape.times, parts.hidden)
        self.modulation = new(shape.times, modulation)
        self.scale, self.dt = new(shape.times, of=torch.float32), new(shape.times, of=torch.float32)
        # Zeros: a slot that a row does not use is masked, and must not hold a NaN.
        self.llm = new(len(parts.layers), 2, rows, slots, llm.kv_heads, llm.head_dim)
        self.head = new(len(parts.blocks), 2, rows, slots, head.kv_heads, head.head_dim)
        self.llm_rope: Rope = (new(rows, span, llm.head_dim), new(rows, span, llm.head_dim))
        self.head_rope: Rope = (new(rows, span, head.head_dim), new(rows, span, head.head_dim))
        positions = torch.arange(shape.length, device=device)[None]
        self.text_rope = rope_table(parts.llm_rope, positions, dtype)
        self.head_text_rope = rope_table(first_block.self_attn.rotary_emb, positions[:, : max(shape.prefix, 1)], dtype)
        self.mask = new(rows, 1, 1, slots) if fixed else None
        self.hidden = new(rows, span, parts.hidden)
        self.velocity = new(rows, patches, parts.patch_size**2 * parts.latent_channels)
        self.importance = new(len(parts.layers), of=torch.float32)
        self.semantic = new(rows, patches, clip) if config.encoder_cache else None
        self.positions = new(1, patches, clip)
        caches = config.adaptive_cache or config.head_cache_interval > 1
        width = int(first_block.input_layernorm.weight.shape[0])
        self.cache = HeadCache(
            [
                new(config.head_forecast_order + 1, count, span, width)
                for count in ({rows, shape.images} if caches else ())
            ]
        )
        signal = (rows, patches, parts.hidden) if config.adaptive_cache else (0,)
        self.gate = AdaptiveGate(config.adaptive_cache_budget, new(*signal), new(of=torch.float32))
        measured = (MEASUREMENTS, len(parts.layers), rows, span) if config.token_skip else (0,)
        skipped = int(patches * config.token_skip_ratio)
        self.router = TokenRouter(skipped, parts.has_time_token, new(*measured, of=torch.float32))
        self.geometry = RowGeometry((0,) * rows, span)

    @property
    def offsets(self) -> Tensor:
        """int64 [rows], where each row's span begins."""
        return self.spans[:, 0, 0]

    def load(self, parts: Showo2Parts, text_tokens: Tensor, spans: Tensor, geometry: RowGeometry) -> None:
        """An image begins.

        Args:
            text_tokens: int64 [rows, length]. spans: int64 [rows, 1, 2], on the device.
            geometry: the same on the host; prefixes no longer than there is room for.
        """
        self.geometry = geometry
        self.text_tokens.copy_(text_tokens)
        self.spans.copy_(spans)
        positions = self.offsets[:, None] + torch.arange(self.span, device=self.offsets.device)
        dtype = self.hidden.dtype
        for mine, module in ((self.llm_rope, parts.llm_rope), (self.head_rope, parts.blocks[0].self_attn.rotary_emb)):
            for table, values in zip(mine, rope_table(module, positions, dtype), strict=True):
                table.copy_(values)
        if self.mask is not None:
            self.mask.copy_(slot_mask(self.offsets + self.span, self.mask.shape[3], dtype))
        self.positions.copy_(position_table(parts, *self.grid))

    def prefix(self, rows: int) -> tuple[Tensor, Tensor]:
        """The part of `llm` and of `head` that holds the prefixes of the first `rows` rows."""
        slots = slice(self.span, self.span + self.shape.prefix)
        return self.llm[:, :, :rows, slots], self.head[:, :, :rows, slots]

    def groups(self, rows: int) -> int | None:
        """Calls of attention that the first `rows` rows need, where the prompts' lengths are read on the host; else None."""
        return None if self.mask is not None else len(self.geometry.first(rows).groups())

    def span_pass(self, cache: Tensor, rows: int, kernels: KernelSet) -> SpanPass:
        """The attention of the first `rows` rows' spans over `llm` or `head`."""
        mask = self.mask[:rows] if self.mask is not None else None
        return SpanPass(cache[:, :, :rows], self.geometry.first(rows), kernels, mask)

    def _purposes(self) -> Iterator[tuple[str, Tensor | None]]:
        for tensor in (self.llm, self.head, self.mask):
            yield "keys and values", tensor
        for tensor in (self.time_token, self.modulation, self.scale, self.dt, self.time_rows):
            yield "time tables", tensor
        for tensor in (*self.llm_rope, *self.head_rope, *self.text_rope, *self.head_text_rope, self.positions):
            yield "positions", tensor
        for tensor in (self.text_tokens, self.spans, self.latents, self.hidden, self.velocity, self.importance):
            yield "activations", tensor
        yield "encoder cache", self.semantic

    def nbytes(self) -> dict[str, int]:
        """Bytes by purpose."""
        result: dict[str, int] = {}
        for purpose, tensor in self._purposes():
            if tensor is not None:
                result[purpose] = result.get(purpose, 0) + tensor.nbytes
        result["head cache"] = self.cache.nbytes() + self.gate.nbytes()
        result["token routing"] = self.router.nbytes()
        return {purpose: count for purpose, count in result.items() if count}
