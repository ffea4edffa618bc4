"""The meaning of every setting of a step, in plain torch on an unmodified model: whole sequences, all rows that
count, no caches except those that the setting asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flashu_ext import FlashUConfig, StepPlan
from flashu_ext.models.showo2.sampling import time_grid
from flashu_ext.models.velocity import unpatchify
from flashu_ext.planning.schedule import Step
from flashu_ext.runtime.history import TokenHistory
from flashu_ext.runtime.token_router import TokenRouter

BAND = 1e-5
"""Token importance may differ by so much; a choice is right if it is right up to that."""


class Oracle:
    """Generates images as a config says, without neuron pruning.

    Attributes:
        chosen: step -> int64 [layers, rows, active], the tokens that the run under test computed. They are checked against
            the importance measured here and followed, so that a tie within rounding does not fail a test.
        kinds: kind of every step, adaptive ones decided here.
        of_layers: step -> the layers' importance, fp32 [layers], where it was measured.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], config: FlashUConfig, chosen: Mapping[int, Tensor]):
        self.model, self.config, self.chosen = model, config, chosen
        self.inputs = inputs
        self.tokens = torch.cat([inputs["text_tokens"], inputs["text_tokens_null"]])
        self.positions = torch.cat([inputs["modality_positions"], inputs["modality_positions_null"]])
        self.images = inputs["noise"].shape[0]
        self.kinds: list[str] = []
        self.of_layers: dict[int, Tensor] = {}
        self.skipped: list[int] = []
        self.importance: dict[int, Tensor] = {}
        self.kept: list[tuple[int, Tensor]] = []
        self.semantic: Tensor | None = None
        self.encode_due = False
        self.signal: Tensor | None = None
        self.moved = 0.0

    @torch.no_grad()
    def generate(self) -> Tensor:
        plan = StepPlan.build(
            self.config, None, len(self.model.showo.model.layers), self.inputs["guidance_scale"], self.span - 1
        )
        times = time_grid(plan.grid_points, self.inputs["time_shifting_factor"])
        latents = self.inputs["noise"].clone()
        for i, step in enumerate(plan.steps):
            t = times[i].expand(self.images)
            step = self.decided(step, latents, t)
            velocity = self.velocity(step, latents, t)
            if step.guided:
                scale = self.config.guidance_at(step.index, self.inputs["guidance_scale"])
                conditional, unconditional = velocity.chunk(2)
                velocity = unconditional + scale * (conditional - unconditional)
            latents = latents + (times[i + 1] - times[i]) * velocity
            self.kinds.append(step.kind)
        return latents

    @property
    def span(self) -> int:
        return int(self.positions[0, 0, 1])

    def decided(self, step: Step, latents: Tensor, t: Tensor) -> Step:
        if not self.config.adaptive_cache:
            return step
        model = self.model
        time = model.time_embed_proj(model.time_embed(t, torch.float32))
        signal = model.image_embedder_gen(latents) + time[:, None]
        if self.signal is not None:
            self.moved += float((signal - self.signal).abs().sum() / self.signal.abs().sum())
        self.signal = signal
        age = self.config.head_cache_interval
        fresh = bool(self.kept) and (not age or step.index - self.kept[-1][0] < age)
        if step.adaptive and fresh and self.moved < self.config.adaptive_cache_budget:
            self.encode_due |= step.encode
            return step.cached(self.kept[-1][0], self.config.head_residual_reuse)
        self.moved = 0.0
        return step

    def velocity(self, step: Step, latents: Tensor, t: Tensor) -> Tensor:
        model = self.model
        halves = 2 if step.guided else 1
        rows = halves * self.images
        positions = self.positions[:rows]
        mask = model.omni_mask(positions, self.tokens.shape[1])
        time = model.time_embed(t.repeat(halves), torch.float32)
        offsets = positions[:, 0, 0].tolist()
        hidden = state = before = None
        if step.backbone:
            hidden = self.backbone(step, self.sequence(step, latents, time, offsets), mask, offsets)
            before = self.spans(model.diff_proj(hidden), offsets)
        if step.head:
            state = self.head(hidden, time, mask, positions, offsets)
            if step.keep_head:
                # Differences start again when rows return, if steps are decided at run time.
                if self.config.adaptive_cache and self.kept and self.kept[-1][1].shape[0] < rows:
                    self.kept = []
                self.kept.append((step.index, state - before if self.config.head_residual_reuse else state))
        else:
            state = self.predict(step.index, rows)
            if step.residual:
                state = before + state
        return unpatchify(model.diffusion_head_b(state[:, 1:], time), torch.Size((rows, *latents.shape[1:])))

    def sequence(self, step: Step, latents: Tensor, time: Tensor, offsets: list[int]) -> Tensor:
        model, rows = self.model, len(offsets)
        if step.encode or self.encode_due or self.semantic is None:
            table = model.position_embedding.weight[None]
            self.semantic = model.und_trans(inputs_embeds=model.image_embedder_und(latents) + table)[
                "last_hidden_state"
            ]
            self.encode_due = False
        image = model.fusion_proj(torch.cat([self.semantic, model.image_embedder_gen(latents)], dim=-1))
        image = image.repeat(rows // self.images, 1, 1)
        span = torch.cat([model.time_embed_proj(time)[:, None], image], dim=1)
        x = model.showo.model.embed_tokens(self.tokens[:rows])
        for row, offset in enumerate(offsets):
            x[row, offset : offset + self.span] = span[row]
        return x

    def backbone(self, step: Step, x: Tensor, mask: Tensor, offsets: list[int]) -> Tensor:
        llm = self.model.showo.model
        ids = torch.arange(x.shape[1])[None]
        rope = llm.rotary_emb(x, ids)
        skipped = self.skipped if step.skip_from is not None else []
        of_layers, of_tokens = [], []
        for index, layer in enumerate(llm.layers):
            if index in skipped:
                continue
            out = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=ids)
            out = out if isinstance(out, Tensor) else out[0]
            last = llm.norm(out) if index == len(llm.layers) - 1 else out
            of_layers.append(1 - torch.cosine_similarity(x, last, dim=-1).mean())
            of_tokens.append(1 - torch.cosine_similarity(self.spans(x, offsets), self.spans(out, offsets), dim=-1))
            if step.tokens_from:
                out = self.routed(step, index, x, out, offsets)
            x = out
        if step.measure:
            self.of_layers[step.index] = torch.stack(of_layers)
            count = int(len(llm.layers) * self.config.layer_skip_ratio)
            self.skipped = torch.stack(of_layers).argsort(stable=True)[:count].tolist()
        if step.measure_tokens:
            self.importance[step.index] = torch.stack(of_tokens)
        return llm.norm(x)

    def routed(self, step: Step, layer: int, x: Tensor, out: Tensor, offsets: list[int]) -> Tensor:
        """The dense layer's output with the tokens that are not active overwritten by their state before it."""
        newest = step.tokens_from[0]
        importance = self.importance[newest][layer]
        if len(step.tokens_from) == 2:
            older = step.tokens_from[1]
            slope = (importance[: len(offsets)] - self.importance[older][layer][: len(offsets)]) / (newest - older)
            importance = importance[: len(offsets)] + slope * (step.index - newest)
        active = self.chosen[step.index][layer]
        skipped = int((self.span - 1) * self.config.token_skip_ratio)
        assert active.shape == (len(offsets), self.span - skipped)
        out = out.clone()
        for row, offset in enumerate(offsets):
            inside = torch.zeros(self.span, dtype=torch.bool)
            inside[active[row]] = True
            assert inside[0] and (active[row].diff() > 0).all(), "the time token is active, in order"
            if skipped:
                worst = importance[row][inside][1:].min() if inside.sum() > 1 else torch.tensor(float("inf"))
                assert worst >= importance[row][~inside].max() - BAND, "the active tokens are the most important ones"
            at = offset + torch.arange(self.span)[~inside]
            out[row, at] = x[row, at]
        return out

    def head(self, hidden: Tensor, time: Tensor, mask: Tensor, positions: Tensor, offsets: list[int]) -> Tensor:
        x = self.model.diff_proj(hidden)
        position = torch.arange(x.shape[1])
        inside = ((position >= positions[:, 0, :1]) & (position < positions[:, 0].sum(1, keepdim=True)))[..., None]
        for block in self.model.diffusion_head_a:
            x = block(x, time, mask, position[None], inside)
        return self.spans(x, offsets)

    def predict(self, index: int, rows: int) -> Tensor:
        """The newest state, extrapolated by its finite differences."""
        order = min(self.config.head_forecast_order, len(self.kept) - 1)
        table = []
        for at, state in self.kept[-1 - order :]:  # oldest first
            fresh = [(at, state[:rows])]
            for i, (before, old) in enumerate(table):
                fresh.append((at, (fresh[i][1] - old) / (at - before)))
            table = fresh
        ahead = index - self.kept[-1][0]
        return sum(value * w for (_, value), w in zip(table, (1, ahead, ahead * ahead / 2), strict=False))

    def spans(self, x: Tensor, offsets: list[int]) -> Tensor:
        return torch.stack([x[row, offset : offset + self.span] for row, offset in enumerate(offsets)])


@contextlib.contextmanager
def recorded_tokens(chosen: dict[int, Tensor]) -> Iterator[None]:
    """While the block runs, records an image's routing in `chosen`: step -> the tokens computed in it."""
    steps: list[int] = []
    routing, active = TokenHistory.routing, TokenRouter.active

    def route(self: TokenHistory, sources: tuple[int, ...], step: int) -> Any:
        steps.append(step)
        return routing(self, sources, step)

    def compute(self: TokenRouter, work: Any, rows: int, kernels: Any) -> Tensor:
        chosen[steps[-1]] = active(self, work, rows, kernels)
        return chosen[steps[-1]]

    with patch.object(TokenHistory, "routing", route), patch.object(TokenRouter, "active", compute):
        yield
