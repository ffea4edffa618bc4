"""Guidance-parallel: the two branches of classifier-free guidance on two ranks, which exchange their velocities in every
evaluation."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .ranks import Heartbeat, first_line

if TYPE_CHECKING:
    from ..planning.config import FlashUConfig

__all__ = ["check_guidance_parallel", "guidance_group", "sample_guided"]

GROUP_SECONDS = 600.0
"""How long one evaluation of the other branch may take."""


@contextlib.contextmanager
def guidance_group(heartbeat: Heartbeat, device: torch.device, timeout: float = GROUP_SECONDS) -> Iterator[Any]:
    """The process group that `sample_guided` exchanges through while the block runs: NCCL on GPUs, gloo on CPUs.

    Args:
        heartbeat: of two ranks. timeout: seconds that an evaluation of the other branch may take.

    Raises:
        ValueError: other than two ranks.
    """
    import torch.distributed as dist

    ranks = heartbeat.ranks
    if ranks.world != 2:
        raise ValueError(f"guidance-parallel: expected 2 ranks, one for each branch, got {ranks.world}")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("guidance", heartbeat.store),
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        yield dist.group.WORLD
    finally:
        # Also after an error: the closed connection is what tells the other rank at once.
        dist.destroy_process_group()


def check_guidance_parallel(config: FlashUConfig, steps: int | None, layers: int, tokens: int) -> None:
    """Whether two ranks with one branch each compute what one process with both does.

    Layers are skipped by a measurement that averages over the rows of both branches, and a step whose scale is 1 has no
    second branch to run. What depends on a row alone (neurons, tokens, head states) or on the latents that both ranks hold
    (encoder features, the adaptive cache) is the same.

    Args:
        steps: grid points that are asked for; None: the config's. layers: of the language model. tokens: of the image.

    Raises:
        ValueError: they would not; the message names the field.
    """
    from ..planning.schedule import StepPlan

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
    if steps is not None and config.approximates and steps != (config.steps or _default_steps()):
        raise ValueError(
            f"steps: expected None or {config.steps or _default_steps()}, which the model was accelerated for "
            f"(FlashUConfig.steps), got {steps}"
        )


def _default_steps() -> int:
    from ..models.showo2.sampling import DEFAULT_STEPS

    return DEFAULT_STEPS


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
) -> Any:
    """`flashu_ext.showo2.sample` on two ranks: rank 0 runs the conditional rows of every evaluation, rank 1 the
    unconditional ones. Both call it with the same arguments and get the same result, bit for bit; beside one process's it
    differs by rounding, as a matrix product of half the rows may add up in another order.

    Args:
        model: dense or accelerated, the same on both ranks. Where its config approximates, `steps` is None or the config's.
        noise: [B, channels, H, W]. The rest is as for `sample`.
        guidance_scale: above 0.
        group: process group of two ranks; None: the default one. NCCL where the model is on a GPU, gloo on a CPU.

    Returns:
        Latents fp32 [B, channels, H, W], or (latents, velocities [steps - 1, B, channels, H, W]).

    Raises:
        TypeError, ValueError, IndexError: an argument is wrong, or differs between the ranks; or the model's config decides
            by both branches together (`check_guidance_parallel`). RuntimeError: the other rank is gone.
    """
    from ..models.showo2 import validate
    from ..models.showo2.sampling import time_grid
    from ..runtime import find_runner

    inputs = (noise, text_tokens, text_tokens_null, modality_positions, modality_positions_null)
    validate.check_sample_inputs(model, *inputs, guidance_scale, time_shifting_factor)
    if guidance_scale == 0:
        raise ValueError(
            "guidance_scale: expected a number above 0 under guidance-parallel, got 0, which has one branch"
        )
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 2):
        raise ValueError(f"steps: expected an integer >= 2 (grid points), got {steps!r}")
    exchange = _Exchange(group)
    runner = find_runner(model)
    config = runner.config if runner is not None else None
    if config is not None:
        patches = noise.shape[2] * noise.shape[3] // int(model.config.patch_size) ** 2
        check_guidance_parallel(config, steps, len(model.showo.model.layers), patches)
    points = steps or (config.steps if config is not None else None) or _default_steps()
    exchange.check_equal(
        inputs, (points, guidance_scale, time_shifting_factor, config and config.to_json()), noise.device
    )

    conditional = exchange.rank == 0
    tokens, positions = (
        (text_tokens, modality_positions) if conditional else (text_tokens_null, modality_positions_null)
    )
    assert tokens is not None and positions is not None, "checked above, as there is guidance"
    mask = None if runner is not None else _dense_mask(model, positions, tokens.shape[1])
    update: _Update = _Accelerated(runner, int(model.config.patch_size)) if runner is not None else _Dense()
    latents = noise.float().clone(memory_format=torch.contiguous_format)
    times = time_grid(points, time_shifting_factor).to(noise.device)
    velocities = []
    for i in range(points - 1):
        mine = model.t2i_generate(
            image_latents=latents,
            t=times[i].expand(latents.shape[0]),
            text_tokens=tokens,
            attention_mask=mask,
            modality_positions=positions,
            max_seq_len=tokens.shape[1],
            guidance_scale=0.0,
        )
        scale = config.guidance_at(i + 1, guidance_scale) if config is not None else guidance_scale
        branches = exchange(mine)
        if return_velocity:
            velocities.append(_guided(branches, scale))
        latents = update(latents, branches, scale, times[i + 1] - times[i])
        if callback is not None:
            callback(i + 1, latents)
    if not return_velocity:
        return latents
    return latents, torch.stack(velocities if runner is not None else [velocity.float() for velocity in velocities])


def _dense_mask(model: Any, positions: Tensor, length: int) -> Tensor:
    """Additive omni mask [rows, 1, length, length], which upstream's own class has its caller make."""
    from ..models.showo2 import validate

    dtype = model.showo.model.embed_tokens.weight.dtype
    allowed = validate.omni_allowed(positions, length)[:, None]
    mask = torch.zeros(allowed.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def _guided(branches: Tensor, scale: float) -> Tensor:
    conditional, unconditional = branches.chunk(2)
    return unconditional + scale * (conditional - unconditional)


_Update = Callable[[Tensor, Tensor, float, Tensor], Tensor]
"""Latents [B, ...], velocities [2 * B, ...] conditional first, guidance scale, time step -> the next latents."""


class _Dense:
    """As upstream's loop: guidance in the model's dtype, the step in fp32."""

    def __call__(self, latents: Tensor, branches: Tensor, scale: float, dt: Tensor) -> Tensor:
        return latents + dt * _guided(branches, scale).float()


class _Accelerated:
    """As the accelerated loop: guidance and step in fp32, in one launch, in place."""

    def __init__(self, runner: Any, patch: int):
        self.kernels = runner.kernels
        self.patch = patch

    def __call__(self, latents: Tensor, branches: Tensor, scale: float, dt: Tensor) -> Tensor:
        rows, channels, height, width = branches.shape
        patches = height * width // self.patch**2
        # Back to the rows that the head wrote: one vector of patch * patch * channels for each patch.
        v = branches.reshape(rows, channels, -1).transpose(1, 2).reshape(rows, patches, -1).contiguous()
        scales = torch.full((1,), scale, dtype=torch.float32, device=v.device)
        first = torch.zeros((), dtype=torch.int64, device=v.device)
        self.kernels.guided_euler_step_(latents, v, scales, dt.reshape(1).float(), first)
        return latents


class _Exchange:
    """Hands this rank's rows to the other one and takes its, by bytes: no backend need know the dtype, none may round."""

    def __init__(self, group: Any):
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "group: expected an initialised process group, got none (flashu_ext.parallel.guidance_group)"
            )
        if dist.get_world_size(group) != 2 or dist.get_rank(group) < 0:
            raise ValueError(f"group: expected 2 ranks, one for each branch, got {dist.get_world_size(group)}")
        self.group = group
        self.rank = dist.get_rank(group)

    def __call__(self, rows: Tensor) -> Tensor:
        """[B, ...] of this rank -> [2 * B, ...] of rank 0 and then rank 1."""
        import torch.distributed as dist

        mine = rows.contiguous().view(torch.uint8)
        parts = [torch.empty_like(mine), torch.empty_like(mine)]
        try:
            dist.all_gather(parts, mine, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {1 - self.rank} is gone, it does not answer in guidance-parallel: {first_line(error)}"
            ) from error
        return torch.cat(parts).view(rows.dtype)

    def check_equal(self, tensors: Sequence[Tensor | None], others: Any, device: torch.device) -> None:
        """Raise on both ranks where they were called with different arguments; they would draw nonsense, or wait for ever."""
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
                "others on each"
            )
