"""The decode loop: one token for every row of a batch at a time, over cached keys and values.

With graph capture a token is one replay: slots, positions and masks are values on the device, and the host reads a token only
after launching the next one. Without, finished rows leave the batch, which saves their work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..models.masks import additive
from ..models.showo2.decoding import OnToken, TokenSampler
from ..ops.kernel_sets import KernelSet
from .answer_memory import ANSWER_STEP, AnswerMemory, Buffers, GrowingMemory, layer_of
from .graphs import GraphCache
from .memory import MemoryPool
from .modules.attention import HeadNorms, Rope, rope_table, rotate_into
from .modules.decoder_layer import decoder_layer
from .network import Network
from .prompt_cache import PromptCache
from .readback import Readback
from .work import TokenWork

__all__ = ["TASK", "AnswerRequest", "Decoder", "Pick"]

TASK = "understanding"

Pick = Callable[[Tensor, Sequence[int]], Tensor]
"""Logits [rows, vocab] and the rows' prompt indices -> token ids [rows, 1]."""


@dataclass(frozen=True)
class AnswerRequest:
    """How to continue the prompts of a filled cache."""

    hidden: Tensor
    """[rows, hidden], final hidden states of the prompts' last tokens."""
    skipped: Sequence[tuple[int, ...]]
    """For each prompt the layers that its answer skips."""
    max_new_tokens: int
    """At least 1."""
    pick: Pick
    """Chooses tokens from logits."""
    eos_token: int | None
    """Ends an answer and is part of it."""
    on_token: OnToken | None = None
    """Called with every token as soon as the host has it."""


class _FixedPass:
    """One new token per row, written at `slots`; each row attends as its mask allows."""

    def __init__(self, memory: AnswerMemory, kernels: KernelSet):
        self.memory = memory
        self.kernels = kernels

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rope: Rope, norms: HeadNorms | None = None
    ) -> Tensor:
        memory = self.memory
        split = memory.shape.split
        region = 0 if layer < split else 1
        keys, values = layer_of(memory.buffers, split, layer)
        start = memory.slots[region : region + 1]
        cache = (keys.transpose(1, 2), values.transpose(1, 2))
        rotated = rotate_into(self.kernels, query, key, value, rope, norms, *cache, start)
        return self.kernels.attention(rotated, keys, values, mask=memory.masks[region]).flatten(2)


class _GrowingPass:
    """One new token per row, after the answers so far; finished rows leave the batch."""

    def __init__(self, cache: PromptCache, masks: list[Tensor | None], kernels: KernelSet):
        self.split, self.ends, self.buffers = cache.split, cache.ends, cache.buffers
        self.masks = masks
        self.kernels = kernels
        self.count = 0

    def reserve(self) -> None:
        """Make room for the next token. A longer answer is a copy, so the cache stays as it is for the next question."""
        if _room(self.buffers, self.ends) - self.count < 1:
            more = max(ANSWER_STEP, self.count)
            first, second = (pad(buffer, (0, 0, 0, more)) for buffer in self.buffers)
            self.buffers = (first, second)
            self.masks = [None if mask is None else pad(mask, (0, more)) for mask in self.masks]  # 0: seen

    def narrow(self, rows: Tensor) -> None:
        """Continue with some rows only. They are copied, so the cache stays complete for the next question."""
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
        rotated = rotate_into(self.kernels, query, key, value, rope, norms, *new)
        keys, values = keys[:, :, : slot + 1], values[:, :, : slot + 1]
        seen = None if mask is None else mask[..., : slot + 1]
        return self.kernels.attention(rotated, keys, values, mask=seen).flatten(2)


