"""Answers under way: they begin and end at any time, and share the steps that compute their tokens.

The answers' rows come first in the memory. An answer that ends changes places with the last one, so its prompt stays, and the
next question can reuse its prefix, until another prompt needs the row. An answer gets the tokens that it gets alone: no
operator of the runtime lets a row depend on others (on a GPU only where the config asks for that).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models.decoding import TokenSampler
from .answer_memory import FIXED_TOKENS, AnswerShape
from .decoding import Decoder, Pick
from .prompt_cache import Prompt, PromptCache, PromptStore
from .readback import Readback
from .work import TokenWork

__all__ = ["Answer", "AnswerRequest", "Answering", "Prefill"]

ANSWER_STEP = 256
"""New tokens of each answer that memory which can grow has room for at first."""

Prefill = Callable[[PromptCache, Sequence[Prompt], int], tuple[Tensor, Sequence[tuple[int, ...]]]]
"""(cache, prompts, live rows): fills rows behind the live ones -> final hidden states of the prompts' last tokens [prompts,
hidden], and for each prompt the layers that its answer skips."""


@dataclass(frozen=True, eq=False)
class AnswerRequest:
    """A prompt and how to continue it."""

    prompt: Prompt
    max_new_tokens: int
    """At least 1."""
    pick: Pick
    """Chooses tokens from logits."""
    eos_token: int | None = None
    """Ends the answer and is part of it."""
    number: int = 0
    """The prompt's index, for `pick`."""
    told: bool = False
    """The host reads every token as it comes; else only where it looks for the end token."""

    @property
    def read(self) -> bool:
        return self.told or self.eos_token is not None

    @property
    def draws(self) -> bool:
        return isinstance(self.pick, TokenSampler) and self.pick.temperature > 0


@dataclass(eq=False)
class Answer:
    """An answer under way, or its end.

    Attributes:
        skipped: layers that its tokens skip.
        tokens: 0-d int64 on the device, the end token included.
        computed: tokens computed so far; the host may know fewer.
        done: no further tokens come.
        error: what ended it; of answers with a scheduler.
    """

    request: AnswerRequest
    skipped: tuple[int, ...]
    tokens: list[Tensor] = field(default_factory=list)
    computed: int = 0
    done: bool = False
    error: Exception | None = None

    @property
    def leaves(self) -> bool:
        """Whether no further token is computed."""
        return self.done or self.computed >= self.request.max_new_tokens

    def append(self, token: Tensor, value: int | None) -> None:
        """value: the token, where the host has read it."""
        self.tokens.append(token)
        self.done = len(self.tokens) >= self.request.max_new_tokens or (
            value is not None and value == self.request.eos_token
        )


