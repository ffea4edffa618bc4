"""Room: runtime. Answers questions: one prefill, then a decode over cached keys and values; images are read once.

What a prompt shares, token for token, with one of the last call or with another of its own batch is not computed again:
a further question about an image starts behind the image. Sharing stops at a position that nothing before it looks past,
so the bidirectional image span is reused whole or not at all.

Visual tokens are dropped inside the prefill (`token_pruning`). An image's tokens see nothing behind the image, so which of
them stay does not depend on the question, and a pruned image is lent like any other; the score 'attention' is the
exception. An answer's tokens may skip layers: which ones is measured on the prompt's last token, in its own prefill, which
always runs whole; skipped layers neither read nor write keys and values of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import FlashUConfig
from ..kernel_sets import KernelSet
from ..modules.attention import attend
from ..modules.decoder_layer import Rope, decoder_layer, pruning_layer
from ..showo2.understanding import span_embeds
from ..structure import Showo2Parts, norm_eps, position_table
from .encoder import embed_image
from .prompt_cache import Prompt, PromptCache, common_prefix, layer_of
from .token_pruning import TokenPruner, visual_spans

__all__ = ["TASK", "UnderstandingEngine"]

TASK = "understanding"

# How many prompts of the last call, and of the same call, a prompt is compared with: a comparison reads both prompts.
MAX_SOURCES = 16

Pick = Callable[[Tensor, Sequence[int]], Tensor]
"""Logits [rows, vocab] and the numbers of the prompts they belong to -> token ids [rows, 1]."""


class _PrefillPass:
    """New tokens of several prompts, end to end in one row: each attends within its own prompt, over its cached prefix too."""

    def __init__(self, cache: PromptCache, pieces: Sequence[tuple[int, int, Tensor]]):
        """pieces: (row of the cache, slots filled before, additive mask [1, 1, n, filled + n])."""
        self.cache = cache
        self.pieces = pieces

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.layer(layer)
        attended = []
        at = 0
        for row, start, mask in self.pieces:
            new, (n, end) = slice(at, at + mask.shape[2]), mask.shape[2:]
            keys[row, :, start:end] = key[0, new].transpose(0, 1)
            values[row, :, start:end] = value[0, new].transpose(0, 1)
            one = slice(row, row + 1)
            attended.append(attend(query[:, new], keys[one, :, :end], values[one, :, :end], mask))
            at += n
        return attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)


class _Narrowing:
    """The choice inside the pruning layer of a prefill: which of the new tokens stay, and the attention among them."""

    def __init__(
        self,
        pruner: TokenPruner,
        cache: PromptCache,
        chunks: Sequence[tuple[int, int]],
        attention: Any,
        rope: Rope,
    ):
        """chunks: (row of the cache, tokens it has already). attention: the layer's module. rope: of the new tokens."""
        self.pruner, self.cache, self.chunks, self.attention, self.rope = pruner, cache, chunks, attention, rope
        self.drops = any(
            drop and first >= start
            for row, start in chunks
            for (first, _), drop in zip(cache.prompts[row].spans, cache.prompts[row].dropped, strict=True)
        )

    def __call__(self, normed: Tensor | None, value: Tensor | None) -> tuple[Tensor, _PrefillPass]:
        """See `modules.decoder_layer.pruning_layer`; where nothing drops, neither tensor is read. Sets `kept` of the prompts."""
        by_value = self.drops and not self.pruner.sees_question
        scores = self.pruner.scores(value) if by_value and value is not None else None
        keep, pieces = [], []
        at = 0
        for row, start in self.chunks:
            prompt = self.cache.prompts[row]
            new = slice(at, at + prompt.length - start)
            own = scores[new] if scores is not None else None
            if self.drops and own is None:
                assert normed is not None
                own = self._attention_scores(prompt, row, start, normed[:, new], new)
            stay = self._stay(prompt, start, own)
            keep.append(stay + (at - start))
            lent = stay[:0] if prompt.kept is None else prompt.kept[: prompt.slots(start)]
            prompt.kept = torch.cat([lent, stay])
            allowed = prompt.allowed[stay][:, prompt.kept]
            pieces.append((row, lent.shape[0], _additive(allowed, prompt.embeds.dtype)[None, None]))
            at = new.stop
        return torch.cat(keep), _PrefillPass(self.cache, pieces)

    def _stay(self, prompt: Prompt, start: int, scores: Tensor | None) -> Tensor:
        """Positions from `start` on that stay, ascending; scores are those of the positions from `start` on."""
        device = prompt.allowed.device
        pieces = []
        for (first, count), drop in zip(prompt.spans, prompt.dropped, strict=True):
            if first >= start and drop:
                assert scores is not None
                pieces += [
                    torch.arange(start, first, device=device),
                    self.pruner.keep(scores[first - start :], count, drop) + first,
                ]
                # What follows is counted from behind this span.
                scores, start = scores[first + count - start :], first + count
        return torch.cat([*pieces, torch.arange(start, prompt.length, device=device)])

    def _attention_scores(self, prompt: Prompt, row: int, start: int, normed: Tensor, new: slice) -> Tensor:
        cos, sin = self.rope
        keys, _ = self.cache.layer(self.cache.split)
        # This score lends nothing behind the first image, so all earlier tokens are in the cache.
        before, rope = keys[row, :, :start], (cos[:, new], sin[:, new])
        return self.pruner.attention_scores(self.attention, normed, rope, before, prompt.allowed[-1])


