"""Images that are drawn, and questions that are answered, together with others that began at other times: one evaluation
serves all images that need the same work, one step computes a token of every answer."""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from ..planning.config import FlashUConfig
from .accelerated import handle_of
from .checks import check_callback, check_count, guidance_scale_of
from .decoding import TokenSampler
from .prompts import check_text
from .sampling import Callback, ImageBatch, Stepper

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Answers", "Drawings", "ImageRequest", "ImageResult", "Many", "QuestionRequest", "QuestionResult"]

AT_ONCE = 8
"""Requests under way at once, where the caller does not say."""


@dataclass(frozen=True)
class ImageRequest:
    """An image to draw; see `Pipeline.generate`.

    Attributes:
        prompt: what to draw.
        seed: of the noise.
        steps, guidance_scale, size: as in `generate`; None: the pipeline's own.
        preset: a preset's name or a config for this image; None: what the model is accelerated with. It may not prune
            other neurons than that, and has the same kernels.
        adapter: of the LoRA adapters of peft in an accelerated model the one that draws, '__base__' for none; None: what is
            active.
        on_step: called after each step with its number, from 1, and the latents, which must not be modified. What it raises
            ends this image and no other.
    """

    prompt: str
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    size: Any = None
    preset: str | FlashUConfig | None = None
    adapter: str | None = None
    on_step: Callback | None = None


@dataclass(frozen=True)
class ImageResult:
    """An image that has ended.

    Attributes:
        index: of the request, from 0 in the order of adding.
        request: as it was given.
        error: why there is no image, or None.
        image: PIL image; None where there was an error.
        latents: fp32 [channels, H, W]; None where there was an error.
    """

    index: int
    request: Any
    error: Exception | None = None
    image: Image | None = None
    latents: Tensor | None = None


@dataclass(frozen=True)
class QuestionRequest:
    """A question to answer; see `Pipeline.answer`.

    Attributes:
        images: PIL image, or a list of them.
        question: about them.
        max_new_tokens: of the answer.
        temperature, top_k, top_p: as in `answer_tokens`.
        seed: of the draws; None: torch's own generator.
        adapter: as of an image.
        on_token: called with each token id as it comes. What it raises ends this answer and no other.
    """

    images: Image | Sequence[Image]
    question: str
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    adapter: str | None = None
    on_token: Callable[[int], None] | None = None


@dataclass(frozen=True)
class QuestionResult:
    """A question that has ended.

    Attributes:
        index: of the request, from 0 in the order of adding.
        request: as it was given.
        error: why there is no answer, or None.
        answer: the text; None where there was an error.
    """

    index: int
    request: Any
    error: Exception | None = None
    answer: str | None = None


R = TypeVar("R", bound=ImageResult | QuestionResult)


@dataclass(eq=False)
class _UnderWay:
    """A request that has begun."""

    index: int
    request: Any
    work: Any
    """The image's stepper, or the answer."""
    done: int = 0
    """Steps of an image."""


