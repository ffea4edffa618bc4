"""Images that are drawn together, whenever they were asked for: one evaluation serves all that need the same work."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...planning.config import FlashUConfig
from ..accelerated import handle_of
from . import validate
from .sampling import DEFAULT_STEPS, Callback, DenseStepper, SampleInputs, Stepper

if TYPE_CHECKING:
    from PIL.Image import Image

    from .pipeline import Pipeline

__all__ = ["Drawings", "ImageRequest", "ImageResult"]

AT_MOST = 8
"""Images in progress at once, where the caller does not say."""


@dataclass(frozen=True)
class ImageRequest:
    """An image to draw; see `Pipeline.generate`.

    Attributes:
        prompt: what to draw.
        seed: of the noise.
        steps: grid points; None: the config's, or 50.
        guidance_scale: None: the pipeline's own; 0: no guidance.
        size: pixels, one number or (height, width); None: the model's own.
        preset: a preset's name or a config for this image; None: what the model is accelerated with. It may not prune
            other neurons than that, and has the same kernels.
        on_step: called after each step with its number, from 1, and the latents, which must not be modified. What it raises
            ends this image and no other.
    """

    prompt: str
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    size: Any = None
    preset: str | FlashUConfig | None = None
    on_step: Callback | None = None

    @classmethod
    def of(cls, request: Any) -> ImageRequest:
        """A request from a prompt, a mapping of fields, or a request. Raises TypeError."""
        if isinstance(request, cls):
            return request
        if isinstance(request, str):
            return cls(request)
        known = [field.name for field in fields(cls)]
        if not isinstance(request, Mapping) or "prompt" not in request or not set(request) <= set(known):
            raise TypeError(
                f"request: expected a prompt, an ImageRequest or its fields ({', '.join(known)}), got {request!r:.200}"
            )
        return cls(**request)


@dataclass(frozen=True)
class ImageResult:
    """An image that has ended.

    Attributes:
        index: of the request, from 0 in the order of adding.
        request: as it was given.
        image: PIL image; None where there was an error.
        latents: fp32 [channels, H, W]; None where there was an error.
        error: why there is no image, or None.
    """

    index: int
    request: Any
    image: Image | None = None
    latents: Tensor | None = None
    error: Exception | None = None


@dataclass(eq=False)
class _Drawing:
    """An image in progress."""

    index: int
    request: ImageRequest
    stepper: Stepper
    done: int = 0


class Drawings(Iterator[ImageResult]):
    """Images in progress, and those that wait for their turn. Iterating draws, and yields results as images finish.

    Every image is bit for bit what it is alone where the config is `batch_invariant`, as on the CPU. `add` and `cancel` may be
    called from other threads; `step` and iteration belong to one.
    """

    def __init__(self, pipe: Pipeline, requests: Iterable[Any] = (), at_most: int = AT_MOST):
        """Args:
        requests: read one by one, whenever there is room.
        at_most: images in progress at once.
        """
        if not isinstance(at_most, int) or isinstance(at_most, bool) or at_most < 1:
            raise ValueError(f"at_most: expected an integer >= 1, got {at_most!r}")
        if isinstance(requests, (str, Mapping)) or not isinstance(requests, Iterable):
            raise TypeError(f"requests: expected an iterable of requests, got {type(requests).__name__}")
        self.pipe = pipe
        self.at_most = at_most
        self._requests = iter(requests)
        self._added: deque[tuple[int, Any]] = deque()
        self._cancelled: set[int] = set()
        self._live: list[_Drawing] = []
        self._ended: deque[ImageResult] = deque()
        self._next = 0
        self._lock = threading.Lock()

    def add(self, request: Any) -> int:
        """Ask for one more image; returns its index. What is wrong with it comes as its result."""
        with self._lock:
            index, self._next = self._next, self._next + 1
            self._added.append((index, request))
        return index

    def cancel(self, index: int) -> None:
        """Give up an image, begun or not: it has no result. One that has ended stays."""
        with self._lock:
            self._cancelled.add(index)

    @property
    def in_progress(self) -> tuple[int, ...]:
        """Indices of the images that have begun."""
        return tuple(drawing.index for drawing in self._live)

    def __iter__(self) -> Drawings:
        return self

    def __next__(self) -> ImageResult:
        while not self._ended:
            self._ended.extend(self.step())
            if not self._ended and not self._live:
                raise StopIteration
        return self._ended.popleft()

    @torch.no_grad()
    def step(self) -> list[ImageResult]:
        """Begin images while there is room, and run one evaluation of each in progress; returns those that ended."""
        try:
            ended = self._admit()
            for drawing, error in zip(self._live, self._evaluate(), strict=True):
                result = self._result(drawing, error)
                if result is not None:
                    ended.append(result)
        except BaseException:
            self.close()
            raise
        over = {result.index for result in ended}
        self._live = [drawing for drawing in self._live if drawing.index not in over]
        return ended

    def close(self) -> None:
        """Give up all images."""
        for drawing in self._live:
            drawing.stepper.close()
        self._live = []
        with self._lock:
            self._added.clear()
        self._requests = iter(())

    def __enter__(self) -> Drawings:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _admit(self) -> list[ImageResult]:
        """Drop what was cancelled and begin what there is room for; returns the requests that cannot be met."""
        refused = []
        for drawing in self._live:
            if drawing.index in self._cancelled:
                drawing.stepper.close()
        self._live = [drawing for drawing in self._live if drawing.index not in self._cancelled]
        while len(self._live) < self.at_most and (waiting := self._waiting()) is not None:
            index, request = waiting
            try:
                self._live.append(self._begun(index, ImageRequest.of(request)))
            except Exception as error:
                refused.append(ImageResult(index, request, error=error))
        return refused

    def _waiting(self) -> tuple[int, Any] | None:
        """The next request, added or of the iterable; None where there is none now."""
        while True:
            with self._lock:
                if self._added:
                    index, request = self._added.popleft()
                    if index in self._cancelled:
                        continue
                    return index, request
            try:
                request = next(self._requests)
            except StopIteration:
                return None
            self.add(request)

    def _begun(self, index: int, request: ImageRequest) -> _Drawing:
        pipe, model = self.pipe, self.pipe.model
        if not isinstance(request.prompt, str):
            raise TypeError(f"prompt: expected a string, got {type(request.prompt).__name__}")
        validate.check_callback("on_step", request.on_step)
        inputs = SampleInputs.build(
            model,
            pipe.noise([request.seed], 1, request.size),
            **pipe.prompt_tokens([request.prompt], request.size),
            steps=request.steps,
            guidance_scale=pipe.guidance_scale if request.guidance_scale is None else request.guidance_scale,
            time_shifting_factor=pipe.time_shifting_factor,
        )
        handle = handle_of(model)
        if handle is not None:
            return _Drawing(index, request, handle.stepper(inputs, self._config(request.preset)))
        if request.preset not in (None, "dense"):
            raise ValueError(f"preset: expected None for a dense model, got {request.preset!r:.80}")
        return _Drawing(index, request, DenseStepper(model, replace(inputs, steps=inputs.steps or DEFAULT_STEPS)))

    def _config(self, preset: str | FlashUConfig | None) -> FlashUConfig | None:
        if preset is None or isinstance(preset, FlashUConfig):
            return preset
        if not isinstance(preset, str):
            raise TypeError(f"preset: expected a name or a FlashUConfig, got {type(preset).__name__}")
        config, _ = self.pipe.preset(preset)
        if config is None:
            raise ValueError(f"preset: expected one for an accelerated model, got {preset!r}")
        return config

    def _evaluate(self) -> list[Exception | None]:
        """One evaluation of every image in progress: together where the accelerated model can. Returns what went wrong."""
        handle = handle_of(self.pipe.model)
        together = [each.stepper for each in self._live if hasattr(each.stepper, "states")]
        if handle is None:
            errors: dict[Any, Exception | None] = dict.fromkeys(together, RuntimeError("model: its handle was removed"))
        else:
            errors = dict(zip(together, handle.step_together(together), strict=True))
        for drawing in self._live:
            if drawing.stepper not in errors:
                try:
                    drawing.stepper.step(drawing.done)
                    errors[drawing.stepper] = None
                except Exception as error:
                    errors[drawing.stepper] = error
        return [errors[drawing.stepper] for drawing in self._live]

    def _result(self, drawing: _Drawing, error: Exception | None) -> ImageResult | None:
        """The result of an image after an evaluation, or None where it goes on."""
        index, request, stepper = drawing.index, drawing.request, drawing.stepper
        try:
            if error is not None:
                raise error
            drawing.done += 1
            if request.on_step is not None:
                request.on_step(drawing.done, stepper.latents())
            if drawing.done < stepper.evaluations:
                return None
            latents = stepper.latents()
            result = ImageResult(index, request, self.pipe.pictures(latents)[0], latents[0])
        except Exception as error:
            result = ImageResult(index, request, error=error)
        stepper.close()
        return result
