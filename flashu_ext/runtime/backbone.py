"""The language model of a denoising step: on the image span, with layers and tokens left out as planned, over
a text prefix that is computed once; and the measurements that decide what is left out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.structure import Showo2Parts, norm_eps
from ..ops.kernel_sets import KernelSet
from ..planning.config import FlashUConfig
from ..planning.schedule import Step
from .head import Head
from .modules.attention import AttentionPass, CausalPass, MaskedPass, Rope, SpanPass, fold_mask
from .modules.decoder_layer import decoder_layer, routed_decoder_layer
from .state import Variant
from .workspace import Workspace

__all__ = ["TASK", "Backbone"]

TASK = "generation"


class Backbone:
    """Runs the language model in a workspace. Device work only: it changes no plain number, and reads no value back."""

    def __init__(self, parts: Showo2Parts, config: FlashUConfig, kernels: KernelSet, head: Head):
        self.parts = parts
        self.config = config
        self.kernels = kernels
        self.head = head

    # ---- the text before the image

    def prefix(self, ws: Workspace, rows: int, variant: Variant) -> None:
        """The prompt never sees image or time, so its keys and values are computed once per network variant, and for the
        unconditional branch only where that is run. Into the workspace, the head's too."""
        tokens = ws.shape.prefix
        if tokens == 0:
            return
        hidden = self.parts.embed_tokens(ws.text_tokens[:rows, :tokens])
        attention = CausalPass(tokens, self.parts.llm_attention, ws.prefix(rows)[0], self.kernels)
        hidden = self._layers(hidden, attention, self._text_rope(ws, tokens), variant)
        self.head.prefix(ws, rows, self._final_norm(hidden))

    def _text_rope(self, ws: Workspace, tokens: int) -> Rope:
        return ws.text_rope[0][:, :tokens], ws.text_rope[1][:, :tokens]

    # ---- the image

    def run(self, ws: Workspace, step: Step, rows: int, variant: Variant, span: Tensor) -> None:
        """span [rows, span, hidden], which is consumed -> final hidden states of that shape, into the workspace."""
        active = ws.router.active(step.tokens_from, step.index, rows, self.kernels) if step.tokens_from else None
        importance: list[Tensor] | None = [] if step.measure_tokens else None
        attention = ws.span_pass(ws.llm, rows, self.kernels)
        rope = (ws.llm_rope[0][:rows], ws.llm_rope[1][:rows])
        x = self._layers(span, attention, rope, variant, active, importance)
        if importance is not None:
            ws.router.store(importance, ws.shape.rows)
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
        task, skipped = variant
        shape, kernels = self.parts.llm_attention, self.kernels
        for index, layer in enumerate(self.parts.layers):
            if index in skipped:
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

    def measure(self, ws: Workspace, step: Step, rows: int, variant: Variant, span: Tensor) -> None:
        """Run all layers over the whole sequence, for their importance: 1 - cosine(input, output), averaged over all
        positions of all rows. The reference averages over the tail and the padding too, so equal choices need them
        computed; the last layer's output counts after the final norm.

        Where token importance is measured too, it is that of the span, and in the last layer of the layer's own output.
        Leaves in the workspace what `run` and `prefix` do, and the importance of the layers.
        """
        parts, kernels = self.parts, self.kernels
        llm, length, n = parts.llm_attention, ws.shape.length, ws.span
        places = ws.offsets[:rows, None] + torch.arange(n, device=ws.offsets.device)
        x = kernels.scatter_rows_(parts.embed_tokens(ws.text_tokens[:rows]), places, span)
        # One piece of memory for the keys and values of all layers: of each only the prompt's are kept.
        scratch = x.new_empty(1, 2, rows, length, llm.kv_heads, llm.head_dim).expand(len(parts.layers), *[-1] * 5)
        attention = MaskedPass(fold_mask(_omni_mask(ws, rows), llm), scratch, kernels, kept=ws.prefix(rows)[0])
        rope = self._text_rope(ws, length)
        of_tokens: list[Tensor] = []
        last = len(parts.layers) - 1
        for index, layer in enumerate(parts.layers):
            before = x.clone()
            x = decoder_layer(layer, index, x, rope, attention, llm, kernels, variant[0])
            after = self._final_norm(x) if index == last else x
            turned = kernels.cosine_importance(before, after)
            ws.importance[index] = turned.float().mean()
            if step.measure_tokens:
                turned = turned if index < last else kernels.cosine_importance(before, x)
                of_tokens.append(turned.gather(1, places))
        if step.measure_tokens:
            ws.router.store(of_tokens, ws.shape.rows)
        if step.head and ws.shape.prefix:
            self.head.prefix(ws, rows, after[:, : ws.shape.prefix].contiguous())
        ws.hidden[:rows] = kernels.gather_rows(after, places)


def _omni_mask(ws: Workspace, rows: int) -> Tensor:
    """Additive [rows, 1, length, length]: causal, except that a row's span sees itself whole."""
    position = torch.arange(ws.shape.length, device=ws.offsets.device)
    causal = position[:, None] >= position[None, :]
    start = ws.offsets[:rows, None]
    inside = (position >= start) & (position < start + ws.span)
    allowed = causal | (inside[:, :, None] & inside[:, None, :])
    mask = torch.zeros(allowed.shape, dtype=ws.hidden.dtype, device=ws.offsets.device)
    return mask.masked_fill_(~allowed, float("-inf"))[:, None]