class Many(Iterator[R], Generic[R]):
    """Requests under way, and those that wait for their turn. Iterating serves them, and yields results as they end.

    Every result is bit for bit what it is alone where the config is `batch_invariant`, as on the CPU. What is wrong with a
    request, or goes wrong with it, is its own result. `add` and `cancel` may be called from other threads; `step` and iteration
    belong to one.
    """

    kind: type[Any]
    """Of requests."""
    ended: type[R]
    """Of results."""

    def __init__(self, pipe: Any, requests: Iterable[Any] = (), at_once: int = AT_ONCE):
        """Args:
        pipe: the pipeline.
        requests: a list is numbered now; of another iterable one is read, and numbered, whenever there is room.
        at_once: requests under way at once.
        """
        if not isinstance(at_once, int) or isinstance(at_once, bool) or at_once < 1:
            raise ValueError(f"at_once: expected an integer >= 1, got {at_once!r}")
        if isinstance(requests, (str, Mapping)) or not isinstance(requests, Iterable):
            raise TypeError(f"requests: expected an iterable of requests, got {type(requests).__name__}")
        self.pipe = pipe
        self.at_once = at_once
        self._requests = iter(() if isinstance(requests, Sequence) else requests)
        self._added: deque[tuple[int, Any]] = deque()
        self._cancelled: set[int] = set()
        self._live: list[_UnderWay] = []
        self._results: deque[R] = deque()
        self._count = 0
        self._lock, self._stepping = threading.Lock(), threading.Lock()
        for request in requests if isinstance(requests, Sequence) else ():
            self.add(request)

    def add(self, request: Any) -> int:
        """Ask for one more; returns its index. What is wrong with it comes as its result."""
        with self._lock:
            index, self._count = self._count, self._count + 1
            self._added.append((index, request))
        return index

    def cancel(self, index: int) -> None:
        """Give up a request, begun or not, before the next step: it has no result. One that has ended stays.

        Raises:
            IndexError: no request has this index.
        """
        with self._lock:
            if not 0 <= index < self._count:
                raise IndexError(f"index: expected one of the {self._count} requests so far, got {index}")
            self._cancelled.add(index)

    @property
    def in_progress(self) -> tuple[int, ...]:
        """Indices of the requests that have begun and not ended."""
        return tuple(each.index for each in self._live)

    def __iter__(self) -> Many[R]:
        return self

    def __next__(self) -> R:
        while not self._results:
            self._results.extend(self.step())
            if not self._results and not self._live:
                raise StopIteration
        return self._results.popleft()

    @torch.no_grad()
    def step(self) -> list[R]:
        """Begin requests while there is room, and advance each that is under way; returns those that ended.

        Raises:
            RuntimeError: another step is under way: this is a callback of it, or another thread.
        """
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError("step: another step is under way; call it outside callbacks, and from one thread")
        try:
            results = [*self._admit(), *self._advance()]
        except BaseException:
            self.close()
            raise
        finally:
            self._stepping.release()
        over = {result.index for result in results}
        self._live = [each for each in self._live if each.index not in over]
        if not self._live:
            self._rest()
        return results

    def _rest(self) -> None:
        """Nothing is under way: give back what only work under way needs."""

    def close(self) -> None:
        """Give up all requests."""
        for each in self._live:
            self._abandon(each)
        self._live = []
        self._results.clear()
        with self._lock:
            self._added.clear()
        self._requests = iter(())

    def __enter__(self) -> Many[R]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _admit(self) -> list[R]:
        """Drop what was cancelled and begin what there is room for; returns the requests that cannot be met."""
        with self._lock:  # what has begun or ended need not be remembered as cancelled
            cancelled, self._cancelled = self._cancelled, self._cancelled & {index for index, _ in self._added}
        for each in self._live:
            if each.index in cancelled:
                self._abandon(each)
        self._live = [each for each in self._live if each.index not in cancelled]
        refused = []
        while len(self._live) < self.at_once and (waiting := self._waiting()) is not None:
            index, request = waiting
            try:
                known = self._known(request)
                self._live.append(_UnderWay(index, known, self._begun(known)))
            except Exception as error:
                refused.append(self.ended(index, request, error))
        return refused

    def _waiting(self) -> tuple[int, Any] | None:
        """The next request, added or of the iterable; None where there is none now."""
        while True:
            with self._lock:
                while self._added:
                    index, request = self._added.popleft()
                    if index not in self._cancelled:
                        return index, request
            try:
                request = next(self._requests)
            except StopIteration:
                return None
            self.add(request)

    def _known(self, request: Any) -> Any:
        """A request, from one or from a mapping of its fields."""
        if isinstance(request, self.kind):
            return request
        known = [field.name for field in fields(self.kind)]
        if not isinstance(request, Mapping) or not set(request) <= set(known):
            name = self.kind.__name__
            raise TypeError(f"request: expected a {name} or its fields ({', '.join(known)}), got {request!r:.200}")
        return self.kind(**request)

    def _begun(self, request: Any) -> Any:
        """Check a request and begin its work."""
        raise NotImplementedError

    def _advance(self) -> list[R]:
        """Advance everything that is under way by a step; results of what ended."""
        raise NotImplementedError

    def _abandon(self, each: _UnderWay) -> None:
        """End work whose result nobody wants."""
        raise NotImplementedError


