"""The decode loop: one token in every row of a batch, again and again, over cached keys and values.

Where work is captured, a token is one replay: the place of the new token, positions and masks are values on the device, and
the host reads a token only after it has launched the next one. Elsewhere rows that are done leave the batch, which saves
their work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.showo2.decoding import OnToken, TokenSampler
from ..models.structure import Showo2Parts, norm_eps
from ..ops.kernel_sets import KernelSet
from .graphs import Captures, Pieces, Readback, lasting
from .modules.attention import HeadNorms, Rope, attend_folded, rope_table, rotate_into
from .modules.decoder_layer import decoder_layer
from .prompt_cache import PromptCache, layer_of
from .workspace import rounded_up

__all__ = ["TASK", "AnswerMemory", "Decoder", "Pick", "additive"]

TASK = "understanding"

CAPACITY_STEP = 256
"""Capacity for prompts and answers is rounded up to this where memory is kept, so that most of the next calls fit."""

Pick = Callable[[Tensor, Sequence[int]], Tensor]
"""Logits [rows, vocab] and the numbers of the prompts they belong to -> token ids [rows, 1]."""


class AnswerMemory:
    """Memory of fixed place for one batch of answers, where work on it is captured.

    Attributes:
        buffers: as `PromptCache.buffers`. masks: additive [rows, 1, 1, capacity] for each.
        runs: bool [layers, rows, 1, 1], where rows differ in the layers they skip.
        in_use: answers are being written here. done: the end of the last ones' work, on a GPU.
        token, position: int64 [rows, 1]. slots: int64 [2], where the new token goes in each of the two buffers.
        logits: [rows, vocab].
    """

    def __init__(
        self, rows: int, capacities: tuple[int, int], split: int, parts: Showo2Parts, like: Tensor, pieces: Pieces
    ):
        layers, shape = len(parts.layers), parts.llm_attention
        self.key = (rows, split)
        self.capacities = (_rounded(capacities[0]), _rounded(capacities[1]))
        first, second = (
            like.new_zeros(count, 2, rows, shape.kv_heads, capacity, shape.head_dim)
            for count, capacity in zip((split, layers - split), self.capacities, strict=True)
        )
        self.buffers = (first, second)
        self.masks = [like.new_zeros(rows, 1, 1, capacity) for capacity in self.capacities]
        self.runs = torch.zeros(layers, rows, 1, 1, dtype=torch.bool, device=like.device)
        self.token, self.position = (torch.zeros(rows, 1, dtype=torch.int64, device=like.device) for _ in range(2))
        self.slots = torch.zeros(2, dtype=torch.int64, device=like.device)
        self.logits = like.new_zeros(rows, parts.lm_head.weight.shape[0])
        positions = torch.arange(self.capacities[0], device=like.device)[None]
        self.rope = rope_table(parts.llm_rope, positions, like.dtype)
        self.pieces = pieces
        self.in_use = False
        self.done: Any = None

    def holds(self, rows: int, capacities: tuple[int, int], split: int, dtype: torch.dtype) -> bool:
        """Whether a batch fits, and not with so much room left that every token would look past it in vain."""
        pairs = zip(self.capacities, capacities, strict=True)
        fits = all(asked <= mine <= 2 * _rounded(asked) for mine, asked in pairs)
        return self.key == (rows, split) and fits and self.logits.dtype == dtype

    def nbytes(self) -> int:
        tensors = (
            *self.buffers,
            *self.masks,
            *self.rope,
            self.runs,
            self.token,
            self.position,
            self.slots,
            self.logits,
        )
        return sum(tensor.nbytes for tensor in tensors)


def _rounded(capacity: int) -> int:
    return rounded_up(capacity, CAPACITY_STEP)


class _FixedPass:
    """One new token in every row, written where `slots` says; every row sees what its mask lets through."""

    def __init__(self, memory: AnswerMemory, kernels: KernelSet):
        self.memory = memory
        self.kernels = kernels

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rope: Rope, norms: HeadNorms | None = None
    ) -> Tensor:
        memory = self.memory
        split = memory.key[1]
        region = 0 if layer < split else 1
        keys, values = layer_of(memory.buffers, split, layer)
        start = memory.slots[region : region + 1]
        cache = (keys.transpose(1, 2), values.transpose(1, 2))
        folded = rotate_into(self.kernels, query, key, value, rope, norms, *cache, start)
        return attend_folded(folded, keys, values, 1, memory.masks[region])


class _GrowingPass:
    """One new token in every row, behind the answers so far; rows leave the batch as they are done."""

    def __init__(self, cache: PromptCache, masks: list[Tensor | None], kernels: KernelSet):
        self.split, self.ends, self.buffers = cache.split, cache.ends, cache.buffers
        self.masks = masks
        self.kernels = kernels
        self.count = 0

    def narrow(self, rows: Tensor) -> None:
        """Go on with some rows only. They are copied, so the cache itself stays whole for the next question."""
        first, second = (buffer.index_select(2, rows) for buffer in self.buffers)
        self.buffers = (first, second)
        self.masks = [None if mask is None else mask[rows] for mask in self.masks]

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rope: Rope, norms: HeadNorms | None = None
    ) -> Tensor:
        region = 0 if layer < self.split else 1
        keys, values = layer_of(self.buffers, self.split, layer)
        slot, mask = self.ends[region] + self.count, self.masks[region]
        new = (each[:, :, slot : slot + 1].transpose(1, 2) for each in (keys, values))
        folded = rotate_into(self.kernels, query, key, value, rope, norms, *new)
        seen = None if mask is None else mask[..., : slot + 1]
        return attend_folded(folded, keys[:, :, : slot + 1], values[:, :, : slot + 1], 1, seen)


@dataclass
class _Answers:
    """Tokens as they come.

    Attributes:
        tokens: per prompt, 0-d int64 on the device, its end token included. live: prompts that go on.
    """

    tokens: list[list[Tensor]]
    live: list[int]
    eos: int | None
    on_token: OnToken | None

    @property
    def read(self) -> bool:
        """Whether the host has to see the tokens."""
        return self.eos is not None or self.on_token is not None

    def take(self, token: Tensor, rows: Sequence[int], values: Sequence[float] | None) -> None:
        """A token [rows, 1] of every row, rows being prompts, and what the host read of it. Rows that are done drop theirs."""
        for at, (prompt, one) in enumerate(zip(rows, token[:, 0].unbind(), strict=True)):
            if prompt not in self.live:
                continue
            self.tokens[prompt].append(one)
            if values is None:
                continue
            if self.on_token is not None:
                self.on_token(prompt, int(values[at]))
            if int(values[at]) == self.eos:
                self.live.remove(prompt)


class Decoder:
    """Continues prompts whose keys and values are cached."""

    def __init__(self, parts: Showo2Parts, kernels: KernelSet, captures: Captures):
        self.parts = parts
        self.kernels = kernels
        self.captures = captures
        self.waits = 0
        self._resets = 0
        self._weights = 0
        self._memories: list[AnswerMemory] = []

    def memory(
        self, rows: int, capacities: tuple[int, int], split: int, like: Tensor, busy: AnswerMemory | None
    ) -> AnswerMemory | None:
        """Memory for a batch where work is captured, else None.

        Args:
            busy: that of the last batch, whose prompts may still be lent. Two take turns, each with its graphs.
        """
        if self.captures.make is None:
            return None
        if (weights := self.captures.addresses()) != self._weights:
            self._weights = weights
            self._memories = []
        for memory in self._memories:
            if memory is not busy and not memory.in_use and memory.holds(rows, capacities, split, like.dtype):
                if memory.done is not None:
                    torch.cuda.current_stream(like.device).wait_event(memory.done)
                # A slot that a row does not use is masked, and must not hold the NaN of an earlier prompt.
                for buffer in memory.buffers:
                    buffer.zero_()
                return memory
        with lasting():
            made = AnswerMemory(rows, capacities, split, self.parts, like, self.captures.pieces())
        self._memories = [memory for memory in self._memories if memory is busy or memory.in_use] + [made]
        return made

    def reset(self) -> None:
        """Drop what is kept. Answers under way end with an error: the network they were begun with may be gone."""
        self._memories = []
        self._resets += 1

    def nbytes(self) -> int:
        """Bytes of memory kept between batches."""
        return sum(memory.nbytes() for memory in self._memories)

    def run(
        self,
        cache: PromptCache,
        hidden: Tensor,
        skipped: Sequence[tuple[int, ...]],
        max_new_tokens: int,
        pick: Pick,
        eos_token: int | None,
        on_token: OnToken | None = None,
    ) -> list[list[Tensor]]:
        """Continue the prompts of a filled cache.

        Args:
            hidden: [rows, hidden], final hidden states of the prompts' last tokens. skipped: per prompt the layers that its
                answer skips. pick: chooses tokens. eos_token: ends a row's answer, and is part of it.
            on_token: sees every token as soon as the host does.

        Returns:
            Per prompt token ids, 0-d int64 tensors, at most `max_new_tokens` (at least 1).
        """
        prompts = range(len(cache.prompts))
        answers = _Answers([[] for _ in prompts], list(prompts), eos_token, on_token)
        first = pick(self.parts.lm_head(hidden), list(prompts))
        if cache.memory is not None:
            memory: AnswerMemory = cache.memory
            memory.in_use = True  # a callback may ask another question meanwhile
            try:
                self._run_fixed(cache, memory, first, skipped, max_new_tokens, pick, answers)
            finally:
                memory.in_use = False
                if memory.logits.device.type == "cuda":
                    memory.done = torch.cuda.current_stream(memory.logits.device).record_event()
        else:
            self._run_growing(cache, first, skipped, max_new_tokens, pick, answers)
        return answers.tokens

    # ---- rows leave the batch

    def _run_growing(
        self,
        cache: PromptCache,
        token: Tensor,
        skipped: Sequence[tuple[int, ...]],
        max_new_tokens: int,
        pick: Pick,
        answers: _Answers,
    ) -> None:
        masks = [
            None if bool(allowed.all()) else additive(allowed, cache.buffers[0].dtype)
            for allowed in _visible(cache, max_new_tokens - 1)
        ]
        attention = _GrowingPass(cache, masks, self.kernels)
        readback, resets = Readback(), self._resets
        live = list(answers.live)
        runs = self._layers_run([skipped[row] for row in live])
        positions = torch.tensor([[prompt.length] for prompt in cache.prompts], device=token.device)
        while True:
            values = None
            if answers.read:
                readback.post(token)
                values = readback.wait()
            answers.take(token, live, values)
            self._check(resets)
            if attention.count == max_new_tokens - 1 or not answers.live:
                break
            if len(answers.live) < len(live):
                going = [i for i, row in enumerate(live) if row in answers.live]
                rows = torch.tensor(going, device=token.device)
                attention.narrow(rows)
                token, positions = token[rows], positions[rows]
                live = list(answers.live)
                runs = self._layers_run([skipped[row] for row in live])
            x = self.parts.embed_tokens(token).to(cache.buffers[0].dtype)
            rope = rope_table(self.parts.llm_rope, positions + attention.count, x.dtype)
            hidden = self._token(x, rope, attention, runs)
            attention.count += 1
            token = pick(self.parts.lm_head(hidden), live)
        self.waits = readback.waits

    def _layers_run(self, skipped: Sequence[tuple[int, ...]]) -> list[bool | Tensor]:
        """Per layer whether the rows run it: True, False, or bool [rows, 1, 1] where they differ."""
        layers = [[layer not in chosen for chosen in skipped] for layer in range(len(self.parts.layers))]
        if all(rows == rows[:1] * len(rows) for rows in layers):
            return [rows[0] for rows in layers]
        on_device = torch.tensor(layers, device=self.parts.device)[:, :, None, None]
        return [on_device[i] if any(rows) and not all(rows) else rows[0] for i, rows in enumerate(layers)]

    def _check(self, resets: int) -> None:
        if resets != self._resets:
            raise RuntimeError("model: its handle was removed or reset while this question was being answered")

    def _token(
        self, x: Tensor, rope: Rope, attention: _FixedPass | _GrowingPass, runs: Sequence[bool | Tensor]
    ) -> Tensor:
        """One token a row, x [rows, 1, hidden] -> final hidden states [rows, hidden]."""
        parts = self.parts
        for index, (layer, run) in enumerate(zip(parts.layers, runs, strict=True)):
            if run is False:
                continue
            # The layer writes into its input; rows that skip it need theirs again.
            before = x.clone() if isinstance(run, Tensor) else x
            x = decoder_layer(layer, index, x, rope, attention, parts.llm_attention, self.kernels, TASK)
            if isinstance(run, Tensor):
                x = torch.where(run, x, before)
        norm = parts.final_norm
        return self.kernels.rms_norm(x[:, 0], norm.weight, norm_eps(norm))

    # ---- everything stays in place

    def _run_fixed(
        self,
        cache: PromptCache,
        memory: AnswerMemory,
        token: Tensor,
        skipped: Sequence[tuple[int, ...]],
        max_new_tokens: int,
        pick: Pick,
        answers: _Answers,
    ) -> None:
        rows = list(answers.live)
        # A token is read while the next one is on its way; but draws advance their generators, so there none is made ahead of
        # a token that may end an answer.
        behind = 0 if isinstance(pick, TokenSampler) and pick.temperature > 0 else 1
        runs = self._layers_run(skipped)
        for layer, run in enumerate(runs):
            if isinstance(run, Tensor):
                memory.runs[layer] = run
        how: list[bool | Tensor] = [
            memory.runs[layer] if isinstance(run, Tensor) else run for layer, run in enumerate(runs)
        ]
        for mask, allowed in zip(memory.masks, _visible(cache, 0), strict=True):
            mask.fill_(float("-inf"))
            mask[..., : allowed.shape[-1]] = additive(allowed, mask.dtype)
        memory.slots.copy_(torch.tensor(cache.ends))
        memory.position.copy_(torch.tensor([[prompt.length] for prompt in cache.prompts]))
        key = ("token", len(rows), tuple("mixed" if isinstance(run, Tensor) else run for run in runs))
        readbacks = (Readback(), Readback())
        sent: deque[tuple[Tensor, Readback]] = deque()
        resets = self._resets
        for count in range(max_new_tokens):
            if answers.read:
                readbacks[count % 2].post(token)
                sent.append((token, readbacks[count % 2]))
            else:
                answers.take(token, rows, None)
            last = count == max_new_tokens - 1
            while len(sent) > (0 if last else behind):
                one, readback = sent.popleft()
                answers.take(one, rows, readback.wait())
            self._check(resets)
            if last or not answers.live:
                break
            memory.token.copy_(token)
            memory.pieces.run(key, lambda: self._fixed_token(memory, how))
            if behind or len(answers.live) == len(rows):
                token = pick(memory.logits, rows)
            else:
                token = token.clone()
                token[answers.live] = pick(memory.logits[answers.live], answers.live)
        self.waits = sum(readback.waits for readback in readbacks)

    def _fixed_token(self, memory: AnswerMemory, runs: Sequence[bool | Tensor]) -> None:
        """From the token in every row to the logits of the next one; device work only."""
        for mask, slot in zip(memory.masks, memory.slots.unbind(), strict=True):
            mask.index_fill_(3, slot, 0.0)
        cos, sin = (table[0].index_select(0, memory.position[:, 0])[:, None] for table in memory.rope)
        x = self.parts.embed_tokens(memory.token).to(memory.logits.dtype)
        hidden = self._token(x, (cos, sin), _FixedPass(memory, self.kernels), runs)
        memory.logits.copy_(self.parts.lm_head(hidden))
        memory.slots += 1
        memory.position += 1


def _visible(cache: PromptCache, answer_slots: int) -> list[Tensor]:
    """For each of a cache's two buffers bool [rows, 1, 1, slots]: what a row's answer may look at. That is what its prompt's
    last token saw, and every slot for answers."""
    result = []
    for end, late in zip(cache.ends, (False, True), strict=True):
        rows = [p.allowed[-1, p.kept] if late and p.kept is not None else p.allowed[-1] for p in cache.prompts]
        allowed = torch.ones(len(rows), end + answer_slots, dtype=torch.bool, device=rows[0].device)
        for row, seen in enumerate(rows):
            allowed[row, :end] = torch.nn.functional.pad(seen, (0, end - seen.shape[0]))
        result.append(allowed[:, None, None])
    return result


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a bool mask of any shape is True, -inf elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))
