"""Answers questions: one prefill, then a decode over cached keys and values; an image is encoded once.

A prompt reuses the prefix that it shares with another prompt of the last call or of its own batch: a second question about the
same images starts after them, one about other images after the first ones that are the same. A shared prefix ends where no
earlier token looks past it, so a bidirectional image span is reused whole or not at all.

Visual tokens are dropped inside the prefill (`token_pruning`). Image tokens do not attend to the question, so the choice does
not depend on it, and a pruned image is reused like any other; the score 'attention' is the exception. An answer's tokens
may skip layers. These are chosen by the importance of the layers for the prompt's last token, measured in the prefill, which
never skips layers; skipped layers neither read nor write the answer's keys and values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.adapter import Question
from ..models.checks import made_by
from ..models.decoding import OnToken
from ..models.masks import additive
from ..ops.kernel_sets import KernelSet
from ..planning.config import FlashUConfig
from ..planning.groups import Answers
from ..planning.reading import shown
from ..planning.schedule import least_important
from .answer_memory import AnswerMemory
from .answering import Answering, AnswerRequest
from .decoding import TASK, Decoder, Pick
from .graphs import GraphCapture
from .memory import MemoryPool
from .modules.attention import HeadNorms, Rope, rotate_into
from .modules.decoder_layer import decoder_layer, pruning_layer
from .modules.layer import Layer
from .network import Network
from .prompt_cache import Prompt, PromptCache, PromptStore, common_prefix
from .token_pruning import TokenPruner

__all__ = ["TASK", "UnderstandingEngine"]

MAX_SOURCES = 16
"""Prompts of the last call, and of the same call, that a prompt is compared with; a comparison reads both prompts."""

IDLE_MEMORIES = 1
"""Memories pooled besides the last question's, whose prompts may be reused: questions alternate between the two."""


class _PrefillPass:
    """New tokens of several prompts, concatenated in one row: each attends within its own prompt and its cached prefix."""

    def __init__(self, cache: PromptCache, chunks: Sequence[tuple[int, int, Tensor]], kernels: KernelSet):
        """chunks: (row of the cache, slots filled before, mask [1, 1, n, filled + n])."""
        self.cache = cache
        self.chunks = chunks
        self.kernels = kernels

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rope: Rope, norms: HeadNorms | None = None
    ) -> Tensor:
        keys, values = self.cache.layer(layer)
        attended = []
        at = 0
        for row, start, mask in self.chunks:
            end = mask.shape[3]
            n = end - start
            new, one = slice(at, at + n), slice(row, row + 1)
            rotated = rotate_into(
                self.kernels,
                query[:, new],
                key[:, new],
                value[:, new],
                (rope[0][:, new], rope[1][:, new]),
                norms,
                keys[one, :, start:end].transpose(1, 2),
                values[one, :, start:end].transpose(1, 2),
            )
            seen = (keys[one, :, :end], values[one, :, :end])
            attended.append(self.kernels.attention(rotated, *seen, mask=mask).flatten(2))
            at += n
        return attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)


class _Narrowing:
    """The choice inside the pruning layer of a prefill: which new tokens are kept, and their attention pass."""

    def __init__(
        self,
        pruner: TokenPruner,
        cache: PromptCache,
        chunks: Sequence[tuple[int, int]],
        layer: Layer,
        rope: Rope,
    ):
        """Args:
        chunks: (row of the cache, tokens that it already has).
        layer: the one that drops tokens.
        rope: of the new tokens.
        """
        self.pruner, self.cache, self.chunks, self.layer, self.rope = pruner, cache, chunks, layer, rope
        self.drops = any(
            drop and first >= start
            for row, start in chunks
            for (first, _), drop in zip(cache.prompt(row).spans, cache.prompt(row).dropped, strict=True)
        )

    def __call__(self, normed: Tensor | None, value: Tensor | None) -> tuple[Tensor, _PrefillPass]:
        """See `modules.decoder_layer.pruning_layer`. Both tensors may be None where nothing is dropped.

        Sets the prompts' `kept`.
        """
        by_value = self.drops and not self.pruner.sees_question
        scores = self.pruner.scores(value) if by_value and value is not None else None
        keep, chunks = [], []
        at = 0
        for row, start in self.chunks:
            prompt = self.cache.prompt(row)
            new = slice(at, at + prompt.length - start)
            own = scores[new] if scores is not None else None
            if self.drops and own is None:
                assert normed is not None
                own = self._attention_scores(prompt, row, start, normed[:, new], new)
            kept = self._kept(prompt, start, own)
            keep.append(kept + (at - start))
            reused = kept[:0] if prompt.kept is None else prompt.kept[: prompt.slots(start)]
            prompt.kept = torch.cat([reused, kept])
            allowed = prompt.allowed[kept][:, prompt.kept]
            mask = additive(allowed, prompt.embeds.dtype)[None, None]
            chunks.append((row, reused.shape[0], mask))
            at = new.stop
        return torch.cat(keep), _PrefillPass(self.cache, chunks, self.pruner.kernels)

    def _kept(self, prompt: Prompt, start: int, scores: Tensor | None) -> Tensor:
        """Kept positions from `start` on, ascending; `scores` begin at `start` too."""
        device = prompt.allowed.device
        pieces = []
        for (first, count), drop in zip(prompt.spans, prompt.dropped, strict=True):
            if first >= start and drop:
                assert scores is not None
                pieces += [
                    torch.arange(start, first, device=device),
                    self.pruner.keep(scores[first - start :], count, drop) + first,
                ]
                # The next scores begin after this span.
                scores, start = scores[first + count - start :], first + count
        return torch.cat([*pieces, torch.arange(start, prompt.length, device=device)])

    def _attention_scores(self, prompt: Prompt, row: int, start: int, normed: Tensor, new: slice) -> Tensor:
        cos, sin = self.rope
        keys, _ = self.cache.layer(self.cache.split)
        # With this score nothing after the first image is reused, so all earlier tokens are in the cache.
        before, rope = keys[row, :, :start], (cos[:, new], sin[:, new])
        return self.pruner.attention_scores(self.layer, normed, rope, before, prompt.allowed[-1])