class Drawings(Many[ImageResult]):
    """Images that are drawn together; see `Many`. A request may also be a prompt alone."""

    kind, ended = ImageRequest, ImageResult

    def _known(self, request: Any) -> Any:
        return super()._known({"prompt": request} if isinstance(request, str) else request)

    def _begun(self, request: Any) -> Stepper:
        pipe = self.pipe
        check_text("prompt", request.prompt)
        check_callback("on_step", request.on_step)
        asked = request.guidance_scale
        scale = guidance_scale_of(pipe.guidance_scale if asked is None else asked, 1)
        config, handle = None, handle_of(pipe.model)
        if handle is not None:
            config = self._config(request.preset)
        elif request.preset not in (None, "dense"):
            raise ValueError(f"preset: expected None for a dense model, got {request.preset!r:.80}")
        _check_adapter(handle, request.adapter)
        noise = pipe.noise([request.seed], 1, request.size)
        batch = ImageBatch([request.prompt], noise, request.steps, scale, request.size, config, request.adapter)
        stepper: Stepper = pipe.stepper(batch)
        return stepper

    def _config(self, preset: Any) -> FlashUConfig | None:
        if preset is None or isinstance(preset, FlashUConfig):
            return preset
        if not isinstance(preset, str):
            raise TypeError(f"preset: expected a name or a FlashUConfig, got {type(preset).__name__}")
        config: FlashUConfig | None = self.pipe.preset(preset)[0]
        if config is None:
            raise ValueError(f"preset: expected one for an accelerated model, got {preset!r}")
        return config

    def _advance(self) -> list[ImageResult]:
        errors = self._evaluate()
        results = (self._result(each, errors[each]) for each in self._live)
        return [result for result in results if result is not None]

    def _evaluate(self) -> dict[_UnderWay, Exception | None]:
        """One evaluation of every image: together where the accelerated model can. Returns what went wrong."""
        handle = handle_of(self.pipe.model)
        together = [each for each in self._live if hasattr(each.work, "states")]
        if handle is None:
            errors: dict[_UnderWay, Exception | None] = dict.fromkeys(
                together, RuntimeError("model: its handle was removed while this image was being generated")
            )
        else:
            errors = dict(zip(together, handle.step_together([each.work for each in together]), strict=True))
        for each in self._live:
            if each not in errors:
                errors[each] = None
                try:
                    if handle is not None:
                        raise RuntimeError("model: it was accelerated while this image was being generated")
                    each.work.step(each.done)
                except Exception as error:
                    errors[each] = error
        return errors

    def _result(self, each: _UnderWay, error: Exception | None) -> ImageResult | None:
        """The result of an image after an evaluation, or None where it goes on."""
        try:
            if error is not None:
                raise error
            each.done += 1
            if each.request.on_step is not None:
                each.request.on_step(each.done, self.pipe.unpacked(each.work.latents()))
            if each.done < each.work.evaluations:
                return None
            latents = self.pipe.unpacked(each.work.latents())
            result = ImageResult(each.index, each.request, None, self.pipe.pictures(latents)[0], latents[0])
        except Exception as error:
            result = ImageResult(each.index, each.request, _freed(error))
        each.work.close()
        return result

    def _abandon(self, each: _UnderWay) -> None:
        each.work.close()


