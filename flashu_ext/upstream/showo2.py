"""Upstream's two methods on an accelerated model. Upstream's sampler calls `t2i_generate` once per evaluation, so this module
finds the image that a call belongs to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.adapter import Question
from ..models.checks import guidance_scale_of
from ..models.decoding import TokenSampler
from ..models.masks import omni_allowed
from ..models.showo2 import validate
from ..models.velocity import Scale, guided
from ..runtime.generation import guided_velocity
from ..runtime.image_memory import joined
from ..runtime.prompt_cache import Span, reach
from ..runtime.readback import Readback
from ..runtime.runner import Runner
from ..runtime.state import ImageState

__all__ = ["UpstreamMethods", "visual_spans"]

MIN_IN_PROGRESS, MAX_IN_PROGRESS = 2, 64
"""Images in progress, as many as there is room for; the oldest is evicted to begin another."""

HIDDEN = -1e4
"""Added to a score, this leaves nothing of its weight in any dtype."""

MAX_ENDED = 1024
"""Images that have ended and are remembered, to tell a call that would continue one from a new image's first."""

Original = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The arguments of a call that do not change within an image, compared by tensor identity and version: equality is known
    without reading any tensor."""

    tensors: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    numbers: tuple[Any, ...]

    @classmethod
    def from_call(
        cls, latents: Any, t: Any, text_tokens: Any, modality_positions: Any, attention_mask: Any, guidance_scale: Any
    ) -> Conditioning | None:
        """None where a tensor is missing, or has no version (inference tensors)."""
        mask = attention_mask if isinstance(attention_mask, Tensor) else None
        tensors = (text_tokens, modality_positions, mask)
        given = [tensor for tensor in tensors if tensor is not None]
        needed = (latents, t, text_tokens, modality_positions)
        if not all(isinstance(tensor, Tensor) for tensor in needed) or any(tensor.is_inference() for tensor in given):
            return None
        shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in (latents, t)]
        return cls(tensors, tuple(tensor._version for tensor in given), (*shapes, _plain(guidance_scale), mask is None))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Conditioning)
            and all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))
            and self.versions == other.versions
            and self.numbers == other.numbers
        )


Rows = tuple[bytes, ...]
"""For each row its prompt and image span, as bytes: compared on the host, for any number of images."""


def _rows(tokens: Tensor, positions: Tensor) -> Rows:
    """Reads both tensors from the device once."""
    both = torch.cat([tokens.flatten(1), positions.flatten(1).to(tokens)], dim=1).cpu()
    return tuple(row.numpy().tobytes() for row in both)


@dataclass(eq=False)
class _Image:
    """An image that calls belong to, and what identifies its next call."""

    rows: Rows
    guided: bool
    latent_size: tuple[int, int]
    planned_scale: Scale | None
    """The caller's guidance scale, where the step plan depends on it."""
    steps: int
    """That are planned."""
    first: float
    """Time of its first call."""
    states: list[ImageState]
    """Of the batch's images; empty once they have ended, so that their memory is free."""
    conditioning: Conditioning | None = None
    """Of its last call."""
    thread: int = 0
    """That made its last call."""
    time: float = float("-inf")
    """Of its last call."""
    ended: str = ""
    """Why it cannot go on."""

    def shares_prompts(self, rows: Rows, size: tuple[int, int]) -> bool:
        """Whether the first rows are those of a call, which may have other guidance or fewer rows."""
        common = min(len(rows), len(self.rows))
        return self.latent_size == size and self.rows[:common] == rows[:common]


def _mine(images: Sequence[_Image]) -> Sequence[_Image]:
    """The images whose last calls came from this thread, or all where there are none: two threads that draw from the same
    tensors draw two images, but a caller may also change threads between calls."""
    return [image for image in images if image.thread == threading.get_ident()] or images


def _plain(scale: Any) -> Any:
    """A guidance scale that compares by value."""
    return tuple(scale.flatten().tolist()) if isinstance(scale, Tensor) else scale


