"""The language model of a denoising step: on the image span, with layers and tokens left out as planned, over
a text prefix that is computed once; and the measurements that decide what is left out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.embedding import early_signal, embed_image, semantic_features, with_time_token
from ..models.masks import additive, omni_allowed
from ..models.parts import Showo2Parts, norm_eps
from ..ops.kernel_sets import KernelSet
from .head import Head
from .modules.attention import AttentionPass, CausalPass, MaskedPass, Rope, SpanPass, fold_mask
from .modules.decoder_layer import decoder_layer, routed_decoder_layer
from .work import BackboneWork, PrefixWork, Variant, WatchWork
from .workspace import Workspace

__all__ = ["TASK", "Backbone"]

TASK = "generation"


class Backbone:
    """Runs the language model in a workspace. Device work only: it depends on its work and on memory, and reads nothing back."""

    def __init__(self, parts: Showo2Parts, kernels: KernelSet, head: Head):
        self.parts = parts
        self.kernels = kernels
        self.head = head

    # ---- the text before the image

    def prefix(self, ws: Workspace, work: PrefixWork) -> None:
        """The prompt never sees image or time, so its keys and values are computed once per network variant, and for the
        unconditional branch only where that is run. Into the workspace, the head's too."""
        rows, tokens = work.rows, ws.shape.prefix
        if tokens == 0:
            return
        hidden = self.parts.embed_tokens(ws.text_tokens[:rows, :tokens])
        attention = CausalPass(tokens, self.parts.llm_attention, ws.prefix(rows)[0], self.kernels)
        hidden = self._layers(hidden, attention, self._text_rope(ws, tokens), work.variant)
        self.head.prefix(ws, rows, self._final_norm(hidden))

    def _text_rope(self, ws: Workspace, tokens: int) -> Rope:
        return ws.text_rope[0][:, :tokens], ws.text_rope[1][:, :tokens]

    # ---- the image

    def watch(self, ws: Workspace, work: WatchWork) -> None:
        """What the network is about to see, into the adaptive cache's gate."""
        token = ws.time_token.index_select(0, ws.time_rows[: work.rows])
        ws.gate.watch(work, early_signal(self.parts, ws.latents[: work.rows], token), self.kernels)

    def run(self, ws: Workspace, work: BackboneWork) -> None:
        """Latents, times and prefix in the workspace -> final hidden states of the span, there too."""
        span = self._embed(ws, work)
        if work.measure:
            self._measure(ws, work, span)
        else:
            self._run_span(ws, work, span)

    def _embed(self, ws: Workspace, work: BackboneWork) -> Tensor:
        """The rows' embeddings of image and time, [rows, span, hidden]."""
        parts, images, latents = self.parts, work.images, ws.latents[: work.images]
        if not work.encode:
            assert ws.semantic is not None, "features are used again where a config shares them"
            semantic = ws.semantic[:images]
        else:
            semantic = semantic_features(parts, latents, ws.positions)
            if ws.semantic is not None:
                ws.semantic[:images] = semantic
        token = ws.time_token.index_select(0, ws.time_rows[:images])
        span = with_time_token(parts, embed_image(parts, latents, semantic), token)
        return torch.cat([span, span]) if images != work.rows else span

    def _run_span(self, ws: Workspace, work: BackboneWork, span: Tensor) -> None:
        """span [rows, span, hidden], which is consumed, over the prefix, with layers and tokens left out."""
        rows = work.rows
        active = ws.router.active(work.routing, rows, self.kernels) if work.routing is not None else None
        importance: list[Tensor] | None = [] if work.token_slot is not None else None
        attention = ws.span_pass(ws.llm, rows, self.kernels)
        rope = (ws.llm_rope[0][:rows], ws.llm_rope[1][:rows])
        x = self._layers(span, attention, rope, work.variant, active, importance)
        if importance is not None and work.token_slot is not None:
            ws.router.store(work.token_slot, importance)
        ws.hidden[:rows] = self._final_norm(x)

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
        task, shape, kernels = variant.task, self.parts.llm_attention, self.kernels
        for index, layer in enumerate(self.parts.layers):
            if index in variant.skipped:
                continue
            before = x.clone() if importance is not None else x
            if active is None:
                x = decoder_layer(layer, index, x, rope, attention, shape, kernels, task)
            else:
                assert isinstance(attention, SpanPass), "tokens are routed in an image span"
                x = routed_decoder_layer(layer, index, x, active[index], rope, attention, shape, kernels, task)
            if importance is not None:
                importance.append(kernels.cosine_importance(before, x))
        return x

    def _final_norm(self, x: Tensor) -> Tensor:
        norm = self.parts.final_norm
        return self.kernels.rms_norm(x, norm.weight, norm_eps(norm))

    # ---- layer importance

    def _measure(self, ws: Workspace, work: BackboneWork, span: Tensor) -> None:
        """Run all layers over the whole sequence, for their importance: 1 - cosine(input, output), averaged over all
        positions of all rows. The reference averages over the tail and the padding too, so equal choices need them
        computed; the last layer's output counts after the final norm.

        Where token importance is measured too, it is that of the span, and in the last layer of the layer's own output.
        Leaves in the workspace what `_run_span` and `prefix` do, and the importance of the layers.
        """
        parts, kernels, rows = self.parts, self.kernels, work.rows
        llm, length, n = parts.llm_attention, ws.shape.length, ws.span
        places = ws.offsets[:rows, None] + torch.arange(n, device=ws.offsets.device)
        x = kernels.scatter_rows_(parts.embed_tokens(ws.text_tokens[:rows]), places, span)
        # One piece of memory for the keys and values of all layers: of each only the prompt's are kept.
        scratch = x.new_empty(1, 2, rows, length, llm.kv_heads, llm.head_dim).expand(len(parts.layers), *[-1] * 5)
        mask = fold_mask(additive(omni_allowed(ws.spans[:rows], length)[:, None], x.dtype), llm)
        attention = MaskedPass(mask, scratch, kernels, store=ws.prefix(rows)[0])
        rope = self._text_rope(ws, length)
        of_tokens: list[Tensor] = []
        last = len(parts.layers) - 1
        for index, layer in enumerate(parts.layers):
            before = x.clone()
            x = decoder_layer(layer, index, x, rope, attention, llm, kernels, work.variant.task)
            after = self._final_norm(x) if index == last else x
            importance = kernels.cosine_importance(before, after)
            ws.importance[index] = importance.float().mean()
            if work.token_slot is not None:
                importance = importance if index < last else kernels.cosine_importance(before, x)
                of_tokens.append(importance.gather(1, places))
        if work.token_slot is not None:
            ws.router.store(work.token_slot, of_tokens)
        if work.stores_prefix and ws.shape.prefix:
            self.head.prefix(ws, rows, after[:, : ws.shape.prefix].contiguous())
        ws.hidden[:rows] = kernels.gather_rows(after, places)