class Answers(Many[QuestionResult]):
    """Questions that are answered together; see `Many`. A dense model answers one after the other."""

    kind, ended = QuestionRequest, QuestionResult

    def __init__(self, pipe: Any, requests: Iterable[Any] = (), at_once: int = AT_ONCE):
        super().__init__(pipe, requests, at_once)
        self._runner: Any = None
        self._scheduler: Any = None

    def _begun(self, request: Any) -> Any:
        pipe = self.pipe
        check_callback("on_token", request.on_token)
        generators = None if request.seed is None else pipe.generators([request.seed], 1, "questions")
        check_count("max_new_tokens", request.max_new_tokens)
        _check_adapter(handle_of(pipe.model), request.adapter)
        images, before, after = pipe.question_inputs(request.images, request.question)
        sampler = TokenSampler(request.temperature, request.top_k, request.top_p, generators)
        return images, before, after, request.max_new_tokens, sampler, pipe.layout.eos, request.on_token

    def _advance(self) -> list[QuestionResult]:
        lost = self._follow()
        new = [each for each in self._live if isinstance(each.work, tuple)]
        if self._runner is None:
            return lost + [self._alone(each) for each in new[:1]]
        refused: list[QuestionResult] = []
        with self._runner.working():
            for adapter in dict.fromkeys(each.request.adapter for each in new):
                refused += self._admit_all([each for each in new if each.request.adapter == adapter], adapter)
            ended = self._scheduler.step()
        return lost + refused + [self._result(each) for each in self._live if each.work in ended]

    def _follow(self) -> list[QuestionResult]:
        """Go on with the handle that the model has now, or without; results of answers that another one had begun."""
        handle = handle_of(self.pipe.model)
        runner = None if handle is None else handle.runner
        if runner is self._runner:
            return []
        self._runner = runner
        self._scheduler = None if runner is None else runner.answering(self.at_once)
        why = RuntimeError("model: its handle was removed while this question was being answered")
        return [self.ended(each.index, each.request, why) for each in self._live if not isinstance(each.work, tuple)]

    def _admit_all(self, new: Sequence[_UnderWay], adapter: str | None) -> list[QuestionResult]:
        """Begin the answers of questions of one adapter that have been checked; results where the model cannot answer now."""
        try:
            answers = self._scheduler.admit_all([each.work for each in new], adapter)
        except Exception as error:
            return [QuestionResult(each.index, each.request, error) for each in new]
        for each, answer in zip(new, answers, strict=True):
            each.work = answer
        return []

    def _result(self, each: _UnderWay) -> QuestionResult:
        answer = each.work
        try:
            if answer.error is not None:
                raise answer.error
            text = self.pipe.layout.answer(answer.tokens)
        except Exception as error:
            return QuestionResult(each.index, each.request, error)
        return QuestionResult(each.index, each.request, None, text)

    def _alone(self, each: _UnderWay) -> QuestionResult:
        """The answer of a dense model."""
        asked = dict(vars(each.request))
        del asked["adapter"]  # None, as was checked
        images, question, told = (asked.pop(name) for name in ("images", "question", "on_token"))
        try:
            seeds = None if (seed := asked.pop("seed")) is None else [seed]
            on_token = None if told is None else lambda _, token: told(token)
            (answer,) = self.pipe.answer_batch([images], [question], seeds=seeds, on_token=on_token, **asked)
        except Exception as error:
            return QuestionResult(each.index, each.request, error)
        return QuestionResult(each.index, each.request, None, answer)

    def _rest(self) -> None:
        if self._runner is not None:
            with self._runner.working():
                self._scheduler.close()

    def _abandon(self, each: _UnderWay) -> None:
        if self._runner is not None and not isinstance(each.work, tuple):
            with self._runner.working():
                self._scheduler.cancel(each.work)

    def close(self) -> None:
        super().close()
        self._rest()


def _check_adapter(handle: Any, adapter: Any) -> None:
    """Raise TypeError or ValueError where the model has no such adapter that a request can name."""
    if adapter is not None and handle is None:
        raise ValueError(
            f"adapter: expected None for a dense model, which computes what is active, got {adapter!r:.80}"
        )
    if handle is not None:
        handle.runner.check_adapter(adapter)


def _freed(error: Exception) -> Exception:
    """An error whose traceback holds no variables: among them is the memory of what failed."""
    trace = error.__traceback__
    if trace is not None:
        error = error.with_traceback(trace.tb_next)  # without the frame that is still running
        traceback.clear_frames(trace.tb_next)
    return error