class Answering:
    """Attributes:
    rows: answers that can be under way at once.
    waits: times that the host waited for tokens.
    """

    def __init__(self, store: PromptStore, decoder: Decoder, prefill: Prefill, rows: int):
        self.rows = rows
        self.waits = 0
        self._store = store
        self._decoder = decoder
        self._prefill = prefill
        self._cache: PromptCache | None = None
        self._live: list[Answer] = []
        """The answer of each row whose next token will be computed."""
        self._token = torch.empty(0, 1, dtype=torch.int64, device=decoder.parts.device)
        """The newest token of each of them, [live, 1]."""
        self._work: TokenWork | None = None
        """None: rows have changed since it was made."""
        self._sent: deque[tuple[Tensor, list[Answer], Readback]] = deque()
        """Tokens on their way to the host, and whose they are."""

    @property
    def room(self) -> int:
        """How many more answers can begin."""
        return self.rows - len(self._live)

    @property
    def under_way(self) -> bool:
        return bool(self._live or self._sent)

    def check(self) -> None:
        """Raise RuntimeError where the memory was taken away."""
        if self._cache is not None:
            self._store.pool.check(self._cache.lease, "this question was being answered")

    def admit(self, requests: Sequence[AnswerRequest]) -> list[Answer]:
        """Begin answers, at most `room`: their prompts are computed, and their first tokens. An error leaves the others."""
        assert 0 < len(requests) <= self.room
        self.check()
        cache = self._with_room(requests)
        live = len(self._live)
        try:
            self._store.read_last()
            hidden, skipped = self._prefill(cache, [request.prompt for request in requests], live)
            new = [Answer(*each) for each in zip(requests, skipped, strict=True)]
            self._store.keep(cache)
            token = self._pick(self._decoder.first(hidden, [request.prompt for request in requests]), new)
        except BaseException:
            if cache is not self._cache:
                self._store.end(cache)
            raise
        self._replace(cache)
        self._live += new
        self._token = torch.cat([self._token, token])
        self._work = None
        self._send(token, new)
        return new

    def step(self) -> list[tuple[Answer, int]]:
        """Compute a token of every answer, unless first tokens wait to be told; tokens that the host has now, as they come."""
        self.check()
        told = self._read()
        if not told and self._live:
            self._compute()
            told = self._read()
        return told

    def cancel(self, answer: Answer) -> None:
        """End an answer; the tokens that it has stay."""
        answer.done = True
        self._leave()

    def close(self) -> None:
        """End all answers. Their prompts are kept for the next question."""
        for answer in self._live:
            answer.done = True
        self._live.clear()
        self._sent.clear()
        if self._cache is not None:
            self._store.end(self._cache)
            self._cache = None

    # ---- memory

    def _with_room(self, requests: Sequence[AnswerRequest]) -> PromptCache:
        """The cache, or one in larger memory with the answers under way, for these requests too."""
        everyone = [answer.request for answer in self._live] + list(requests)
        fixed = self._store.pool.fixed and all(each.max_new_tokens - 1 <= FIXED_TOKENS for each in everyone)
        most = FIXED_TOKENS if fixed else ANSWER_STEP
        ends = [_end(each.prompt, min(each.max_new_tokens - 1, most)) for each in everyone]
        if self._cache is not None:
            ends += [self._cache.used(row) for row in range(len(self._live))]
        shape = self._shape(ends, everyone[0].prompt.embeds.dtype)
        cache = self._cache
        if cache is not None and cache.memory.fixed == fixed and cache.memory.shape.holds(shape):
            return cache
        return self._moved(shape.rounded() if self._live else shape, fixed)

    def _shape(self, ends: Sequence[tuple[int, int]], dtype: torch.dtype) -> AnswerShape:
        """Memory for rows of which one each ends there."""
        first, second = (max(each) for each in zip(*ends, strict=True))
        return AnswerShape(self.rows, (first, second), self._store.split, dtype)

    def _moved(self, shape: AnswerShape, fixed: bool) -> PromptCache:
        """A cache in other memory with the live rows, and with the others for which there is room."""
        cache = PromptCache(self.rows, self._store.acquire(shape, fixed))
        old = self._cache
        for row in old.filled() if old is not None and self._live else ():
            assert old is not None
            if row < len(self._live) or all(
                a <= b for a, b in zip(old.used(row), cache.memory.shape.capacities, strict=True)
            ):
                cache.take(row, old, row)
        return cache

    def _replace(self, cache: PromptCache) -> None:
        """Go on with a cache. The old one's memory is released."""
        old, self._cache = self._cache, cache
        if old is not None and old is not cache:
            self._work = None
            self._store.end(old)

    def _reserve(self) -> None:
        """Make room for the next token of every row."""
        assert self._cache is not None
        memory, live = self._cache.memory, range(len(self._live))
        ends = [self._cache.used(row) for row in live]
        capacities = memory.shape.capacities
        if all(max(each) < capacity for each, capacity in zip(zip(*ends, strict=True), capacities, strict=True)):
            return
        more = max(ANSWER_STEP, *(self._cache.written[row] for row in live))
        shape = self._shape([(first + more, second + more) for first, second in ends], memory.shape.dtype)
        larger = self._shape([shape.capacities, capacities], shape.dtype)
        cache = self._moved(larger, fixed=False)
        if self._store.last is self._cache:
            self._store.keep(cache)
        self._replace(cache)

    # ---- tokens

    def _compute(self) -> None:
        assert self._cache is not None
        self._reserve()
        cache, live = self._cache, len(self._live)
        if self._work is None:
            self._work = self._decoder.load(cache, [answer.skipped for answer in self._live])
        cache.memory.token[:live].copy_(self._token)
        self._decoder.run(cache.lease.graphs, self._work)
        for row in range(live):
            cache.written[row] += 1
        self._token = self._pick(cache.memory.logits[:live], self._live)
        self._send(self._token, self._live)

    def _pick(self, logits: Tensor, answers: Sequence[Answer]) -> Tensor:
        """Tokens int64 [rows, 1]; neighbours of the same `pick` are one call."""
        tokens, at = [], 0
        for pick, group in itertools.groupby(answers, key=lambda answer: answer.request.pick):
            numbers = [answer.request.number for answer in group]
            tokens.append(pick(logits[at : at + len(numbers)], numbers))
            at += len(numbers)
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens)

    def _send(self, token: Tensor, answers: Sequence[Answer]) -> None:
        """Start the way of tokens [rows, 1] to the host; those that it does not read are their answers' at once."""
        for answer, one in zip(answers, token[:, 0].unbind(), strict=True):
            answer.computed += 1
            if not answer.request.read:
                answer.append(one, None)
        if any(answer.request.read for answer in answers):
            readback = Readback()
            readback.post(token)
            self._sent.append((token, list(answers), readback))

    def _read(self) -> list[tuple[Answer, int]]:
        """Tokens that have come, and whose; answers that end leave."""
        told = []
        self._leave()
        while len(self._sent) > self._behind():
            token, answers, readback = self._sent.popleft()
            values = readback.wait()
            self.waits += 1
            for answer, one, value in zip(answers, token[:, 0].unbind(), values, strict=True):
                if answer.request.read and not answer.done:
                    answer.append(one, int(value))
                    told.append((answer, int(value)))
            self._leave()
        return told

    def _behind(self) -> int:
        """Of how many steps the tokens are left on their way: on fixed memory a token is read while the next one is computed.
        Sampling must not run ahead: a draw past the end of an answer would advance the generator."""
        assert self._cache is not None
        ahead = self._live and self._cache.memory.fixed and not any(each.request.draws for each in self._live)
        return 1 if ahead else 0

    def _leave(self) -> None:
        """Take the rows of answers whose last token is computed out of the steps: they change places with the last ones."""
        order = list(range(len(self._live)))
        for row in reversed(range(len(self._live))):
            if not self._live[row].leaves:
                continue
            assert self._cache is not None
            last = len(self._live) - 1
            self._cache.swap(row, last)
            self._cache.end(last)
            self._live[row], order[row] = self._live[last], order[last]
            self._live.pop()
            order.pop()
        if len(order) < self._token.shape[0]:
            self._token = self._token[torch.tensor(order, dtype=torch.int64, device=self._token.device)]
            self._work = None


def _end(prompt: Prompt, new_tokens: int) -> tuple[int, int]:
    """Where a prompt and new tokens end in each of the two buffers."""
    return prompt.length + new_tokens, prompt.slots(prompt.length) + new_tokens
