"""The device memory for generating images of one shape: allocated once, reloaded for every image.

All inputs and outputs of an evaluation have fixed addresses, so a captured evaluation can be replayed for the next step,
prompt and image. Prompt lengths and the step number are therefore values in this memory, not arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.adapter import Adapter
from ..models.masks import additive, causal, seen_slots
from ..models.sampling import Segment
from ..ops.kernel_sets import KernelSet
from ..planning.config import FlashUConfig
from ..planning.groups import HeadCaching, TokenSkip
from .head_cache import AdaptiveGate, HeadCache
from .history import MEASUREMENTS
from .modules.attention import Rope, RowGeometry, SpanPass, rope_table
from .token_router import TokenRouter

__all__ = ["ImageMemory", "ImageShape", "joined", "joined_early", "joined_rope"]

PREFIX_STEP, TIMES_STEP = 64, 64
"""Reusable memory rounds its capacity for prompts and times up to multiples of these, so most later images fit."""

SLOT_STEP = 16
"""Attention needs aligned mask rows; an unaligned length would cost a copy in every layer."""


def rounded_up(count: int, step: int) -> int:
    """The smallest multiple of step >= count."""
    return -(-count // step) * step


def joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors of several images in one; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def joined_rope(tables: Sequence[tuple[Rope, int]]) -> Rope:
    """The first rows of several rotary tables in one."""
    return joined([rope[0][:rows] for rope, rows in tables]), joined([rope[1][:rows] for rope, rows in tables])


def joined_early(memories: Sequence[tuple[ImageMemory, int]]) -> Tensor | None:
    """The first rows of several memories' `early` in one; None where the model computes none."""
    own = [memory.early[:rows] for memory, rows in memories if memory.early is not None]
    return joined(own) if own else None


@dataclass(frozen=True)
class ImageShape:
    """What images must have in common to be generated in the same memory."""

    rows: int
    """Rows of an evaluation, both guidance branches included."""
    images: int
    """Latents."""
    latent_size: tuple[int, int]
    """(H, W)."""
    length: int
    """Tokens of a whole row: text, image and padding."""
    prefix: int
    """Capacity for text tokens before the image."""
    times: int
    """Capacity for evaluations, or for rows with a time each."""

    def rounded(self) -> ImageShape:
        """With capacity for other prompts and steps."""
        return ImageShape(
            self.rows,
            self.images,
            self.latent_size,
            self.length,
            min(rounded_up(self.prefix, PREFIX_STEP), self.length),
            rounded_up(self.times, TIMES_STEP),
        )

    def holds(self, other: ImageShape) -> bool:
        """Whether memory of this shape serves images of another shape."""
        same = (self.rows, self.images, self.latent_size, self.length)
        return (
            same == (other.rows, other.images, other.latent_size, other.length)
            and self.prefix >= other.prefix
            and self.times >= other.times
        )


