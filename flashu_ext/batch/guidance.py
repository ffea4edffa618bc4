"""Guidance-parallel: two ranks run one branch of classifier-free guidance each and exchange velocities every evaluation."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.accelerated import handle_of
from ..models.masks import additive, omni_allowed
from ..models.sampling import integrate
from ..models.showo2.sampling import DEFAULT_STEPS, SampleInputs
from ..models.velocity import guide, patchify
from ..planning.config import FlashUConfig
from ..planning.schedule import StepPlan
from .ranks import Heartbeat, first_line, wait_for

__all__ = ["check_guidance_parallel", "guidance_group", "sample_guided"]

GROUP_SECONDS = 600.0
"""Timeout for one evaluation of the other branch."""
STOP_SECONDS = 3.0
"""How long the other branch may take once the caller wants to stop."""


@contextlib.contextmanager
def guidance_group(heartbeat: Heartbeat, device: torch.device, timeout: float = GROUP_SECONDS) -> Iterator[Any]:
    """A context with the process group for `sample_guided`: NCCL on GPUs, gloo on CPUs.

    Args:
        heartbeat: of two ranks.
        timeout: seconds for one evaluation of the other branch.

    Raises:
        ValueError: other than two ranks.
    """
    import torch.distributed as dist

    ranks = heartbeat.ranks
    if ranks.world != 2:
        raise ValueError(f"guidance-parallel: expected 2 ranks, one for each branch, got {ranks.world}")
    meet = functools.partial(
        dist.init_process_group,
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("guidance", heartbeat.store),
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        wait_for(meet, timeout, heartbeat.stop)
    except (InterruptedError, TimeoutError) as error:
        raise RuntimeError(f"rank {1 - ranks.rank} did not come to guidance-parallel: {error}") from error
    try:
        yield dist.group.WORLD
    finally:
        # Also after an error: the closed connection tells the other rank at once.
        dist.destroy_process_group()


def check_guidance_parallel(config: FlashUConfig, steps: int | None, layers: int, tokens: int) -> None:
    """Check that two ranks with one branch each compute the same as one process with both.

    Layer skipping averages importance over the rows of both branches, and a step of scale 1 has no second branch; neither can
    be split. Settings that depend on single rows (neurons, tokens, head states) or on the latents, which both ranks have
    (encoder features, the adaptive cache), can.

    Args:
        steps: grid points of the call; None: the config's.
        layers: of the language model.
        tokens: of the image.

    Raises:
        ValueError: a setting cannot be split; the message names the field.
    """
    if config.execution.skip_unit_guidance:
        raise ValueError(
            "FlashUConfig.skip_unit_guidance: expected False under guidance-parallel, where the unconditional branch is "
            "another rank's, got True"
        )
    if config.layers is not None and any(
        step.measure for step in StepPlan.build(config, steps, layers, None, tokens).steps
    ):
        raise ValueError(
            "FlashUConfig.layer_skip_ratio: expected 0 under guidance-parallel, as layers are chosen by a mean over the rows "
            f"of both branches, got {config.layers.ratio!r}"
        )
    if steps is not None and config.approximates and steps != (config.steps or DEFAULT_STEPS):
        raise ValueError(
            f"steps: expected None or {config.steps or DEFAULT_STEPS}, which the model was accelerated for "
            f"(FlashUConfig.steps), got {steps}"
        )


@torch.no_grad()
def sample_guided(
    model: Any,
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
    *,
    group: Any = None,
    stop: Callable[[], bool] = lambda: False,
) -> Any:
    """`flashu_ext.showo2.sample` on two ranks: rank 0 runs the conditional rows, rank 1 the unconditional ones.

    Both ranks pass the same arguments and get bit-equal results. They differ from one process's by rounding, because matrix
    products of half the rows may sum in another order.

    Args:
        model: dense or accelerated, the same on both ranks. If its config approximates, `steps` is None or the config's.
        noise: [B, channels, H, W]. The remaining arguments are those of `sample`.
        guidance_scale: above 0.
        group: process group of two ranks; None: the default one. NCCL for models on a GPU, gloo on a CPU.
        stop: True ends waiting for the other rank on a CPU, after it has not answered for a few seconds.

    Returns:
        Latents fp32 [B, channels, H, W], or (latents, velocities [steps - 1, B, channels, H, W]).

    Raises:
        TypeError, ValueError, IndexError: an argument is invalid or differs between the ranks, or the model's config cannot
            be split (`check_guidance_parallel`).
        RuntimeError: the other rank is gone, or `stop` ended the waiting.
    """
    inputs = SampleInputs.build(
        model,
        noise,
        text_tokens,
        text_tokens_null,
        modality_positions,
        modality_positions_null,
        steps,
        guidance_scale,
        time_shifting_factor,
    )
    if isinstance(inputs.guidance_scale, tuple):
        raise ValueError("guidance_scale: expected one number under guidance-parallel, got one for each image")
    if not inputs.guided:
        raise ValueError(
            "guidance_scale: expected a number above 0 under guidance-parallel, got 0, which has one branch"
        )
    exchange = _Exchange(group, stop)
    handle = handle_of(model)
    config = handle.config if handle is not None else None
    if config is not None:
        patches = noise.shape[2] * noise.shape[3] // int(model.config.patch_size) ** 2
        check_guidance_parallel(config, steps, len(model.showo.model.layers), patches)
    points = steps or (config.steps if config is not None else None) or DEFAULT_STEPS
    exchange.check_equal(
        (noise, inputs.tokens, inputs.positions),
        (points, guidance_scale, time_shifting_factor, config and config.to_json()),
        noise.device,
    )
    return integrate(_BranchStepper(model, inputs, points, exchange, handle), callback, return_velocity)


class _BranchStepper:
    """Runs this rank's branch of guidance and exchanges velocities with the other rank.

    For a dense model guidance runs in the model's dtype and the Euler step in fp32, as upstream; for an accelerated one both
    run in fp32 in one launch, in place.
    """

    def __init__(self, model: Any, inputs: SampleInputs, points: int, exchange: _Exchange, handle: Any):
        self.evaluations = points - 1
        self.model = model
        assert not isinstance(inputs.guidance_scale, tuple)
        self.guidance_scale = inputs.guidance_scale
        self.exchange = exchange
        self.config = handle.config if handle is not None else None
        self.kernels: Any = handle.runner.kernels if handle is not None else None
        self._tokens, self._positions = (
            rows.chunk(2)[exchange.rank].contiguous() for rows in (inputs.tokens, inputs.positions)
        )
        self._mask = None
        if handle is None:
            dtype = model.showo.model.embed_tokens.weight.dtype
            self._mask = additive(omni_allowed(self._positions, self._tokens.shape[1])[:, None], dtype)
        self._times = inputs.times(points)
        self._latents = inputs.noise.float().clone(memory_format=torch.contiguous_format)

    def step(self, index: int) -> None:
        mine = self.model.t2i_generate(
            image_latents=self._latents,
            t=self._times[index].expand(self._latents.shape[0]),
            text_tokens=self._tokens,
            attention_mask=self._mask,
            modality_positions=self._positions,
            max_seq_len=self._tokens.shape[1],
            guidance_scale=0.0,
        )
        self._branches = self.exchange(mine)
        asked = self.guidance_scale
        self._scale = self.config.guidance_at(index + 1, asked) if self.config is not None else asked
        dt = self._times[index + 1] - self._times[index]
        if self.kernels is None:
            self._latents = self._latents + dt * self.velocity()
        else:
            self._step_in_place(dt)

    def _step_in_place(self, dt: Tensor) -> None:
        v = patchify(self._branches, int(self.model.config.patch_size))
        scales = torch.full((1,), self._scale, dtype=torch.float32, device=v.device)
        first = torch.zeros((), dtype=torch.int64, device=v.device)
        self.kernels.guided_euler_step_(self._latents, v, scales, dt.reshape(1).float(), first)

    def velocity(self) -> Tensor:
        guided = guide(self._branches, self._scale)
        return guided.float() if self.kernels is None else guided

    def latents(self) -> Tensor:
        return self._latents if self.kernels is None else self._latents.clone()

    def close(self) -> None:
        pass


class _Exchange:
    """All-gathers rows as bytes, so that backends need not support the dtype and cannot round."""

    def __init__(self, group: Any, stop: Callable[[], bool]):
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "group: expected an initialised process group, got none (flashu_ext.parallel.guidance_group)"
            )
        if dist.get_world_size(group) != 2 or dist.get_rank(group) < 0:
            raise ValueError(f"group: expected 2 ranks, one for each branch, got {dist.get_world_size(group)}")
        self.group = group
        self.stop = stop
        self.rank = dist.get_rank(group)

    def __call__(self, rows: Tensor) -> Tensor:
        """[B, ...] of this rank -> [2 * B, ...] of rank 0 and then rank 1."""
        import torch.distributed as dist

        mine = rows.contiguous().view(torch.uint8)
        parts = [torch.empty_like(mine), torch.empty_like(mine)]
        try:
            self._wait(dist.all_gather(parts, mine, group=self.group, async_op=True), mine.device)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {1 - self.rank} is gone, it does not answer in guidance-parallel: {first_line(error)}"
            ) from error
        return torch.cat(parts).view(rows.dtype)

    def _wait(self, work: Any, device: torch.device) -> None:
        """On a CPU by polling, because Python handles no signal while native code waits for a rank that hangs."""
        began = time.monotonic()
        while device.type == "cpu" and not work.is_completed():
            waited = time.monotonic() - began
            if waited > STOP_SECONDS and self.stop():
                raise RuntimeError("stopped while waiting for it")
            time.sleep(min(waited / 16, 0.01))
        work.wait()

    def check_equal(self, tensors: Sequence[Tensor | None], others: Any, device: torch.device) -> None:
        """Raise on both ranks if their arguments differ, which would give wrong images or a deadlock."""
        digest = hashlib.sha256(repr(others).encode())
        for tensor in tensors:
            assert tensor is not None, "checked by the caller"
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
            digest.update(tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().tobytes())
        mine = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=device)
        both = self(mine[None])
        if not torch.equal(both[0], both[1]):
            raise ValueError(
                "group: expected the same noise, tokens, spans, steps, guidance, time shift and config on both ranks, got "
                "different ones"
            )
