"""The language model of a denoising step, on the image span over cached prefix keys and values; and the measurements that
choose which layers and tokens to skip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.checks import made_by
from ..models.masks import additive, sequence_allowed
from ..models.sampling import Segment
from .head import Head
from .image_memory import ImageMemory, joined, joined_early, joined_rope
from .modules.attention import (
    AttentionPass,
    MaskedPass,
    Rope,
    RoutedPass,
    SegmentPass,
    rope_table,
    span_pass,
)
from .modules.decoder_layer import decoder_layer, expert_layer, routed_decoder_layer
from .network import Network
from .work import BackboneWork, EarlyWork, PrefixWork, Variant, WatchWork

__all__ = ["TASK", "Backbone"]

TASK = "generation"


class Backbone:
    """Runs the language model on an `ImageMemory`: device work only, which depends on nothing but the memory and the work."""

    def __init__(self, network: Network, head: Head):
        self.parts = network.at(TASK, "embed").parts
        self.network = network.at(TASK, "backbone")
        self.measuring = network.at(TASK, "measuring")
        self.rows = network.rows
        self.kernels = self.network.kernels
        self.head = head

    # ---- the text before the image

    def prefix(self, memory: ImageMemory, work: PrefixWork) -> None:
        """Compute the prompt's keys and values, in language model and head, into memory.

        The prompt never sees image or time, so this runs once per network variant; for the unconditional branch only if
        that runs.
        """
        rows, tokens = work.rows, memory.shape.prefix
        if tokens == 0:
            return
        with self.rows.of((work.adapter, rows)):
            hidden = self.parts.embed_tokens(memory.text_tokens[:rows, :tokens])
            attention = SegmentPass(memory.prefix(rows)[0], self.kernels, tokens)
            hidden = self._layers(hidden, attention, self._text_rope(memory, tokens), work.variant)
            self.head.prefix(memory, rows, self.network.final_norm(hidden))

    def _text_rope(self, memory: ImageMemory, tokens: int) -> Rope:
        return memory.text_rope[0][:, :tokens], memory.text_rope[1][:, :tokens]

    def context(self, memories: Sequence[ImageMemory], works: Sequence[PrefixWork]) -> None:
        """`prefix`, of one memory, where rows see other segments than their text (`ImageMemory.context`). What rows have in
        common is computed once."""
        (memory,), (work,) = memories, works
        assert memory.context is not None
        cache = memory.prefix(work.rows)[0]
        done: list[Sequence[Segment]] = []
        for row, segments in enumerate(memory.context[: work.rows]):
            shared, source = max(((_common(other, segments), at) for at, other in enumerate(done)), default=(0, 0))
            filled = sum(segment.embeds.shape[1] for segment in segments[:shared])
            cache[:, :, row, :filled] = cache[:, :, source, :filled]
            own = cache[:, :, row : row + 1]
            with self.rows.of((work.adapter, 1)):
                for segment in segments[shared:]:
                    attention = SegmentPass(own, self.kernels, segment.embeds.shape[1], filled, segment.causal)
                    rope = rope_table(self.parts.llm_rope, segment.positions[None], cache.dtype)
                    filled += segment.embeds.shape[1]
                    self._layers(segment.embeds.clone(), attention, rope, work.variant, drawn=segment.drawn)
            done.append(segments)

    # ---- the image

    def early(self, memories: Sequence[ImageMemory], works: Sequence[EarlyWork]) -> None:
        """Latents and times in each memory -> what the model computes of them in every evaluation, in memory."""
        pairs = list(zip(memories, works, strict=True))
        latents = joined([memory.latents[: work.images] for memory, work in pairs])
        times = [memory.modulation.index_select(0, memory.time_rows[: work.images]) for memory, work in pairs]
        with self.rows.of(*((work.adapter, work.images) for work in works)):
            early = made_by("early", self.parts.early(latents, joined(times)), len(latents), *memories[0].sizes.early)
        for (memory, work), own in zip(pairs, early.split([work.images for work in works]), strict=True):
            assert memory.early is not None
            memory.early[: work.rows] = own.repeat(work.rows // work.images, *[1] * (own.dim() - 1))

    def watch(self, memory: ImageMemory, work: WatchWork) -> None:
        """Pass the network's input to the adaptive cache's gate."""
        with self.rows.of((work.adapter, work.rows)):
            token = memory.time_token.index_select(0, memory.time_rows[: work.rows])
            memory.gate.watch(work, self.parts.signal(memory.latents[: work.rows], token), self.kernels)

    def run(self, memories: Sequence[ImageMemory], works: Sequence[BackboneWork]) -> None:
        """Latents, times and prefix in each memory -> final hidden states of its span, in memory. Several works compute the same
        (`BackboneWork.computes`)."""
        with self.rows.of(*((work.adapter, work.images) for work in works)):
            span = self._embed(memories, works)
        with self.rows.of(*((work.adapter, work.rows) for work in works)):
            if works[0].measure and memories[0].context is None:
                self._measure(memories[0], works[0], span)
            else:
                self._run_span(memories, works, span)

    def _embed(self, memories: Sequence[ImageMemory], works: Sequence[BackboneWork]) -> Tensor:
        """Embeddings of time token and image, [all rows, span, hidden]."""
        parts, pairs = self.parts, list(zip(memories, works, strict=True))
        images = [work.images for work in works]
        latents = joined([memory.latents[:count] for memory, count in zip(memories, images, strict=True)])
        features: Tensor | None = None
        sizes = memories[0].sizes
        if sizes.features and works[0].encode:
            features = parts.features(latents, memories[0].place)
            made_by("features", features, len(latents), sizes.patches, sizes.features)
            for (memory, work), own in zip(pairs, features.split(images), strict=True):
                if memory.features is not None:
                    memory.features[: work.images] = own
        elif sizes.features:
            # Only a config with an encoder cache plans steps without the encoder.
            features = joined([memory.features[: work.images] for memory, work in pairs if memory.features is not None])
        tokens = [memory.time_token.index_select(0, memory.time_rows[: work.images]) for memory, work in pairs]
        early = joined_early([(memory, work.images) for memory, work in pairs])
        span = parts.span(latents, features, early, joined(tokens))
        made_by("span", span, len(latents), parts.lead + sizes.patches, parts.hidden)
        if parts.trail:
            behind = [memory.trailing.expand(count, -1, -1) for memory, count in zip(memories, images, strict=True)]
            span = torch.cat([span, joined(behind)], dim=1)
        if all(work.rows == work.images for work in works):
            return span
        # Both branches of guidance have the same image.
        of_rows = [[own] * (work.rows // work.images) for own, work in zip(span.split(images), works, strict=True)]
        return torch.cat([each for own in of_rows for each in own])

    def _run_span(self, memories: Sequence[ImageMemory], works: Sequence[BackboneWork], span: Tensor) -> None:
        """Run the span [all rows, span, hidden], which is consumed, over the prefixes; skip layers and tokens as planned."""
        pairs = list(zip(memories, works, strict=True))
        actives = [
            memory.router.active(work.routing, work.rows, self.kernels)
            for memory, work in pairs
            if work.routing is not None
        ]
        importance: list[Tensor] | None = [] if works[0].token_slot is not None else None
        attention = span_pass([memory.span_pass(memory.llm, work.rows, self.kernels) for memory, work in pairs])
        rope = joined_rope([(memory.llm_rope, work.rows) for memory, work in pairs])
        active = joined(actives, dim=1) if actives else None
        drawn = memories[0].sizes.patches if self.network.experts else 0
        measured = memories[0].importance if works[0].measure else None
        x = self._layers(span, attention, rope, works[0].variant, active, importance, drawn, measured)
        rows = [work.rows for work in works]
        if importance is not None:
            by_memory = zip(*(layer.split(rows) for layer in importance), strict=True)
            for (memory, work), own in zip(pairs, by_memory, strict=True):
                assert work.token_slot is not None
                memory.router.store(work.token_slot, own)
        hidden = self.network.final_norm(x) if self.parts.norms_span else x
        for (memory, work), own in zip(pairs, hidden.split(rows), strict=True):
            memory.hidden[: work.rows] = own

    def _layers(
        self,
        x: Tensor,
        attention: AttentionPass,
        rope: Rope,
        variant: Variant,
        active: Tensor | None = None,
        importance: list[Tensor] | None = None,
        drawn: int = 0,
        measured: Tensor | None = None,
    ) -> Tensor:
        """All layers of a variant on x [rows, n, hidden], which is consumed.

        Args:
            active: int64 [layers, rows, k], the tokens that each layer computes, or None: all of them.
            importance: receives every layer's token importance, fp32 [rows, n]; None measures nothing.
            drawn: tokens, from the first, that the experts compute, where the model has some.
            measured: receives every layer's importance, fp32 [layers], averaged over all tokens; the experts' layers only.
        """
        task, shape, kernels = variant.task, self.parts.llm_attention, self.kernels
        if self.network.experts:
            return self._by_experts(x, attention, rope, variant, drawn, measured)
        for index, layer in enumerate(self.network.layers):
            if index in variant.skipped:
                continue
            before = x.clone() if importance is not None else x
            if active is None:
                x = decoder_layer(layer, index, x, rope, attention, shape, task)
            else:
                assert isinstance(attention, RoutedPass), "tokens are routed in an image span"
                x = routed_decoder_layer(layer, index, x, active[index], rope, attention, shape, kernels, task)
            if importance is not None:
                importance.append(self.measuring.kernels.cosine_importance(before, x))
        return x

    def _by_experts(
        self, x: Tensor, attention: AttentionPass, rope: Rope, variant: Variant, drawn: int, measured: Tensor | None
    ) -> Tensor:
        """`_layers` where the first `drawn` tokens have experts of their own. The others' layers compute all neurons."""
        shape, network = self.parts.llm_attention, self.network
        tokens = [x[:, :drawn].contiguous(), x[:, drawn:].contiguous()]
        for index, layers in enumerate(zip(network.experts, network.layers, strict=True)):
            if index in variant.skipped:
                continue
            before = [each.clone() for each in tokens] if measured is not None else []
            tokens = expert_layer(layers, index, tokens, rope, attention, shape, (variant.task, None))
            if measured is not None:
                pairs = zip(before, tokens, strict=True)
                scores = [self.measuring.kernels.cosine_importance(*pair).float() for pair in pairs]
                measured[index] = torch.cat(scores, dim=1).mean()
        return torch.cat(tokens, dim=1)

    # ---- layer importance

    def _measure(self, memory: ImageMemory, work: BackboneWork, span: Tensor) -> None:
        """Run all layers over the whole sequence and store their importance, 1 - cosine(input, output), averaged over all
        positions of all rows. The reference includes tail and padding in the average, so both must be computed for equal
        choices. The last layer's output is taken after the final norm.

        Token importance is measured on the span only, in the last layer before the final norm. Also writes what `_run_span`
        and `prefix` write.
        """
        parts, kernels, rows = self.parts, self.measuring.kernels, work.rows
        llm, length, n = parts.llm_attention, memory.shape.length, memory.span
        places = memory.offsets[:rows, None] + torch.arange(n, device=memory.offsets.device)
        x = kernels.scatter_rows_(parts.embed_tokens(memory.text_tokens[:rows]), places, span)
        # All layers share one scratch buffer for keys and values: only the prompt's are stored.
        scratch = x.new_empty(1, 2, rows, length, llm.kv_heads, llm.head_dim).expand(len(parts.layers), *[-1] * 5)
        allowed = sequence_allowed(memory.spans[:rows], memory.seen[:rows], length, parts.causal)
        mask = additive(allowed[:, None], x.dtype)
        attention = MaskedPass(mask, scratch, kernels, store=memory.prefix(rows)[0])
        rope = self._text_rope(memory, length)
        of_tokens: list[Tensor] = []
        last = len(parts.layers) - 1
        for index, layer in enumerate(self.measuring.layers):
            before = x.clone()
            x = decoder_layer(layer, index, x, rope, attention, llm, work.variant.task)
            after = self.measuring.final_norm(x) if index == last else x
            importance = kernels.cosine_importance(before, after)
            memory.importance[index] = importance.float().mean()
            if work.token_slot is not None:
                importance = importance if index < last else kernels.cosine_importance(before, x)
                of_tokens.append(importance.gather(1, places))
        if work.token_slot is not None:
            memory.router.store(work.token_slot, of_tokens)
        if work.stores_prefix and memory.shape.prefix:
            self.head.prefix(memory, rows, after[:, : memory.shape.prefix].contiguous())
        memory.hidden[:rows] = kernels.gather_rows(after, places)


def _common(one: Sequence[Segment], other: Sequence[Segment]) -> int:
    """Segments that two rows begin with."""
    for count, (a, b) in enumerate(zip(one, other, strict=False)):
        if a is not b:
            return count
    return min(len(one), len(other))