class ImageMemory:
    """Memory for images of one shape.

    Attributes:
        shape: what it was allocated for.
        config: of its images.
        span: tokens of the image span.
        sizes: of what an evaluation computes.
        text_tokens: int64 [rows, length].
        spans: int64 [rows, 1, 2], (offset, length) of each row's span.
        latents: fp32 [rows, channels, H, W]; where guided rows share one latent, the first `images` are used.
        time_rows: int64 [rows], each row's index into the time tables.
        time_token: [times, hidden].
        modulation: [times, ...], see `Adapter.modulation`.
        scale, dt: fp32 [times], guidance scale and time step of every evaluation.
        llm, head: keys and values [layers, 2, rows, span + prefix, kv_heads, head_dim] of the language model and the head.
        llm_rope, head_rope: rotary tables of the span.
        text_rope, head_text_rope: rotary tables of positions 0 and up.
        mask: additive [rows, 1, 1 or span, span + prefix], or None where the whole span is seen and the host knows the prefixes.
        fixed: prompt lengths are read on the device.
        seen: int64 [rows], the tokens before each row's span that it sees.
        hidden: output of the language model [rows, span, hidden], consumed by the head.
        velocity: output of the head [rows, *sizes.velocity].
        importance: fp32 [layers], the last measurement.
        early: [rows, *sizes.early], or None where the model computes none.
        features: the encoder's [rows, patches, width] where later evaluations reuse them, else None.
        place: what the encoder takes besides latents (`Adapter.place`).
        cache: the head's features for later steps.
        gate: the adaptive cache's signal.
        router: measured token importance.
        geometry: the rows' spans, on the host; read where not `fixed`.
        context: what the rows see before their spans, where that is not `text_tokens`.
        trailing: embeddings of the tokens behind the patches [1, trail, hidden].
    """

    def __init__(self, parts: Adapter, config: FlashUConfig, shape: ImageShape, fixed: bool):
        """fixed: prompt lengths are read on the device, so captured work can be replayed for other prompts."""
        dtype, device = parts.dtype, parts.device
        self.shape = shape
        self.config = config
        self.sizes = sizes = parts.sizes(shape.latent_size)
        self.span = span = parts.lead + sizes.patches + parts.trail
        slots, rows = span + shape.prefix, shape.rows
        if fixed:
            slots = rounded_up(slots, SLOT_STEP)
        llm, head = parts.llm_attention, parts.head_attention

        def new(*sizes: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(sizes, dtype=of, device=device)

        self.text_tokens = new(rows, shape.length, of=torch.int64)
        self.spans = new(rows, 1, 2, of=torch.int64)
        self.latents = new(rows, parts.latent_channels, *shape.latent_size, of=torch.float32)
        self.time_rows = new(rows, of=torch.int64)
        self.time_token = new(shape.times, parts.hidden)
        self.modulation = new(shape.times, sizes.modulation)
        self.scale, self.dt = new(shape.times, of=torch.float32), new(shape.times, of=torch.float32)
        # Zeros, because unused slots are only masked: a NaN there would spread.
        self.llm = new(len(parts.layers), 2, rows, slots, llm.kv_heads, llm.head_dim)
        self.head = new(len(parts.blocks), 2, rows, slots, head.kv_heads, head.head_dim)
        self.llm_rope: Rope = (new(rows, span, llm.head_dim), new(rows, span, llm.head_dim))
        self.head_rope: Rope = (new(rows, span, head.head_dim), new(rows, span, head.head_dim))
        positions = torch.arange(shape.length, device=device)[None]
        self.text_rope = rope_table(parts.llm_rope, positions, dtype)
        if parts.head_rope is not None:
            self.head_text_rope = rope_table(parts.head_rope, positions[:, : max(shape.prefix, 1)], dtype)
        else:
            self.head_text_rope = (self.text_rope[0][:, :0], self.text_rope[1][:, :0])
        # A bidirectional span needs a mask only where prefix lengths are read on the device.
        queries = span if parts.causal else 1
        self.mask = new(rows, 1, queries, slots) if fixed or parts.causal else None
        self.fixed = fixed
        self.seen = new(rows, of=torch.int64)
        self.hidden = new(rows, span, parts.hidden)
        self.velocity = new(rows, *sizes.velocity)
        self.importance = new(len(parts.layers), of=torch.float32)
        self.early = new(rows, *sizes.early) if sizes.early else None
        shared = config.encoder is not None and config.encoder.on and sizes.features > 0
        self.features = new(rows, sizes.patches, sizes.features) if shared else None
        self.place = new(1, sizes.patches, sizes.features)
        caching = config.head or HeadCaching()
        caches = caching.adaptive or caching.interval > 1
        self.cache = HeadCache(
            [new(caching.order + 1, count, span, sizes.cached) for count in ({rows, shape.images} if caches else ())]
        )
        signal = (rows, sizes.patches, sizes.signal) if caching.adaptive else (0,)
        self.gate = AdaptiveGate(caching.budget, new(*signal), new(of=torch.float32))
        tokens = config.tokens or TokenSkip(0.0, on=False)
        measured = (MEASUREMENTS, len(parts.layers), rows, span) if tokens.on else (0,)
        self.router = TokenRouter(tokens.count(sizes.patches), parts.lead, new(*measured, of=torch.float32))
        self.geometry = RowGeometry((0,) * rows, span)
        self.trailing = new(1, parts.trail, parts.hidden)
        self.context: Sequence[Sequence[Segment]] | None = None

    @property
    def offsets(self) -> Tensor:
        """int64 [rows], the first position of each row's span."""
        return self.spans[:, 0, 0]

    def load(
        self,
        parts: Adapter,
        text_tokens: Tensor,
        spans: Tensor,
        geometry: RowGeometry,
        context: Sequence[Sequence[Segment]] | None = None,
        trailing: Tensor | None = None,
    ) -> None:
        """Prepare the memory for a new image.

        Args:
            text_tokens: int64 [rows, length].
            spans: int64 [rows, 1, 2], on the device.
            geometry: the same on the host; its prefixes must fit `shape.prefix`.
            context, trailing: see `DrawInputs`.
        """
        self.geometry, self.context = geometry, context
        self.text_tokens.copy_(text_tokens)
        self.spans.copy_(spans)
        along = torch.zeros if parts.flat else torch.arange
        positions = self.offsets[:, None] + along(self.span, dtype=torch.int64, device=self.offsets.device)
        dtype = self.hidden.dtype
        for mine, module in ((self.llm_rope, parts.llm_rope), (self.head_rope, parts.head_rope)):
            if module is None:
                continue
            for table, values in zip(mine, rope_table(module, positions, dtype), strict=True):
                table.copy_(values)
        if trailing is not None:
            self.trailing.copy_(trailing)
        self.seen.copy_(torch.tensor(geometry.prefix, dtype=torch.int64, device="cpu"))
        if self.mask is not None:
            slots, span = self.mask.shape[3], self.span
            allowed = seen_slots(self.seen + span, slots).expand(-1, -1, self.mask.shape[2], -1)
            if parts.causal:
                inside = torch.ones(span, slots, dtype=torch.bool, device=allowed.device)
                inside[:, :span] = causal(span, allowed.device)
                allowed = allowed & inside
            self.mask.copy_(additive(allowed, dtype))
        if self.sizes.features:
            self.place.copy_(parts.place(self.shape.latent_size))

    def prefix(self, rows: int) -> tuple[Tensor, Tensor]:
        """The prefix slots of the first `rows` rows in `llm` and in `head`."""
        slots = slice(self.span, self.span + self.shape.prefix)
        return self.llm[:, :, :rows, slots], self.head[:, :, :rows, slots]

    def groups(self, rows: int) -> int | None:
        """Attention calls that the first `rows` rows need; None where prompt lengths are read on the device."""
        return None if self.fixed else self.geometry.first(rows).groups()

    def span_pass(self, cache: Tensor, rows: int, kernels: KernelSet) -> SpanPass:
        """The attention pass for the spans of the first `rows` rows. cache: `llm` or `head`."""
        mask = self.mask[:rows] if self.mask is not None else None
        return SpanPass(cache[:, :, :rows], None if self.fixed else self.geometry.first(rows), kernels, mask)

    def _purposes(self) -> Iterator[tuple[str, Tensor | None]]:
        for tensor in (self.llm, self.head, self.mask):
            yield "keys and values", tensor
        for tensor in (self.time_token, self.modulation, self.scale, self.dt, self.time_rows):
            yield "time tables", tensor
        for tensor in (*self.llm_rope, *self.head_rope, *self.text_rope, *self.head_text_rope, self.place):
            yield "positions", tensor
        for tensor in (
            self.text_tokens,
            self.spans,
            self.latents,
            self.early,
            self.hidden,
            self.velocity,
            self.importance,
        ):
            yield "activations", tensor
        yield "encoder cache", self.features

    def nbytes(self) -> dict[str, int]:
        """Bytes by purpose."""
        result: dict[str, int] = {}
        for purpose, tensor in self._purposes():
            if tensor is not None:
                result[purpose] = result.get(purpose, 0) + tensor.nbytes
        result["head cache"] = self.cache.nbytes() + self.gate.nbytes()
        result["token routing"] = self.router.nbytes()
        return {purpose: count for purpose, count in result.items() if count}