class UnderstandingEngine:
    """Answers questions; the cache filled last is held for the next question.

    Attributes:
        prefilled, reused: prompt tokens computed, and found in a cache, so far.
        visual, visual_kept: image tokens in the prompts that began last, and how many of them the pruning layer left.
        skipped: for each of these prompts the layers that its answer skips.
        waits: times that the host waited for a token of the last batch.
    """

    def __init__(self, network: Network, config: FlashUConfig, capture: GraphCapture):
        self.network = network.at(TASK, "prefill")
        self.parts = parts = network.at(TASK, "embed").parts
        self.kernels = kernels = self.network.kernels
        self.pruner = TokenPruner(parts, config, kernels)
        self.pool: MemoryPool[AnswerMemory] = MemoryPool(capture, IDLE_MEMORIES)
        self.store = PromptStore(parts, self.pool, self.pruner.layer)
        self.decoder = Decoder(network)
        self.layers_to_skip = (config.answers or Answers()).layers_skipped(len(parts.layers))
        self.encoded = 0
        self.prefilled = 0
        self.reused = 0
        self.visual = 0
        self.visual_kept = 0
        self.skipped: tuple[tuple[int, ...], ...] = ()
        self.waits = 0
        self._images: dict[str | None, list[tuple[Tensor, Tensor]]] = {}

    def reset(self) -> None:
        """Drop the last prompts and images; answers under way raise at their next token."""
        self.forget()
        self.pool.clear()

    def forget(self) -> None:
        """Drop what the next question could reuse."""
        self.store.forget()
        self._images = {}

    def nbytes(self) -> Counter[str]:
        """Bytes held for the next question, by purpose."""
        images = sum(latents.nbytes + embeds.nbytes for own in self._images.values() for latents, embeds in own)
        return self.store.nbytes() + Counter({"answers' keys and values": images})

    # ---- inputs

    def image_embeds(self, images: Sequence[Tensor], adapter: str | None = None) -> list[Tensor]:
        """Latents [1, channels, H, W] each -> [1, patches, hidden] each. Equal images are encoded once by an adapter, also across
        two of its calls."""
        known = self._images.get(adapter, [])
        distinct = [latents for latents, _ in known]
        chosen: list[int] = []
        for latents in images:
            at = next((i for i, other in enumerate(distinct) if _same(other, latents)), len(distinct))
            if at == len(distinct):
                distinct.append(latents.clone())
            chosen.append(at)
        embeds: dict[int, Tensor] = {i: own for i, (_, own) in enumerate(known)}
        for shape in {latents.shape for latents in distinct[len(embeds) :]}:
            new = [i for i, latents in enumerate(distinct) if i >= len(known) and latents.shape == shape]
            with self.network.rows.of((adapter, len(new))):
                encoded = self.parts.embed_image(torch.cat([distinct[i] for i in new]))
            made_by("embed_image", encoded, len(new), None, self.parts.hidden)
            self.encoded += len(new)
            embeds.update(zip(new, encoded.split(1), strict=True))
        self._images[adapter] = [(distinct[i], embeds[i]) for i in dict.fromkeys(chosen)]
        return [embeds[i] for i in chosen]

    def question(
        self, images: Tensor | Sequence[Tensor], before: Any, after: Any, adapter: str | None = None
    ) -> Prompt:
        """A question about encoded images.

        Args:
            images: [1, patches, hidden], or a list of them.
            before: tokens before the first image, int64 [1, n], or what `Adapter.question` takes.
            after: tokens after the images, int64 [1, m]; boi and eoi come first (see `answer_tokens`). Or as before.
            adapter: that encoded the images and answers.
        """
        listed = [images] if isinstance(images, Tensor) else images
        with self.network.rows.of((adapter, 1)):
            question = self.parts.question(listed, before, after)
        return self.prompt(question, adapter)

    def prompt(self, question: Question, adapter: str | None = None) -> Prompt:
        """A prompt from copies of a question's tensors."""
        dropped = self.pruner.dropped(question.spans)
        embeds = made_by("question", question.embeds, 1, None, self.parts.hidden)
        length, positions = embeds.shape[1], question.positions
        if made_by("question", question.allowed, length, length).dtype != torch.bool:
            raise TypeError(f"Adapter.question: expected `allowed` in bool, got {question.allowed.dtype}")
        if any(start < 0 or count < 0 or start + count > length for start, count in question.spans):
            raise ValueError(f"Adapter.question: expected `spans` within {length} tokens, got {shown(question.spans)}")
        ahead = 0 if positions is None else length - 1 - int(positions.max())
        positions = torch.arange(length, device=self.parts.device) if positions is None else positions.clone()
        return Prompt(embeds.clone(), question.allowed.clone(), question.spans, dropped, positions, adapter, ahead)

    # ---- decoding

    def decode(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        pick: Pick,
        eos_token: int | None,
        on_token: OnToken | None = None,
    ) -> list[list[Tensor]]:
        """Continue prompts, whose lengths may differ.

        Args:
            pick: chooses tokens from logits.
            eos_token: ends an answer and is part of it.
            on_token: called with every token of every prompt as it comes.

        Returns:
            Per prompt token ids, 0-d int64 tensors, at most `max_new_tokens`.
        """
        if max_new_tokens == 0 or not prompts:
            return [[] for _ in prompts]
        answers = self.answering(len(prompts))
        told = on_token is not None
        try:
            begun = answers.admit(
                [
                    AnswerRequest(prompt, max_new_tokens, pick, eos_token, number, told)
                    for number, prompt in enumerate(prompts)
                ]
            )
            while answers.under_way:
                for answer, token in answers.step():
                    if on_token is not None:  # it may ask another question meanwhile
                        on_token(answer.request.number, token)
            answers.check()
        finally:
            answers.close()
            self.waits = answers.waits
        return [answer.tokens for answer in begun]

    def answering(self, rows: int) -> Answering:
        """For up to `rows` answers at once, none of which has begun; to be closed."""
        return Answering(self.store, self.decoder, self._prefill, rows)

    # ---- prefill

    def _prefill(
        self, cache: PromptCache, prompts: Sequence[Prompt], live: int
    ) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
        """Fill rows of a cache from `live` on with prompts of one adapter -> final hidden states of their last tokens [prompts,
        hidden], and the layers their answers skip.

        Prompts that share at least half with another one of these are filled in a second pass, from where they differ.
        """
        try:
            with self.network.rows.of(*((prompt.adapter, 1) for prompt in prompts)):
                filled = self._fill_rows(cache, prompts, live)
        except BaseException:
            for row in range(live, live + len(prompts)):
                cache.put(row, None)
            raise
        self.skipped = filled[1]
        self.visual = sum(prompt.visual for prompt in prompts)
        self.visual_kept = self.visual - sum(sum(prompt.dropped) for prompt in prompts)
        return filled

    def _fill_rows(
        self, cache: PromptCache, prompts: Sequence[Prompt], live: int
    ) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
        first: list[tuple[int, int]] = []
        second: list[tuple[int, int]] = []
        reused: list[tuple[int, Prompt, int, int]] = []
        for row, prompt in enumerate(prompts, live):
            within, other = self._best_source(cache, [row for row, _ in first], prompt)
            shared, source, at = self._best_earlier(cache, live, row, prompt)
            if within > shared and within >= prompt.length // 2:
                cache.free(row, None)
                cache.put(row, None)
                second.append((row, within))
                reused.append((row, prompt, other, within))
                continue
            first.append((row, shared))
            if shared:
                behind = source is cache and at >= row
                cache.free(row, at if behind else None)
                cache.reuse(row, prompt, source, row if behind else at, shared)
            else:
                cache.free(row, None)
                cache.put(row, prompt)
        hidden = torch.empty(len(prompts), self.parts.hidden, dtype=cache.memory.shape.dtype, device=self.parts.device)
        layers = len(self.parts.layers)
        importance = torch.zeros(len(prompts), layers, dtype=torch.float32, device=self.parts.device)
        self._fill(cache, first, live, hidden, importance)
        for number, (row, prompt, other, shared) in enumerate(reused):
            if bool(cache.prompt(other).finite):
                cache.reuse(row, prompt, cache, other, shared)
            else:
                cache.put(row, prompt)
                second[number] = (row, 0)
        if second:
            self._fill(cache, second, live, hidden, importance)
        self.prefilled += sum(cache.prompt(row).length - shared for row, shared in (*first, *second))
        self.reused += sum(shared for _, shared in (*first, *second))
        return hidden, self._choose_layers(importance)

    def _best_earlier(self, cache: PromptCache, live: int, row: int, prompt: Prompt) -> tuple[int, PromptCache, int]:
        """The longest prefix of a prompt in a row filled earlier: of this cache, or of the last one. Rows from `live` up to
        `row` belong to prompts that are yet to be filled."""
        own = [each for each in cache.filled() if not live <= each < row]
        shared, at = self._best_source(cache, own, prompt)
        last = self.store.last
        if last is not None and last is not cache:
            other, there = self._best_source(last, last.filled(), prompt)
            if other > shared:
                return other, last, there
        return shared, cache, at

    def _best_source(self, cache: PromptCache, rows: Sequence[int], prompt: Prompt) -> tuple[int, int]:
        """The longest prefix that a prompt can reuse from one of a cache's rows, and the row."""
        limit = prompt.spans[0][0] if prompt.spans and self.pruner.sees_question else prompt.length - 1
        # Only a question follows the last image: no other row shares much more.
        enough = min(limit, sum(prompt.spans[-1]) if prompt.spans else limit)
        best = (0, 0)
        for row in rows[:MAX_SOURCES]:
            if best[0] < enough:
                best = max(best, (common_prefix(cache.prompt(row), prompt, limit), row), key=lambda found: found[0])
        return best

    def _fill(
        self, cache: PromptCache, chunks: Sequence[tuple[int, int]], live: int, hidden: Tensor, importance: Tensor
    ) -> None:
        """Run chunks (row, tokens that it already has) through the model, concatenated; the outputs' first row is that of row
        `live`."""
        kernels, shape = self.kernels, self.parts.llm_attention
        prompts = [cache.prompt(row) for row, _ in chunks]
        device = hidden.device
        x = torch.cat([prompt.embeds[:, start:] for prompt, (_, start) in zip(prompts, chunks, strict=True)], dim=1)
        positions = [p.positions[start:] for p, (_, start) in zip(prompts, chunks, strict=True)]
        rope = self.store.rope.at(torch.cat(positions), max(prompt.length for prompt in prompts), x.dtype)
        attention = _PrefillPass(
            cache,
            [
                (row, start, additive(p.allowed[start:], x.dtype)[None, None])
                for p, (row, start) in zip(prompts, chunks, strict=True)
            ],
            kernels,
        )
        rows = torch.tensor([row - live for row, _ in chunks], device=device)
        last = torch.tensor([position.shape[0] for position in positions], device=device).cumsum(0) - 1
        for index, layer in enumerate(self.network.layers):
            before = x[0, last] if self.layers_to_skip else None
            narrowing = _Narrowing(self.pruner, cache, chunks, layer, rope) if index == cache.split else None
            if narrowing is not None and narrowing.drops:
                x, rope, attention = pruning_layer(layer, index, x, rope, narrowing, shape, kernels, TASK)
                counts = [mask.shape[3] - start for _, start, mask in attention.chunks]
                last = torch.tensor(counts, device=device).cumsum(0) - 1
            else:
                if narrowing is not None:
                    _, attention = narrowing(None, None)
                x = decoder_layer(layer, index, x, rope, attention, shape, TASK)
            if before is not None:
                importance[rows, index] = kernels.cosine_importance(before, x[0, last])
        hidden[rows] = final = self.network.final_norm(x[0, last])
        for prompt, finite in zip(prompts, final.isfinite().all(dim=-1).unbind(), strict=True):
            prompt.finite = finite

    def _choose_layers(self, importance: Tensor) -> tuple[tuple[int, ...], ...]:
        """The least important layers of every row, by 1 - cosine(input, output) of the prompt's last token [rows, layers]."""
        if not self.layers_to_skip:
            return ((),) * importance.shape[0]
        return tuple(least_important(scores, self.layers_to_skip) for scores in importance.tolist())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