class _DecodePass:
    """One new token in every row: written behind the answers so far, attends to all that its prompt's last token saw."""

    def __init__(self, cache: PromptCache, answer_slots: int):
        self.split, self.ends, self.buffers = cache.split, cache.ends, cache.buffers
        self.count = 0
        masks = []
        for end, late in zip(cache.ends, (False, True), strict=True):
            rows = [p.allowed[-1, p.kept] if late and p.kept is not None else p.allowed[-1] for p in cache.prompts]
            allowed = torch.ones(len(rows), end + answer_slots, dtype=torch.bool, device=rows[0].device)
            for row, seen in enumerate(rows):
                allowed[row, :end] = torch.nn.functional.pad(seen, (0, end - seen.shape[0]))
            masks.append(
                None if bool(allowed.all()) else _additive(allowed, cache.prompts[0].embeds.dtype)[:, None, None]
            )
        self.masks = masks

    def narrow(self, rows: Tensor) -> None:
        """Go on with some rows only. They are copied, so the cache itself stays whole for the next question."""
        first, second = (buffer.index_select(2, rows) for buffer in self.buffers)
        self.buffers = (first, second)
        self.masks = [None if mask is None else mask[rows] for mask in self.masks]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        region = 0 if layer < self.split else 1
        keys, values = layer_of(self.buffers, self.split, layer)
        slot, mask = self.ends[region] + self.count, self.masks[region]
        keys[:, :, slot : slot + 1] = key.transpose(1, 2)
        values[:, :, slot : slot + 1] = value.transpose(1, 2)
        seen = None if mask is None else mask[..., : slot + 1]
        return attend(query, keys[:, :, : slot + 1], values[:, :, : slot + 1], seen)


