"""Questions that come at any time, and whose answers share the steps of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .answering import Answer, Answering, AnswerRequest
from .decoding import Pick
from .understanding import UnderstandingEngine

__all__ = ["AnswerScheduler", "Question"]


@dataclass(frozen=True, eq=False)
class Question:
    """A question and how to answer it: arguments of `showo2.answer_tokens`, checked by the caller."""

    images: Sequence[Tensor]
    before: Tensor
    after: Tensor
    max_new_tokens: int
    pick: Pick
    """Chooses tokens, such as a `TokenSampler` of at most one generator."""
    eos_token: int | None = None
    on_token: Callable[[int], None] | None = None
    """Called with each token of the answer as it comes, in `step`."""


class AnswerScheduler:
    """Answers of one accelerated model. Every method is called inside `Runner.working()`, so others, and images, may run
    between two steps. An answer gets the tokens that it gets alone, and an error ends no other one.

    Attributes:
        most: answers that can be under way at once.
        under_way: answers that have begun and not ended.
    """

    def __init__(
        self, ready: Callable[[str | None], UnderstandingEngine], check_unchanged: Callable[[str], None], most: int
    ):
        """Args:
        ready: notices what has changed in the model, and checks an adapter; the engine that answers now.
        check_unchanged: raises RuntimeError where the model has changed since; the argument says what was being done.
        """
        self.most = most
        self.under_way: list[Answer] = []
        self._ready = ready
        self._check_unchanged = check_unchanged
        self._engine: UnderstandingEngine | None = None
        self._answering: Answering | None = None
        self._on_token: dict[Answer, Callable[[int], None]] = {}

    @property
    def room(self) -> int:
        """How many more answers can begin."""
        return self.most - len(self.under_way)

    def admit(
        self,
        images: Sequence[Tensor],
        before: Tensor,
        after: Tensor,
        max_new_tokens: int,
        pick: Pick,
        eos_token: int | None = None,
        on_token: Callable[[int], None] | None = None,
        adapter: str | None = None,
    ) -> Answer:
        """Begin one answer; the arguments are those of a `Question`, and as of `admit_all`."""
        (answer,) = self.admit_all([(images, before, after, max_new_tokens, pick, eos_token, on_token)], adapter)
        return answer

    @torch.no_grad()
    def admit_all(self, asked: Sequence[tuple[Any, ...]], adapter: str | None = None) -> list[Answer]:
        """Begin answers of an adapter; their prompts are computed together. Their tokens are, with those of other adapters.

        Args:
            asked: for each the arguments of a `Question`.
            adapter: of peft; None: what is active.

        Raises:
            RuntimeError: the model cannot answer now, or there is no room.
            TypeError, ValueError: the model has no such adapter, or the kernels do not compute all of it.
            None of them has begun then.
        """
        questions = [Question(*each) for each in asked]
        if len(questions) > self.room:
            raise RuntimeError(f"answers: expected at most {self.most} at once")
        engine = self._ready(adapter)
        answering = self._current(engine)
        embeds = iter(engine.image_embeds([latents for question in questions for latents in question.images], adapter))
        requests = [
            AnswerRequest(
                engine.question([next(embeds) for _ in each.images], each.before, each.after, adapter),
                each.max_new_tokens,
                each.pick,
                each.eos_token,
                told=True,
            )
            for each in questions
        ]
        begun = [request for request in requests if request.max_new_tokens > 0]
        by_request = {id(answer.request): answer for answer in (answering.admit(begun) if begun else ())}
        answers = [by_request.get(id(request)) or Answer(request, (), done=True) for request in requests]
        self.under_way += answers
        self._on_token.update(
            {
                answer: each.on_token
                for answer, each in zip(answers, questions, strict=True)
                if each.on_token is not None
            }
        )
        return answers

    @torch.no_grad()
    def step(self) -> list[Answer]:
        """Compute a token of every answer, and tell of those that have come. Answers that ended, with their errors if any."""
        if self._answering is not None and self._answering.under_way:
            try:
                self._check_unchanged("question was being answered")
                told = self._answering.step()
            except Exception as error:
                self._fail(error)
                told = []
            for answer, token in told:
                self._tell(answer, token)
        ended = [answer for answer in self.under_way if answer.done]
        self.under_way = [answer for answer in self.under_way if not answer.done]
        for answer in ended:
            self._on_token.pop(answer, None)
        return ended

    def cancel(self, answer: Answer) -> None:
        """End an answer; `step` does not return it. One that has ended is left as it is."""
        if answer in self.under_way:
            self.under_way.remove(answer)
            self._on_token.pop(answer, None)
            if self._answering is not None:
                self._answering.cancel(answer)

    def close(self) -> None:
        """Cancel all answers, and give their memory back."""
        self.under_way.clear()
        self._on_token.clear()
        self._end()

    def _tell(self, answer: Answer, token: int) -> None:
        on_token = self._on_token.get(answer)
        if on_token is None:
            return
        try:
            on_token(token)
        except Exception as error:
            answer.error = error
            self._on_token.pop(answer, None)
            if self._answering is not None:
                self._answering.cancel(answer)

    def _current(self, engine: UnderstandingEngine) -> Answering:
        """The answers of an engine. Those of an earlier one, or whose memory was taken away, have failed."""
        if self._answering is not None:
            try:
                self._answering.check()
                if engine is not self._engine:
                    raise RuntimeError("model: it was changed while this question was being answered")
            except RuntimeError as error:
                self._fail(error)
        if self._answering is None:
            self._engine, self._answering = engine, engine.answering(self.most)
        return self._answering

    def _fail(self, error: Exception) -> None:
        """End all answers by an error; `step` returns them."""
        for answer in self.under_way:
            if not answer.done:
                answer.error, answer.done = error, True
        self._end()

    def _end(self) -> None:
        if self._answering is not None:
            self._answering.close()
            self._answering = None
