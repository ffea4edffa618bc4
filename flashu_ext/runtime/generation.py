"""Room: runtime. Draws images: runs every evaluation as its step plan says, with text computed once and dead work left out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import FlashUConfig
from ..kernel_sets import KernelSet
from ..modules.attention import AttentionPass, CausalPass, KeyValue, MaskedPass, RowGeometry, SpanPass
from ..modules.decoder_layer import decoder_layer
from ..modules.head_block import final_layer, head_block
from ..schedule import Step, StepPlan
from ..structure import Showo2Parts, norm_eps, position_table
from .encoder import embed_image, embed_time
from .state import ImageState, PrefixCache, Rope, Variant

__all__ = ["TASK", "GenerationEngine"]

TASK = "generation"


class GenerationEngine:
    """Evaluates the velocity of images in progress. Holds no state of its own: every image has its `ImageState`."""

    def __init__(self, parts: Showo2Parts, config: FlashUConfig, kernels: KernelSet):
        self.parts = parts
        self.config = config
        self.kernels = kernels

    # ---- an image begins

    def plan(self, steps: int | None) -> StepPlan:
        """The step plan for `steps` grid points (None: the config's, or 50)."""
        return StepPlan.build(self.config, steps, len(self.parts.layers))

    def begin(
        self,
        plan: StepPlan,
        text_tokens: Tensor,
        modality_positions: Tensor,
        guided: bool,
        latent_size: tuple[int, int],
    ) -> ImageState:
        """Set up an image (or a batch of them).

        Args:
            text_tokens: int64 [rows, length]. modality_positions: int64 [rows, 1, 2]: (offset, length) of each row's span.
            guided: the second half of the rows is the unconditional one. latent_size: (H, W) of the latents.
        """
        parts = self.parts
        offsets = modality_positions[:, 0, 0].tolist()
        span = int(modality_positions[0, 0, 1])
        grid = (latent_size[0] // parts.patch_size, latent_size[1] // parts.patch_size)
        geometry = RowGeometry(tuple(offsets), span)
        position_ids = modality_positions[:, 0, :1] + torch.arange(span, device=text_tokens.device)
        llm, head = parts.llm_attention, parts.head_attention
        dtype, device = parts.dtype, parts.device
        return ImageState(
            plan=plan,
            text_tokens=text_tokens.clone(),
            modality_positions=modality_positions.clone(),
            geometry=geometry,
            guided=guided,
            llm_pass=SpanPass(geometry, len(parts.layers), llm.kv_heads, llm.head_dim, dtype, device),
            head_pass=SpanPass(geometry, len(parts.blocks), head.kv_heads, head.head_dim, dtype, device),
            llm_rope=self._rope(parts.llm_rope, position_ids),
            head_rope=self._rope(parts.blocks[0].self_attn.rotary_emb, position_ids),
            positions=position_table(parts, *grid),
            grid=grid,
        )

    def _rope(self, module: Callable[..., Rope], position_ids: Tensor) -> Rope:
        like = torch.empty(0, dtype=self.parts.dtype, device=self.parts.device)
        cos, sin = module(like, position_ids)
        return cos[:, :, None], sin[:, :, None]

    # ---- one evaluation

    def evaluate(self, state: ImageState, latents: Tensor, t: Tensor) -> Tensor:
        """Run the next evaluation of an image.

        Args:
            latents: [images, channels, H, W], or [rows, ...] where guided rows have latents of their own.
            t: fp32 [images or rows].

        Returns:
            Velocity rows before guidance, [rows, patches, patch * patch * channels].
        """
        parts = self.parts
        step = state.plan.at(state.step + 1)
        time, time_token = embed_time(parts, t)
        if step.backbone:
            span = embed_image(parts, latents, state.positions)
            span = self._to_rows(span, state)
            if parts.has_time_token:
                span = torch.cat([self._to_rows(time_token, state)[:, None], span], dim=1)
        time = self._to_rows(time, state)
        if step.backbone:
            hidden, prefix = self._backbone(state, step, span)
        if step.head:
            head_state = self._head(state, hidden, time, prefix)
            if step.keep_head:
                self._keep(state, step, head_state)
        else:
            head_state = self._forecast(state, step)
        state.step += 1
        state.kinds.append(step.kind)
        skip = 1 if parts.has_time_token else 0
        return final_layer(parts.final_layer, head_state[:, skip:], time, self.kernels)

    def _to_rows(self, x: Tensor, state: ImageState) -> Tensor:
        """Repeat per-image values for the guided rows that share them."""
        return torch.cat([x, x]) if x.shape[0] != state.rows else x

    def _backbone(self, state: ImageState, step: Step, span: Tensor) -> tuple[Tensor, PrefixCache | None]:
        """The language model on the image span -> final hidden states [rows, span, hidden] and the prefix in force."""
        task = TASK if step.pruned else None
        if step.measure:
            return self._measure(state, step, span, (task, ()))
        skipped = state.skipped if step.skip_from is not None else ()
        variant: Variant = (task, skipped or ())
        prefix = self._prefix(state, variant)
        state.llm_pass.load_prefix(prefix.llm, prefix)
        x = self._llm(span, state.llm_pass, state.llm_rope, variant)
        return self._final_norm(x), prefix

    def _llm(self, x: Tensor, attention: AttentionPass, rope: Rope, variant: Variant) -> Tensor:
        task, skipped = variant
        for index, layer in enumerate(self.parts.layers):
            if index not in skipped:
                x = decoder_layer(layer, index, x, rope, attention, self.parts.llm_attention, self.kernels, task)
        return x

    def _final_norm(self, x: Tensor) -> Tensor:
        norm = self.parts.final_norm
        return self.kernels.rms_norm(x, norm.weight, norm_eps(norm))

    # ---- the text before the image

    def _prefix(self, state: ImageState, variant: Variant) -> PrefixCache:
        """The prompt never sees image or time, so its keys and values are computed once per network variant."""
        cached = state.prefixes.get(variant)
        if cached is None:
            tokens = state.geometry.longest
            attention = CausalPass(tokens, len(self.parts.layers), self.parts.dtype, self.parts.device)
            hidden = self.parts.embed_tokens(state.text_tokens[:, :tokens])
            if tokens:
                hidden = self._llm(hidden, attention, self._text_rope(self.parts.llm_rope, tokens), variant)
            cached = self._keep_prefix(state, variant, attention.cache, self._final_norm(hidden))
        return cached

    def _keep_prefix(
        self, state: ImageState, variant: Variant, llm: list[KeyValue | None], hidden: Tensor
    ) -> PrefixCache:
        """Run the head's blocks over the prompt's final hidden states [rows, prefix, hidden] and keep both caches."""
        geometry, parts = state.geometry, self.parts
        tokens = geometry.longest
        attention = CausalPass(tokens, len(parts.blocks), parts.dtype, parts.device)
        if tokens:
            x = self._head_input(hidden)
            rope = self._text_rope(parts.blocks[0].self_attn.rotary_emb, tokens)
            for index, block in enumerate(parts.blocks):
                x = head_block(block, index, x, None, rope, attention, parts.head_attention, self.kernels)

        def aligned(pair: KeyValue | None) -> KeyValue | None:
            return None if pair is None else (geometry.right_align(pair[0]), geometry.right_align(pair[1]))

        prefix = PrefixCache([aligned(pair) for pair in llm], [aligned(pair) for pair in attention.cache])
        state.prefixes[variant] = prefix
        return prefix

    def _text_rope(self, module: Callable[..., Rope], tokens: int) -> Rope:
        return self._rope(module, torch.arange(tokens, device=self.parts.device)[None])

    # ---- layer importance

    def _measure(
        self, state: ImageState, step: Step, span: Tensor, variant: Variant
    ) -> tuple[Tensor, PrefixCache | None]:
        """Run all layers over the whole sequence and choose the layers to skip from here on.

        Importance is 1 - cosine(input, output), averaged over all positions of all rows: the reference averages over the
        tail and the padding too, so equal choices need them computed. The last layer's output counts after the final norm.
        """
        parts, kernels = self.parts, self.kernels
        length = state.text_tokens.shape[1]
        x = parts.embed_tokens(state.text_tokens)
        offsets, n = state.geometry.prefix, state.geometry.span
        for row, offset in enumerate(offsets):
            x[row, offset : offset + n] = span[row]
        attention = MaskedPass(_omni_mask(state.geometry, length, parts.dtype, parts.device), len(parts.layers))
        rope = self._text_rope(parts.llm_rope, length)
        importance = []
        last = len(parts.layers) - 1
        for index, layer in enumerate(parts.layers):
            before = x.clone()
            x = decoder_layer(layer, index, x, rope, attention, parts.llm_attention, kernels, variant[0])
            after = self._final_norm(x) if index == last else x
            importance.append(kernels.cosine_importance(before, after).float().mean())
        scores = torch.stack(importance).tolist()
        count = int(len(scores) * self.config.layer_skip_ratio)
        state.skipped = tuple(sorted(sorted(range(len(scores)), key=scores.__getitem__)[:count]))
        state.choices.append((step.index, state.skipped))
        hidden = torch.stack([after[row, offset : offset + n] for row, offset in enumerate(offsets)])
        prefix = None
        if step.head:
            prefix = self._keep_prefix(state, variant, attention.cache, after[:, : state.geometry.longest].contiguous())
        return hidden, prefix

    # ---- the head

    def _head_input(self, hidden: Tensor) -> Tensor:
        # The blocks write into their input: where the widths agree that is `hidden`, which no one reads after this.
        return hidden if self.parts.diff_proj is None else self.parts.diff_proj(hidden)

    def _head(self, state: ImageState, hidden: Tensor, time: Tensor, prefix: PrefixCache | None) -> Tensor:
        assert prefix is not None, "a step that runs the head has a prefix"
        state.head_pass.load_prefix(prefix.head, prefix)
        x = self._head_input(hidden)
        for index, block in enumerate(self.parts.blocks):
            x = head_block(
                block, index, x, time, state.head_rope, state.head_pass, self.parts.head_attention, self.kernels
            )
        return x

    def _keep(self, state: ImageState, step: Step, head_state: Tensor) -> None:
        order = self.config.head_forecast_order
        if order == 0:
            state.head_state = head_state[None]
        else:
            if state.head_state is None:
                state.head_state = head_state.new_zeros(order + 1, *head_state.shape)
            interval = float(step.index - state.kept_at[-1]) if state.kept_at else 1.0
            self.kernels.taylor_update_(state.head_state, head_state, interval, len(state.kept_at))
        state.kept_at.append(step.index)

    def _forecast(self, state: ImageState, step: Step) -> Tensor:
        assert state.head_state is not None and step.head_from is not None, (
            "a cached step follows one that kept its head state"
        )
        if self.config.head_forecast_order == 0:
            return state.head_state[0]
        ahead = float(step.index - state.kept_at[-1])
        return self.kernels.taylor_predict(state.head_state, ahead, len(state.kept_at))


def _omni_mask(geometry: RowGeometry, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive [rows, 1, length, length]: causal, except that a row's span sees itself whole."""
    position = torch.arange(length, device=device)
    causal = position[:, None] >= position[None, :]
    start = torch.tensor(geometry.prefix, device=device)[:, None]
    inside = (position >= start) & (position < start + geometry.span)
    allowed = causal | (inside[:, :, None] & inside[:, None, :])
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~allowed, float("-inf"))[:, None]
