"""The entry points of an accelerated model: upstream's two methods, and loops over whole images and answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.showo2 import validate
from ..models.showo2.decoding import OnToken, TokenSampler
from ..models.structure import Showo2Parts
from ..ops.kernel_sets import KernelSet
from ..planning.config import FlashUConfig
from .generation import GenerationEngine
from .graphs import Captures, Readback
from .state import Conditioning, ImageState
from .understanding import UnderstandingEngine

__all__ = ["Runner"]

# Images whose evaluations may alternate through `t2i_generate` before the oldest one's state is dropped.
IMAGES_IN_PROGRESS = 2

Original = Callable[..., Any]


class Runner:
    """Runs one accelerated model. Created by `flashu_ext.accelerate`; reached through its handle."""

    def __init__(self, parts: Showo2Parts, config: FlashUConfig, kernels: KernelSet, originals: Mapping[str, Original]):
        self.parts = parts
        self.config = config
        self.kernels = kernels
        self.originals = originals
        self.captures = Captures(parts.model, parts.device, config.execution.step_graphs)
        self.generation = GenerationEngine(parts, config, kernels, self.captures)
        self.understanding = UnderstandingEngine(parts, config, kernels, self.captures)
        self.fallbacks: Counter[str] = Counter()
        self.last_image: ImageState | None = None
        self._in_progress: list[ImageState] = []

    # ---- whole images

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        text_tokens: Tensor,
        text_tokens_null: Tensor | None,
        modality_positions: Tensor,
        modality_positions_null: Tensor | None,
        steps: int | None = None,
        guidance_scale: float = 5.0,
        time_shifting_factor: float | None = 3.0,
        callback: Callable[[int, Tensor], None] | None = None,
        return_velocity: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`flashu_ext.showo2.sample` of an accelerated model; arguments and results are the same."""
        from ..models.showo2.sampling import time_grid

        guided = guidance_scale > 0
        tokens, positions = text_tokens, modality_positions
        if guided:
            assert text_tokens_null is not None and modality_positions_null is not None, "checked by `sample`"
            tokens = torch.cat([text_tokens, text_tokens_null])
            positions = torch.cat([modality_positions, modality_positions_null])
        engine = self.generation
        state = engine.begin(steps, tokens, positions, guidance_scale, (noise.shape[2], noise.shape[3]))
        self.last_image = state
        try:
            count, device = len(state.plan), noise.device
            times = time_grid(state.plan.grid_points, time_shifting_factor)
            scales = [self.config.guidance_at(i + 1, guidance_scale) if guided else 0.0 for i in range(count)]
            scale = torch.tensor(scales, dtype=torch.float32)
            tables = torch.stack([times[:-1], scale, times[1:] - times[:-1]]).to(device)
            engine.load_times(state, *tables)
            latents = state.workspace.latents[: state.images]
            latents.copy_(noise)
            velocities = []
            for i in range(count):
                engine.step(state)
                if return_velocity:
                    rows = state.rows(state.ran[-1])
                    velocity = self._velocity(state.workspace.velocity[:rows], scales[i], noise.shape)
                    velocities.append(velocity.clone())  # the next evaluation overwrites it
                if callback is not None:
                    callback(i + 1, latents.clone())  # the caller's to keep: the next step writes into these
            drawn = latents.clone()
        finally:
            engine.end(state)
        return (drawn, torch.stack(velocities)) if return_velocity else drawn

    def _velocity(self, rows: Tensor, scale: float, shape: torch.Size) -> Tensor:
        """Velocity rows [images or 2 * images, patches, p * p * c] -> guided velocity of `shape` [images, channels, H, W]."""
        velocity = rows.reshape(rows.shape[0], -1, shape[1]).transpose(1, 2).reshape(rows.shape[0], *shape[1:])
        if rows.shape[0] != shape[0]:
            conditional, unconditional = velocity.chunk(2)
            velocity = unconditional + scale * (conditional - unconditional)
        return velocity

    # ---- upstream's methods

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
        guidance_scale: float = 0.0,
        **kwargs: Any,
    ) -> Tensor:
        """One evaluation, called by upstream's sampler; same arguments and result as the model's own method.

        A new image is found by its conditioning and by t, which grows within an image. Two images of one prompt that are drawn
        by turns are told apart by their tensors: with the very same ones they would share what is kept between steps.
        """
        reason = self._why_original(
            image_latents, t, text_tokens, modality_positions, first_frame_as_cond, only_denoise_last_image
        )
        if self._in_progress and self.generation.workspaces.moved():
            for state in list(self._in_progress):
                self._drop(state)
        call = Conditioning.of(image_latents, t, text_tokens, modality_positions, attention_mask, guidance_scale)
        known = next((s for s in self._in_progress if call is not None and s.conditioning == call), None)
        if reason is None and known is None:
            reason = self._mask_problem(attention_mask, modality_positions, text_tokens)
        if reason is not None:
            self.fallbacks[f"t2i_generate: {reason}"] += 1
            return self.originals["t2i_generate"](
                image_latents=image_latents,
                t=t,
                text_tokens=text_tokens,
                attention_mask=attention_mask,
                modality_positions=modality_positions,
                first_frame_as_cond=first_frame_as_cond,
                only_denoise_last_image=only_denoise_last_image,
                max_seq_len=max_seq_len,
                guidance_scale=guidance_scale,
                **kwargs,
            )
        assert (
            image_latents is not None and t is not None and text_tokens is not None and modality_positions is not None
        )
        guided = guidance_scale > 0
        if known is None:
            # Further calls with the very same tensors are not looked at again.
            validate.check_t2i_inputs(self.parts.model, image_latents, t, text_tokens, modality_positions, guided)
        time, shared = self._look_at(image_latents, t, guided)
        state = self._image_in_progress(known, text_tokens, modality_positions, guidance_scale, image_latents, time)
        latents, times = (image_latents.chunk(2)[0], t[: state.images]) if shared else (image_latents, t)
        index = state.step + 1
        rows = self.generation.velocity_at(state, latents, times)
        state.last_time, state.conditioning = time, call
        scale = self.config.guidance_at(index, guidance_scale) if guided else 0.0
        velocity = self._velocity(rows, scale, torch.Size((state.images, *image_latents.shape[1:])))
        velocity = torch.cat([velocity, velocity]) if guided else velocity.clone()
        if state.step >= len(state.plan):
            self._in_progress.remove(state)
            self.generation.end(state)
        return velocity

    def _why_original(
        self,
        latents: Tensor | None,
        t: Tensor | None,
        tokens: Tensor | None,
        positions: Tensor | None,
        first_frame: bool,
        last_image: bool,
    ) -> str | None:
        """Why a call runs the model's own method, or None. These are cases that Show-o2 knows beyond one image a row."""
        if latents is None or t is None or tokens is None or positions is None:
            return "an input is missing"
        if first_frame or last_image:
            return "video or mixed-modality denoising"
        if latents.dim() != 4:
            return "video latents"
        if positions.dim() == 3 and positions.shape[1] != 1:
            return "several images in a row"
        return None

    def _mask_problem(self, mask: Any, positions: Tensor | None, tokens: Tensor | None) -> str | None:
        """Why a mask given by the caller is not the one that the runtime stands for, or None."""
        if not isinstance(mask, Tensor) or positions is None or tokens is None:
            return None
        expected = validate.omni_allowed(positions, tokens.shape[1])
        if mask.dim() != 4 or mask.shape[0] not in (1, expected.shape[0]) or mask.shape[2:] != expected.shape[1:]:
            return f"attention mask of shape {tuple(mask.shape)}"
        return (
            None
            if torch.equal((mask[:, 0] == 0).expand_as(expected), expected)
            else "an attention mask of another pattern"
        )

    def _look_at(self, latents: Tensor, t: Tensor, guided: bool) -> tuple[float, bool]:
        """The time, and whether the guided rows come in two halves that share latents and time, as upstream's sampler makes
        them, so that one half is encoded. The one thing that a call has to read from the device."""
        first, second = latents.chunk(2) if guided else (latents, latents)
        same = (first == second).all() & (t == t[0]).all() if guided else torch.zeros((), device=t.device)
        readback = Readback()
        readback.post(torch.stack([t[0].float(), same.float()]))
        time, shared = readback.wait()
        return time, bool(shared)

    def _image_in_progress(
        self,
        known: ImageState | None,
        tokens: Tensor,
        positions: Tensor,
        guidance_scale: float,
        latents: Tensor,
        time: float,
    ) -> ImageState:
        """The image that a call goes on with, or a new one. known: the image whose conditioning these very tensors are."""
        size = (latents.shape[2], latents.shape[3])
        grid = (size[0] // self.parts.patch_size, size[1] // self.parts.patch_size)
        scale = self.generation.planned_scale(guidance_scale)
        # The very same tensors first; then equal ones, for a caller may make them anew for every call. Two images of one
        # prompt, drawn by turns, are told apart by their tensors, and where these are the same by their times.
        guided = guidance_scale > 0
        same = [known] if known else [s for s in self._in_progress if s.matches(tokens, positions, guided, grid, scale)]
        earlier = [state for state in same if state.last_time < time]
        if earlier:
            # Of several the one that is farthest, and of these the newest: an older one was abandoned.
            self.last_image = max(reversed(earlier), key=lambda state: state.last_time)
            return self.last_image
        if known is not None:
            self._drop(known)
        while len(self._in_progress) >= IMAGES_IN_PROGRESS:
            self._drop(self._in_progress[0])
        state = self.generation.begin(None, tokens, positions, guidance_scale, size)
        self._in_progress.append(state)
        self.last_image = state
        return state

    def _drop(self, state: ImageState) -> None:
        self._in_progress.remove(state)
        self.generation.end(state)

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
        if not usable or input_embeds.shape[0] != 1:  # type: ignore[union-attr]
            self.fallbacks["mmu_generate: not one prompt with its mask"] += 1
            return self.originals["mmu_generate"](
                input_embeds=input_embeds,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                eos_token=eos_token,
            )
        assert input_embeds is not None and attention_mask is not None
        length = input_embeds.shape[1]
        validate.check_mmu_inputs(self.parts.model, input_embeds, attention_mask, max_new_tokens, temperature, top_k)

        prompt = self.understanding.prompt(
            input_embeds.to(self.parts.dtype), (attention_mask == 0).reshape(length, length)
        )
        sampler = TokenSampler(temperature, top_k)
        return self.understanding.decode([prompt], max_new_tokens, sampler, eos_token)[0]

    @torch.no_grad()
    def answer_tokens(
        self,
        image_latents: Sequence[Tensor],
        befores: Sequence[Tensor],
        afters: Sequence[Tensor],
        max_new_tokens: int,
        eos_token: int | None,
        sampler: TokenSampler,
        on_token: OnToken | None = None,
    ) -> list[Tensor]:
        """`flashu_ext.showo2.answer_tokens_batch` of an accelerated model; one image [1, channels, H, W] a question."""
        engine = self.understanding
        images = engine.image_embeds(image_latents)
        prompts = [engine.question(*inputs) for inputs in zip(images, befores, afters, strict=True)]
        answers = engine.decode(prompts, max_new_tokens, sampler, eos_token, on_token)
        empty = torch.empty(0, dtype=torch.int64, device=self.parts.device)
        return [torch.stack(answer) if answer else empty for answer in answers]

    # ---- housekeeping

    def held_bytes(self) -> dict[str, int]:
        """Bytes held now beside the model's weights, by purpose."""
        held = self.generation.workspaces.nbytes()
        answers = self.understanding.nbytes()
        return held | ({"answers' keys and values": answers} if answers else {})

    def reset(self) -> None:
        """Forget images in progress and the last prompt."""
        for state in list(self._in_progress):
            self._drop(state)
        self.generation.workspaces.clear()
        self.understanding.reset()