class UnderstandingEngine:
    """Answers batches of prompts and keeps the last batch's cache for the next question."""

    def __init__(self, parts: Showo2Parts, config: FlashUConfig, kernels: KernelSet):
        self.parts = parts
        self.kernels = kernels
        self.pruner = TokenPruner(parts, config, kernels)
        self.layers_to_skip = int(len(parts.layers) * config.answer_layer_skip_ratio)
        self.prefilled = 0
        self.reused = 0
        self.visual = 0
        self.visual_kept = 0
        self.skipped: tuple[tuple[int, ...], ...] = ()
        self._cache: PromptCache | None = None
        self._images: list[tuple[Tensor, Tensor]] = []

    def reset(self) -> None:
        """Forget the last prompts and images."""
        self._cache = None
        self._images = []

    def nbytes(self) -> int:
        """Bytes of the caches kept for the next question."""
        images = sum(latents.nbytes + embeds.nbytes for latents, embeds in self._images)
        return images + (self._cache.nbytes() if self._cache else 0)

    # ---- inputs

    def image_embeds(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Latents [1, channels, H, W] each -> [1, patches, hidden] each; equal images, and the last call's, are encoded once."""
        distinct = [latents for latents, _ in self._images]
        chosen: list[int] = []
        for latents in images:
            at = next((i for i, other in enumerate(distinct) if _same(other, latents)), len(distinct))
            if at == len(distinct):
                distinct.append(latents.clone())
            chosen.append(at)
        embeds: dict[int, Tensor] = {i: known for i, (_, known) in enumerate(self._images)}
        patch = self.parts.patch_size
        for shape in {latents.shape for latents in distinct[len(embeds) :]}:
            new = [i for i, latents in enumerate(distinct) if i >= len(self._images) and latents.shape == shape]
            table = position_table(self.parts, shape[2] // patch, shape[3] // patch)
            encoded = embed_image(self.parts, torch.cat([distinct[i] for i in new]), table)
            embeds.update(zip(new, encoded.split(1), strict=True))
        self._images = [(distinct[i], embeds[i]) for i in dict.fromkeys(chosen)]
        return [embeds[i] for i in chosen]

    def question(self, image: Tensor, before: Tensor, after: Tensor) -> Prompt:
        """A question about an encoded image [1, patches, hidden], its tokens int64 [1, n] and, boi and eoi first, [1, m]."""
        return self.prompt(*span_embeds(self.parts, image, before, after))

    def prompt(self, embeds: Tensor, allowed: Tensor) -> Prompt:
        """A prompt from embeddings [1, length, hidden] and visibility bool [length, length]; the caller keeps both."""
        spans = visual_spans(allowed, self.parts.has_time_token)
        return Prompt(embeds.clone(), allowed.clone(), spans, self.pruner.dropped(spans))

    # ---- decoding

    def decode(
        self, prompts: Sequence[Prompt], max_new_tokens: int, pick: Pick, eos_token: int | None
    ) -> list[list[Tensor]]:
        """Continue prompts, which need not be of one length. A row that is done leaves the batch.

        Args:
            pick: chooses tokens from logits. eos_token: ends a row's answer, and is part of it.

        Returns:
            Per prompt token ids, 0-d int64 tensors, at most `max_new_tokens`.
        """
        answers: list[list[Tensor]] = [[] for _ in prompts]
        if max_new_tokens == 0 or not prompts:
            return answers
        parts = self.parts
        # The old cache is read, not written, until the new one holds all prompts: an error on the way leaves it usable.
        cache = PromptCache(
            prompts, max_new_tokens - 1, self.pruner.layer, len(parts.layers), parts.llm_attention, prompts[0].embeds
        )
        hidden, skipped = self._prefill(cache)
        self._cache, self.skipped = cache, skipped
        self.visual = sum(prompt.visual for prompt in prompts)
        self.visual_kept = self.visual - sum(sum(prompt.dropped) for prompt in prompts)

        attention = _DecodePass(cache, max_new_tokens - 1)
        live = list(range(len(prompts)))
        runs = self._layers_run([skipped[row] for row in live])
        positions = torch.tensor([[prompt.length] for prompt in prompts], device=hidden.device)
        while True:
            token = pick(parts.lm_head(hidden), live)
            for row, one in zip(live, token[:, 0].unbind(), strict=True):
                answers[row].append(one)
            if attention.count == max_new_tokens - 1:
                return answers
            if eos_token is not None:
                going = [i for i, value in enumerate(token[:, 0].tolist()) if value != eos_token]
                if not going:
                    return answers
                if len(going) < len(live):
                    rows = torch.tensor(going, device=hidden.device)
                    attention.narrow(rows)
                    token, positions = token[rows], positions[rows]
                    live = [live[i] for i in going]
                    runs = self._layers_run([skipped[row] for row in live])
            x = parts.embed_tokens(token).to(hidden.dtype)
            hidden = self._step(x, positions + attention.count, attention, runs)
            attention.count += 1

    def _rope(self, x: Tensor, positions: Tensor) -> Rope:
        cos, sin = self.parts.llm_rope(x, positions)
        return cos[:, :, None], sin[:, :, None]

    def _final_norm(self, x: Tensor) -> Tensor:
        norm = self.parts.final_norm
        return self.kernels.rms_norm(x, norm.weight, norm_eps(norm))

    def _step(self, x: Tensor, positions: Tensor, attention: _DecodePass, runs: Sequence[bool | Tensor]) -> Tensor:
        """One token a row, x [rows, 1, hidden] -> final hidden states [rows, hidden]."""
        parts = self.parts
        rope = self._rope(x, positions)
        for index, (layer, run) in enumerate(zip(parts.layers, runs, strict=True)):
            if run is False:
                continue
            # The layer writes into its input; rows that skip it need theirs again.
            before = x.clone() if isinstance(run, Tensor) else x
            x = decoder_layer(layer, index, x, rope, attention, parts.llm_attention, self.kernels, TASK)
            if isinstance(run, Tensor):
                x = torch.where(run, x, before)
        return self._final_norm(x[:, 0])

    def _layers_run(self, skipped: Sequence[tuple[int, ...]]) -> list[bool | Tensor]:
        """Per layer whether the rows run it: True, False, or bool [rows, 1, 1] where they differ."""
        runs: list[bool | Tensor] = []
        for layer in range(len(self.parts.layers)):
            rows = [layer not in chosen for chosen in skipped]
            mixed = any(rows) and not all(rows)
            runs.append(torch.tensor(rows, device=self.parts.device)[:, None, None] if mixed else rows[0])
        return runs

    # ---- prefill

    def _prefill(self, cache: PromptCache) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
        """Fill a cache's prompts -> final hidden states of their last tokens [rows, hidden], layers their answers skip.

        Prompts that share much with another one of the batch are computed after it, all together, from where they differ.
        """
        first: list[tuple[int, int]] = []
        second: list[tuple[int, int]] = []
        borrowed: list[tuple[int, int, int]] = []
        for row, prompt in enumerate(cache.prompts):
            shared, source = self._best_source(self._cache, range(MAX_SOURCES), prompt)
            within, other = self._best_source(cache, [row for row, _ in first[:MAX_SOURCES]], prompt)
            if within > shared and within >= prompt.length // 2:
                second.append((row, within))
                borrowed.append((row, other, within))
            else:
                first.append((row, shared))
                if shared:
                    assert self._cache is not None
                    prompt.kept = self._cache.prompts[source].kept
                    cache.borrow(row, self._cache, source, shared)
        hidden = torch.empty(
            len(cache.prompts), self.parts.hidden, dtype=cache.buffers[0].dtype, device=self.parts.device
        )
        importance = torch.zeros(len(cache.prompts), len(self.parts.layers), device=self.parts.device)
        self._fill(cache, first, hidden, importance)
        for row, other, shared in borrowed:
            cache.prompts[row].kept = cache.prompts[other].kept
            cache.borrow(row, cache, other, shared)
        if second:
            self._fill(cache, second, hidden, importance)
        self.prefilled += sum(cache.prompts[row].length - shared for row, shared in (*first, *second))
        self.reused += sum(shared for _, shared in (*first, *second))
        return hidden, self._choose_layers(importance)

    def _best_source(self, cache: PromptCache | None, rows: Sequence[int], prompt: Prompt) -> tuple[int, int]:
        """The most leading tokens that one of a cache's rows can lend to a prompt, and the row."""
        if cache is None:
            return 0, 0
        limit = prompt.spans[0][0] if prompt.spans and self.pruner.sees_question else prompt.length - 1
        # Behind the last image there is only a question: no other row can lend much more.
        enough = min(limit, sum(prompt.spans[-1]) if prompt.spans else limit)
        best = (0, 0)
        for row in rows:
            if row < len(cache.prompts) and best[0] < enough:
                best = max(best, (common_prefix(cache.prompts[row], prompt, limit), row), key=lambda found: found[0])
        return best

    def _fill(self, cache: PromptCache, chunks: Sequence[tuple[int, int]], hidden: Tensor, importance: Tensor) -> None:
        """Run chunks (row, tokens it has already) through the model, end to end; write hidden and importance of their rows."""
        parts, kernels, shape = self.parts, self.kernels, self.parts.llm_attention
        prompts = [cache.prompts[row] for row, _ in chunks]
        device = hidden.device
        x = torch.cat([prompt.embeds[:, start:] for prompt, (_, start) in zip(prompts, chunks, strict=True)], dim=1)
        positions = [
            torch.arange(start, p.length, device=device) for p, (_, start) in zip(prompts, chunks, strict=True)
        ]
        rope = self._rope(x, torch.cat(positions)[None])
        attention = _PrefillPass(
            cache,
            [
                (row, start, _additive(p.allowed[start:], x.dtype)[None, None])
                for p, (row, start) in zip(prompts, chunks, strict=True)
            ],
        )
        rows = torch.tensor([row for row, _ in chunks], device=device)
        last = torch.tensor([position.shape[0] for position in positions], device=device).cumsum(0) - 1
        for index, layer in enumerate(parts.layers):
            before = x[0, last] if self.layers_to_skip else None
            narrowing = _Narrowing(self.pruner, cache, chunks, layer.self_attn, rope) if index == cache.split else None
            if narrowing is not None and narrowing.drops:
                x, rope, attention = pruning_layer(layer, index, x, rope, narrowing, shape, kernels, TASK)
                last = torch.tensor([mask.shape[2] for _, _, mask in attention.pieces], device=device).cumsum(0) - 1
            else:
                if narrowing is not None:
                    _, attention = narrowing(None, None)
                x = decoder_layer(layer, index, x, rope, attention, shape, kernels, TASK)
            if before is not None:
                importance[rows, index] = kernels.cosine_importance(before, x[0, last])
        hidden[rows] = self._final_norm(x[0, last])

    def _choose_layers(self, importance: Tensor) -> tuple[tuple[int, ...], ...]:
        """The least important layers of every row, from 1 - cosine(input, output) of its prompt's last token [rows, layers]."""
        if self.layers_to_skip == 0:
            return ((),) * importance.shape[0]
        return tuple(
            tuple(sorted(sorted(range(len(scores)), key=scores.__getitem__)[: self.layers_to_skip]))
            for scores in importance.tolist()
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a bool mask of any shape is True, -inf elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))