@dataclass
class _Answers:
    """The answers so far."""

    tokens: list[list[Tensor]]
    """Per prompt, 0-d int64 on the device, the end token included."""
    live: list[int]
    """Prompts whose answers have not ended."""
    eos: int | None
    on_token: OnToken | None

    @property
    def read(self) -> bool:
        """Whether the host has to read the tokens."""
        return self.eos is not None or self.on_token is not None

    def append(self, token: Tensor, prompts: Sequence[int], values: Sequence[float] | None) -> None:
        """Append tokens [rows, 1] to their prompts' answers, except to those that have ended.

        Args:
            prompts: the prompt of each row. values: the tokens as read by the host; None where it does not read.
        """
        for at, (prompt, one) in enumerate(zip(prompts, token[:, 0].unbind(), strict=True)):
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
    """Continues prompts whose keys and values are cached.

    Attributes:
        waits: times that the host waited for a token of the last batch.
        ran: whether it has computed any.
    """

    def __init__(self, network: Network, pool: MemoryPool[GrowingMemory]):
        self.network = network.at(TASK, "decode")
        self.parts = self.network.parts
        self.kernels = self.network.kernels
        self.pool = pool
        self.ran = False
        self.waits = 0

    def run(self, cache: PromptCache, request: AnswerRequest) -> list[list[Tensor]]:
        """Continue the prompts of a filled cache.

        Returns:
            Per prompt token ids, 0-d int64 tensors, at most `max_new_tokens`.
        """
        prompts = range(len(cache.prompts))
        answers = _Answers([[] for _ in prompts], list(prompts), request.eos_token, request.on_token)
        first = request.pick(self.parts.lm_head(request.hidden), list(prompts))
        if isinstance(cache.lease.memory, AnswerMemory):
            self._run_fixed(cache, cache.lease.memory, request, first, answers)
        else:
            self._run_growing(cache, request, first, answers)
        return answers.tokens

    def _check(self, cache: PromptCache) -> None:
        self.pool.check(cache.lease, "this question was being answered")

    # ---- finished rows leave the batch

    def _run_growing(self, cache: PromptCache, request: AnswerRequest, token: Tensor, answers: _Answers) -> None:
        dtype = cache.buffers[0].dtype
        # Not max_new_tokens, which may be any number: masks grow with the buffers.
        room = _room(cache.buffers, cache.ends)
        masks = [None if bool(allowed.all()) else additive(allowed, dtype) for allowed in _visible(cache, room)]
        attention = _GrowingPass(cache, masks, self.kernels)
        readback = Readback()
        live = list(answers.live)
        runs = self._layers_run([request.skipped[row] for row in live])
        positions = torch.tensor([[prompt.length] for prompt in cache.prompts], device=token.device)
        while True:
            values = None
            if answers.read:
                readback.post(token)
                values = readback.wait()
            answers.append(token, live, values)
            self._check(cache)
            if attention.count == request.max_new_tokens - 1 or not answers.live:
                break
            if len(answers.live) < len(live):
                still_live = [i for i, row in enumerate(live) if row in answers.live]
                rows = torch.tensor(still_live, device=token.device)
                attention.narrow(rows)
                token, positions = token[rows], positions[rows]
                live = list(answers.live)
                runs = self._layers_run([request.skipped[row] for row in live])
            attention.reserve()
            x = self.parts.embed_tokens(token).to(dtype)
            rope = rope_table(self.parts.llm_rope, positions + attention.count, x.dtype)
            hidden = self._token(x, rope, attention, runs)
            attention.count += 1
            token = request.pick(self.parts.lm_head(hidden), live)
        self.waits = readback.waits

    def _layers_run(self, skipped: Sequence[tuple[int, ...]]) -> list[bool | Tensor]:
        """For each layer whether the rows run it: True, False, or bool [rows, 1, 1] where they differ."""
        layers = [[layer not in chosen for chosen in skipped] for layer in range(len(self.parts.layers))]
        if all(rows == rows[:1] * len(rows) for rows in layers):
            return [rows[0] for rows in layers]
        on_device = torch.tensor(layers, device=self.parts.device)[:, :, None, None]
        return [on_device[i] if any(rows) and not all(rows) else rows[0] for i, rows in enumerate(layers)]

    def _token(
        self, x: Tensor, rope: Rope, attention: _FixedPass | _GrowingPass, runs: Sequence[bool | Tensor]
    ) -> Tensor:
        """One token per row, x [rows, 1, hidden] -> final hidden states [rows, hidden]."""
        self.ran = True
        for index, (layer, run) in enumerate(zip(self.network.layers, runs, strict=True)):
            if run is False:
                continue
            # The layer overwrites its input, which rows that skip it still need.
            before = x.clone() if isinstance(run, Tensor) else x
            x = decoder_layer(layer, index, x, rope, attention, self.parts.llm_attention, TASK)
            if isinstance(run, Tensor):
                x = torch.where(run, x, before)
        return self.network.final_norm(x[:, 0])

    # ---- fixed addresses

    def _run_fixed(
        self, cache: PromptCache, memory: AnswerMemory, request: AnswerRequest, token: Tensor, answers: _Answers
    ) -> None:
        rows, pick = list(answers.live), request.pick
        # A token is read while the next one is computed. Sampling must not run ahead: a draw past the end of an answer would
        # advance the generator.
        behind = 0 if isinstance(pick, TokenSampler) and pick.temperature > 0 else 1
        work = self._load(cache, memory, request)
        graphs: GraphCache[Any] = cache.lease.graphs
        readbacks = (Readback(), Readback())
        sent: deque[tuple[Tensor, Readback]] = deque()
        for count in range(request.max_new_tokens):
            if answers.read:
                readbacks[count % 2].post(token)
                sent.append((token, readbacks[count % 2]))
            else:
                answers.append(token, rows, None)
            last = count == request.max_new_tokens - 1
            while len(sent) > (0 if last else behind):
                one, readback = sent.popleft()
                answers.append(one, rows, readback.wait())
            self._check(cache)
            if last or not answers.live:
                break
            memory.token.copy_(token)
            graphs.run(self._fixed_token, work)
            if behind or len(answers.live) == len(rows):
                token = pick(memory.logits, rows)
            else:
                token = token.clone()
                token[answers.live] = pick(memory.logits[answers.live], answers.live)
        self.waits = sum(readback.waits for readback in readbacks)

    def _load(self, cache: PromptCache, memory: AnswerMemory, request: AnswerRequest) -> TokenWork:
        """Write layer choices, masks, slots and positions into memory; returns the work of one token."""
        runs = self._layers_run(request.skipped)
        for layer, run in enumerate(runs):
            if isinstance(run, Tensor):
                memory.runs[layer] = run
        for mask, allowed in zip(memory.masks, _visible(cache, 0), strict=True):
            unused = mask.shape[-1] - allowed.shape[-1]
            mask.copy_(additive(pad(allowed, (0, unused)), mask.dtype))
        memory.slots.copy_(torch.tensor(cache.ends, device="cpu"))
        memory.position.copy_(torch.tensor([[prompt.length] for prompt in cache.prompts], device="cpu"))
        return TokenWork(len(cache.prompts), tuple(None if isinstance(run, Tensor) else run for run in runs))

    def _fixed_token(self, memory: AnswerMemory, work: TokenWork) -> None:
        """From each row's token to the logits of the next; device work only."""
        runs = [memory.runs[layer] if run is None else run for layer, run in enumerate(work.layers)]
        for mask, slot in zip(memory.masks, memory.slots.unbind(), strict=True):
            mask.index_fill_(3, slot, 0.0)
        cos, sin = (table[0].index_select(0, memory.position[:, 0])[:, None] for table in memory.rope)
        x = self.parts.embed_tokens(memory.token).to(memory.logits.dtype)
        hidden = self._token(x, (cos, sin), _FixedPass(memory, self.kernels), runs)
        memory.logits.copy_(self.parts.lm_head(hidden))
        memory.slots += 1
        memory.position += 1


def _room(buffers: Buffers, ends: Sequence[int]) -> int:
    """Slots for an answer's tokens that both buffers have."""
    return min(buffer.shape[4] - end for buffer, end in zip(buffers, ends, strict=True))


def _visible(cache: PromptCache, answer_slots: int) -> list[Tensor]:
    """For each of a cache's two buffers bool [rows, 1, 1, slots]: what a row's answer may attend to. That is what its prompt's
    last token attends to, and every answer slot."""
    result = []
    for end, late in zip(cache.ends, (False, True), strict=True):
        rows = [p.allowed[-1, p.kept] if late and p.kept is not None else p.allowed[-1] for p in cache.prompts]
        allowed = torch.ones(len(rows), end + answer_slots, dtype=torch.bool, device=rows[0].device)
        for row, seen in enumerate(rows):
            allowed[row, :end] = pad(seen, (0, end - seen.shape[0]))
        result.append(allowed[:, None, None])
    return result