class UpstreamMethods:
    """`t2i_generate` and `mmu_generate`, with the arguments and results of the model's own methods (`originals`).

    Attributes:
        evicted: images that were ended unfinished to make room.
    """

    def __init__(self, runner: Runner, originals: Mapping[str, Original]):
        self.runner = runner
        self.originals = originals
        self.evicted = 0
        self._images: list[_Image] = []

    # ---- generation

    @torch.no_grad()
    def t2i_generate(
        self,
        image_latents: Tensor | None = None,
        t: Tensor | None = None,
        text_tokens: Tensor | None = None,
        attention_mask: Any = None,
        modality_positions: Tensor | None = None,
        first_frame_as_cond: bool = False,
        only_denoise_last_image: bool = False,
        max_seq_len: int | None = None,
        guidance_scale: Any = 0.0,
        **kwargs: Any,
    ) -> Tensor:
        """One evaluation, called by upstream's sampler; same arguments and result as the model's own method.

        A call belongs to an image with the same conditioning and a smaller t, for t grows within an image; otherwise it starts
        a new one. Interleaved images of one prompt need conditioning tensors of their own: with the same tensors they would
        share cached state.
        """
        reason = _why_original(
            image_latents, t, text_tokens, modality_positions, first_frame_as_cond, only_denoise_last_image
        )
        arguments = {
            "image_latents": image_latents,
            "t": t,
            "text_tokens": text_tokens,
            "attention_mask": attention_mask,
            "modality_positions": modality_positions,
            "first_frame_as_cond": first_frame_as_cond,
            "only_denoise_last_image": only_denoise_last_image,
            "max_seq_len": max_seq_len,
            "guidance_scale": guidance_scale,
            **kwargs,
        }
        with self.runner.lock.held:
            if not self.runner.active:
                return self.originals["t2i_generate"](**arguments)
            self.runner.ready()
            self._drop_ended()
            call = Conditioning.from_call(
                image_latents, t, text_tokens, modality_positions, attention_mask, guidance_scale
            )
            identical = [i for i in self._images if call is not None and i.conditioning == call]
            known = next(iter(_mine(identical)), None)
            if reason is None and known is None:
                reason = _mask_problem(attention_mask, modality_positions, text_tokens)
            if reason is not None:
                return self._original("t2i_generate", reason, **arguments)
            assert image_latents is not None and t is not None
            assert text_tokens is not None and modality_positions is not None
            scale = guidance_scale_of(guidance_scale, image_latents.shape[0] // 2)
            with_guidance = guided(scale)
            if known is None:
                # Calls with the same, unmodified tensors are not checked again.
                validate.check_t2i_inputs(
                    self.runner.parts.model, image_latents, t, text_tokens, modality_positions, with_guidance
                )
            time, shared = _read_time(image_latents, t, with_guidance)
            with self.runner.working():
                image = self._image(known, text_tokens, modality_positions, scale, image_latents, time)
                velocity = self._velocity(image.states, image_latents, t, scale, shared)
                done = image.states[0].step >= image.steps
            image.time, image.conditioning, image.thread = time, call, threading.get_ident()
            if done:
                self._end(image, f"its {image.steps} planned steps are done")
            return torch.cat([velocity, velocity]) if with_guidance else velocity

    def _velocity(self, states: Sequence[ImageState], latents: Tensor, t: Tensor, asked: Scale, shared: bool) -> Tensor:
        """Guided velocity [images, channels, H, W]. shared: both guidance branches have the same latents and time."""
        engine = self.runner.generation
        index = states[0].step + 1
        images = [state.images for state in states]
        branches = 1 if shared else latents.shape[0] // sum(images)
        own, times = (
            [joined(each) for each in zip(*(branch.split(images) for branch in of_rows), strict=True)]
            for of_rows in (
                latents.chunk(2 if shared else branches)[:branches],
                t.chunk(2 if shared else branches)[:branches],
            )
        )
        velocities = engine.velocity_at(states, own, times)
        at = engine.config.guidance_at
        scales = [at(index, each) for each in asked] if isinstance(asked, tuple) else [at(index, asked)] * sum(images)
        guided_ones = []
        for state, rows in zip(states, velocities, strict=True):
            mine, scales = scales[: state.images], scales[state.images :]
            scale: Scale = tuple(mine) if isinstance(asked, tuple) else mine[0]
            guided_ones.append(guided_velocity(rows, scale, torch.Size((state.images, *latents.shape[1:]))))
        return joined(guided_ones)

    def _image(
        self,
        known: _Image | None,
        tokens: Tensor,
        positions: Tensor,
        guidance_scale: Scale,
        latents: Tensor,
        time: float,
    ) -> _Image:
        """The image that a call belongs to, or a new one. known: the image whose last call had the same tensors.

        Raises:
            RuntimeError: the call continues an image that cannot go on, or goes back in time: with a schedule of steps, another
                order of calls would run other steps than planned.
        """
        size, with_guidance = (latents.shape[2], latents.shape[3]), guided(guidance_scale)
        planned_scale = guidance_scale if self.runner.config.execution.skip_unit_guidance else None
        identity = (size, with_guidance, planned_scale)
        # Identical tensors first, then equal ones, because a caller may rebuild them for every call. Interleaved images of one
        # prompt are told apart by tensor identity, then by time.
        rows = known.rows if known is not None else _rows(tokens, positions)
        equal = [i for i in self._images if i.rows == rows and (i.latent_size, i.guided, i.planned_scale) == identity]
        same = [known] if known is not None else _mine(equal)
        earlier = [image for image in same if image.time < time and not image.ended]
        if earlier:
            # The latest time wins, then the newest image: an older one was abandoned.
            image = max(reversed(earlier), key=lambda image: image.time)
        else:
            self._check_begins(rows, size, time)
            if known is not None and not known.ended and known.thread == threading.get_ident():
                self._end(known, "another image began with its tensors")
            states = self._begin(tokens, positions, guidance_scale, size)
            image = _Image(rows, with_guidance, size, planned_scale, len(states[0].plan), time, states)
            self._images = [each for each in self._images if each not in same or not each.ended] + [image]
        self.runner.last_images = [state.record for state in image.states]
        return image

    def _check_begins(self, rows: Rows, size: tuple[int, int], time: float) -> None:
        """Raise RuntimeError where a call that no image in progress expects does not begin an image either: one with the same
        prompts, or some of them, has begun at another time."""
        if not self.runner.config.approximates:
            return  # Every step is the same: nothing can go astray.
        for image in reversed(_mine([each for each in self._images if each.shares_prompts(rows, size)])):
            back = time < image.first and not image.ended
            if time > image.first or back:
                why = image.ended or f"its last call was at t = {image.time:.6g}"
                if back:
                    self._end(image, "a later call went back in time")
                raise RuntimeError(
                    f"t: a call at {time:.6g} cannot continue its image: {why}; the config plans what each of {image.steps} "
                    "steps computes (FlashUConfig.steps), for the same rows and guidance and times that grow from call to call; "
                    "use as many steps as planned, a first-order solver, or FlashUConfig.exact()"
                )

    def _begin(
        self, tokens: Tensor, positions: Tensor, guidance_scale: Scale, size: tuple[int, int]
    ) -> list[ImageState]:
        """New images' states. The oldest image in progress makes room where there are too many."""
        engine = self.runner.generation
        while len(running := self._running()) >= self._most_images(running):
            self.evicted += 1
            self._end(running[0], f"it was evicted for a newer one, as {len(running)} were in progress")
        return engine.begin(None, tokens, positions, guidance_scale, size)

    def _running(self) -> list[_Image]:
        return [image for image in self._images if not image.ended]

    def _most_images(self, running: Sequence[_Image]) -> int:
        held = [sum(sum(state.nbytes().values()) for state in image.states) for image in running]
        largest = max(held, default=1)
        return max(MIN_IN_PROGRESS, min(MAX_IN_PROGRESS, _room(self.runner.parts.device) // largest))

    def _drop_ended(self) -> None:
        """End images whose memory was taken away, and forget the oldest of those that have ended."""
        pool = self.runner.generation.pool
        for image in self._running():
            if not all(pool.leased(state.lease) for state in image.states):
                image.states, image.ended = [], "the model changed, or its handle was reset, while it was in progress"
        ended = [image for image in self._images if image.ended]
        for image in ended[:-MAX_ENDED]:
            self._images.remove(image)

    def _end(self, image: _Image, why: str) -> None:
        for state in image.states:
            self.runner.generation.end(state)
        image.states, image.conditioning, image.ended = [], None, why

    # ---- understanding

    @torch.no_grad()
    def mmu_generate(
        self,
        input_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        eos_token: int | None = None,
    ) -> list[Tensor]:
        """Continue a prompt of embeddings; same arguments and result as the model's own method (one prompt at a time)."""
        usable = isinstance(input_embeds, Tensor) and input_embeds.dim() == 3 and isinstance(attention_mask, Tensor)
        if not usable or input_embeds.shape[0] != 1 or not _hides(attention_mask, attention_mask != 0):  # type: ignore
            return self._original(
                "mmu_generate",
                "not one prompt with a mask of 0 and minus infinity",
                input_embeds=input_embeds,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                eos_token=eos_token,
            )
        assert input_embeds is not None and attention_mask is not None
        runner = self.runner
        with runner.lock.held:
            if not runner.active:
                return self.originals["mmu_generate"](
                    input_embeds, attention_mask, max_new_tokens, temperature, top_k, eos_token
                )
            runner.ready()
            parts, engine = runner.parts, runner.understanding
            length = input_embeds.shape[1]
            validate.check_mmu_inputs(parts.model, input_embeds, attention_mask, max_new_tokens, temperature, top_k)
            allowed = (attention_mask == 0).reshape(length, length)
            spans = visual_spans(allowed, has_time_token=bool(parts.lead))
            prompt = engine.prompt(Question(input_embeds.to(parts.dtype), allowed, spans))
            with runner.working():
                return engine.decode([prompt], max_new_tokens, TokenSampler(temperature, top_k), eos_token)[0]

    def _original(self, method: str, reason: str, **arguments: Any) -> Any:
        """Call the model's own method and count the reason."""
        self.runner.fallbacks[f"{method}: {reason}"] += 1
        return self.originals[method](**arguments)


def visual_spans(allowed: Tensor, has_time_token: bool) -> tuple[Span, ...]:
    """The image spans of a prompt, found from its mask bool [n, n].

    A span is a stretch of tokens that attend to later ones, and the token after them. With a time token, upstream's mask begins
    one token late (see `showo2.understanding.prompt_embeds`), so the span ends at eoi; without, at the last image token.
    A span at either end of the prompt is no image in Show-o2's layout, nor is a prompt that is bidirectional throughout.
    """
    past = (reach(allowed) > torch.arange(allowed.shape[0], device=allowed.device)).tolist()
    spans: list[Span] = []
    start = None
    for position, looks_past in enumerate(past):
        if looks_past and start is None:
            start = position
        elif not looks_past and start is not None:
            end = position if has_time_token else position + 1
            if start > 0 and end < len(past):
                spans.append((start, end - start))
            start = None
    return tuple(spans)


def _room(device: torch.device) -> int:
    """Bytes that images in progress may take together."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 4
    return 4 << 30


# ---- which calls the runtime supports


def _why_original(
    latents: Tensor | None,
    t: Tensor | None,
    tokens: Tensor | None,
    positions: Tensor | None,
    first_frame: bool,
    last_image: bool,
) -> str | None:
    """Why a call runs the model's own method, or None: cases of Show-o2 beyond one image per row."""
    if latents is None or t is None or tokens is None or positions is None:
        return "an input is missing"
    if first_frame or last_image:
        return "video or mixed-modality denoising"
    if latents.dim() != 4:
        return "video latents"
    if positions.dim() == 3 and positions.shape[1] != 1:
        return "several images in a row"
    return None


def _mask_problem(mask: Any, positions: Tensor | None, tokens: Tensor | None) -> str | None:
    """Why the caller's mask is not the one that the runtime implements, or None."""
    if not isinstance(mask, Tensor) or positions is None or tokens is None:
        return None
    expected = omni_allowed(positions, tokens.shape[1])
    if mask.dim() != 4 or mask.shape[0] not in (1, expected.shape[0]) or mask.shape[2:] != expected.shape[1:]:
        return f"attention mask of shape {tuple(mask.shape)}"
    return None if _hides(mask[:, 0].expand_as(expected), ~expected) else "an attention mask of another pattern"


def _hides(mask: Tensor, hidden: Tensor) -> bool:
    """Whether an additive mask is 0 where tokens are seen, and as good as minus infinity where they are hidden."""
    return mask.is_floating_point() and bool(((mask == 0) & ~hidden | (mask <= HIDDEN) & hidden).all())


def _read_time(latents: Tensor, t: Tensor, guided: bool) -> tuple[float, bool]:
    """The time, and whether both guidance branches share latents and time, as in upstream's sampler, so that only one needs
    encoding. The only values that a call reads from the device."""
    first, second = latents.chunk(2) if guided else (latents, latents)
    same = (first == second).all() & (t == t[0]).all() if guided else torch.zeros((), device=t.device)
    readback = Readback()
    readback.post(torch.stack([t[0].float(), same.float()]))
    time, shared = readback.wait()
    return time, bool(shared)
