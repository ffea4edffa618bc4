"""Room: runtime. The language model of a denoising step: on the image span, with layers and tokens left out as planned, over
a text prefix that is computed once; and the measurements that decide what is left out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import FlashUConfig
from ..kernel_sets import KernelSet
from ..modules.attention import AttentionPass, CausalPass, KeyValue, MaskedPass, Rope, RowGeometry, rope_table
from ..modules.decoder_layer import decoder_layer, routed_decoder_layer
from ..schedule import Step
from ..structure import Showo2Parts, norm_eps
from .state import ImageState, PrefixCache, Rows, Variant

__all__ = ["TASK", "Backbone"]

TASK = "generation"


class Backbone:
    """Runs the language model for images in progress. Holds no state of its own."""

    def __init__(self, parts: Showo2Parts, config: FlashUConfig, kernels: KernelSet):
        self.parts = parts
        self.config = config
        self.kernels = kernels

    def run(self, state: ImageState, rows: Rows, step: Step, span: Tensor) -> tuple[Tensor, PrefixCache | None]:
        """span [rows, span, hidden], which is consumed -> final hidden states of that shape, and the prefix in force (None
        where the head does not run)."""
        task = TASK if step.pruned else None
        if step.measure:
            return self._measure(state, rows, step, span, (task, ()))
        skipped = state.skipped if step.skip_from is not None else ()
        variant: Variant = (task, skipped or ())
        prefix = self._prefix(state, rows, variant)
        rows.llm_pass.load_prefix(prefix.llm, prefix)
        active = None
        if step.tokens_from:
            active = state.router.active(step.tokens_from, step.index, rows.count, self.kernels)
        importance: list[Tensor] | None = [] if step.measure_tokens else None
        x = self._layers(span, rows.llm_pass, rows.llm_rope, variant, active, importance)
        if importance is not None:
            state.router.measured(step.index, importance)
        self._count(state, rows, len(self.parts.layers) - len(variant[1]), active)
        return self._final_norm(x), prefix

    def _layers(
        self,
        x: Tensor,
        attention: AttentionPass,
        rope: Rope,
        variant: Variant,
        active: Tensor | None = None,
        importance: list[Tensor] | None = None,
    ) -> Tensor:
        """All layers of a variant on x [rows, n, hidden], which is consumed.

        Args:
            active: int64 [layers, rows, k], the tokens that each layer computes, or None: all of them.
            importance: receives every layer's token importance, fp32 [rows, n]; None measures nothing.
        """
        task, skipped = variant
        shape, kernels = self.parts.llm_attention, self.kernels
        for index, layer in enumerate(self.parts.layers):
            if index in skipped:
                continue
            before = x.clone() if importance is not None else x
            if active is None:
                x = decoder_layer(layer, index, x, rope, attention, shape, kernels, task)
            else:
                x = routed_decoder_layer(layer, index, x, active[index], rope, attention, shape, kernels, task)
            if importance is not None:
                importance.append(kernels.cosine_importance(before, x))
        return x

    def _final_norm(self, x: Tensor) -> Tensor:
        norm = self.parts.final_norm
        return self.kernels.rms_norm(x, norm.weight, norm_eps(norm))

    def _count(self, state: ImageState, rows: Rows, layers: int, active: Tensor | None) -> None:
        carried = state.router.carried if active is not None else 0
        state.routed["computed"] += layers * rows.count * (rows.geometry.span - carried)
        state.routed["carried"] += layers * rows.count * carried

    # ---- the text before the image

    def _prefix(self, state: ImageState, rows: Rows, variant: Variant) -> PrefixCache:
        """The prompt never sees image or time, so its keys and values are computed once per network variant, and for the
        unconditional branch only where that is run."""
        for count in (state.all_rows.count, rows.count):
            if (variant, count) in state.prefixes:
                return state.prefixes[variant, count]
        tokens = rows.geometry.longest
        attention = CausalPass(tokens, len(self.parts.layers), self.parts.dtype, self.parts.device)
        hidden = self.parts.embed_tokens(rows.text_tokens[:, :tokens])
        if tokens:
            hidden = self._layers(hidden, attention, self._text_rope(tokens), variant)
        return self._keep_prefix(state, rows, variant, attention.cache, self._final_norm(hidden))

    def _keep_prefix(
        self, state: ImageState, rows: Rows, variant: Variant, cache: list[KeyValue | None], hidden: Tensor
    ) -> PrefixCache:
        """Keep the prompt's keys and values, and its final hidden states [rows, prefix, hidden] for the head."""
        prefix = PrefixCache(rows.geometry, rows.geometry.right_align_all(cache), None, hidden)
        state.prefixes[variant, rows.count] = prefix
        return prefix

    def _text_rope(self, tokens: int) -> Rope:
        return rope_table(self.parts.llm_rope, torch.arange(tokens, device=self.parts.device)[None], self.parts.dtype)

    # ---- layer importance

    def _measure(
        self, state: ImageState, rows: Rows, step: Step, span: Tensor, variant: Variant
    ) -> tuple[Tensor, PrefixCache | None]:
        """Run all layers over the whole sequence and choose the layers to skip from here on.

        Importance is 1 - cosine(input, output), averaged over all positions of all rows: the reference averages over the
        tail and the padding too, so equal choices need them computed. The last layer's output counts after the final norm.
        Where token importance is measured too, it is that of the span, and in the last layer of the layer's own output.
        """
        parts, kernels = self.parts, self.kernels
        length = rows.text_tokens.shape[1]
        x = parts.embed_tokens(rows.text_tokens)
        offsets, n = rows.geometry.prefix, rows.geometry.span
        for row, offset in enumerate(offsets):
            x[row, offset : offset + n] = span[row]
        attention = MaskedPass(_omni_mask(rows.geometry, length, parts.dtype, parts.device), len(parts.layers))
        rope = self._text_rope(length)
        importance: list[Tensor] = []
        of_tokens: list[Tensor] = []
        last = len(parts.layers) - 1
        for index, layer in enumerate(parts.layers):
            before = x.clone()
            x = decoder_layer(layer, index, x, rope, attention, parts.llm_attention, kernels, variant[0])
            after = self._final_norm(x) if index == last else x
            turned = kernels.cosine_importance(before, after)
            importance.append(turned.float().mean())
            if step.measure_tokens:
                of_tokens.append(turned if index < last else kernels.cosine_importance(before, x))
        scores = torch.stack(importance).tolist()
        count = int(len(scores) * self.config.layer_skip_ratio)
        state.skipped = tuple(sorted(sorted(range(len(scores)), key=scores.__getitem__)[:count]))
        state.choices.append((step.index, state.skipped))
        if step.measure_tokens:
            state.router.measured(step.index, [rows.geometry.spans(scores) for scores in of_tokens])
        self._count(state, rows, len(parts.layers), None)
        prefix = None
        if step.head:
            text = after[:, : rows.geometry.longest].contiguous()
            prefix = self._keep_prefix(state, rows, variant, attention.cache, text)
        return rows.geometry.spans(after), prefix


def _omni_mask(geometry: RowGeometry, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive [rows, 1, length, length]: causal, except that a row's span sees itself whole."""
    position = torch.arange(length, device=device)
    causal = position[:, None] >= position[None, :]
    start = torch.tensor(geometry.prefix, device=device)[:, None]
    inside = (position >= start) & (position < start + geometry.span)
    allowed = causal | (inside[:, :, None] & inside[:, None, :])
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~allowed, float("-inf"))[:, None]
