"""Room: parallel. Several processes: who they are, what each of them draws, who of them is gone, and guidance on two of them.

Data parallel needs no collective: `shard` deals out a list, and a `RollCall` tells through a store which ranks have ended.
Guidance-parallel (`sample_guided`) exchanges the velocity of the two branches in every evaluation.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .config import FlashUConfig

__all__ = ["Ranks", "RollCall", "check_guidance_parallel", "guidance_group", "sample_guided", "shard"]

T = TypeVar("T")

JOIN_SECONDS = 120.0
"""How long ranks wait for each other at the start."""
PATIENCE_SECONDS = 30.0
"""Silence after which a rank counts as gone. A beat needs the interpreter's lock only, which long torch calls let go of."""
BEAT_SECONDS = 0.5
GROUP_SECONDS = 600.0
"""How long one evaluation of the other branch may take."""


# ---- who is there


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ones that work together.

    Attributes:
        rank: its number, from 0. world: how many there are. local_rank: its number on this machine.
        attempt: how often the launcher started them anew.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    attempt: int = 0

    def __post_init__(self) -> None:
        for name, low in (("rank", 0), ("world", 1), ("local_rank", 0), ("attempt", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
        if self.rank >= self.world:
            raise ValueError(f"rank: expected a number in [0, {self.world}), got {self.rank}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Ranks:
        """As torchrun, accelerate and the like say in RANK, WORLD_SIZE and LOCAL_RANK; one process where they say nothing.

        Without LOCAL_RANK all ranks are taken to be on one machine.

        Raises:
            ValueError: a variable is missing beside the others, or is no number in its range; it is named.
        """
        environment = os.environ if environment is None else environment
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            return cls()

        def number(name: str, default: str | None = None) -> int:
            text = environment.get(name, default)
            if text is None:
                raise ValueError(f"{name}: expected a number in the environment beside RANK or WORLD_SIZE, got none")
            if not text.isascii() or not text.isdecimal():
                raise ValueError(f"{name}: expected a number in the environment, got {text!r:.40}")
            return int(text)

        rank, world = number("RANK"), number("WORLD_SIZE")
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if world > 1 and not environment.get(name):
                raise ValueError(f"{name}: expected it in the environment where WORLD_SIZE is above 1, got none")
        return cls(rank, world, number("LOCAL_RANK", str(rank)), number("TORCHELASTIC_RESTART_COUNT", "0"))

    def device(self) -> torch.device:
        """The GPU with this rank's local number, where torch sees GPUs; else the CPU.

        Raises:
            ValueError: there are fewer GPUs than ranks on this machine.
        """
        if not torch.cuda.is_available():
            return torch.device("cpu")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise ValueError(
                f"LOCAL_RANK: expected a number in [0, {count}), one rank for each GPU, got {self.local_rank}"
            )
        return torch.device("cuda", self.local_rank)


def shard(items: Sequence[T], rank: int, world: int) -> list[T]:
    """The items of one rank: every world-th from its own on, so that all ranks together have each item once.

    Raises:
        ValueError: rank is not in [0, world).
    """
    Ranks(rank, world)
    return list(items[rank::world])


class RollCall:
    """Who is still working and who is gone, through a store (torch.distributed's key-value server); no collective.

    Every rank beats from a thread of its own. A rank that has not beaten for `patience` seconds is gone; one that fails says
    so. Leaving the `with` block by an error waits for the others, so that a launcher that ends all ranks with the first
    one does not take their work away.
    """

    def __init__(self, ranks: Ranks, store: Any = None, patience: float = PATIENCE_SECONDS):
        """store: shared by all ranks, kept by rank 0 or by the launcher; None for one process. patience: seconds."""
        if not isinstance(patience, (int, float)) or not patience > BEAT_SECONDS:
            raise ValueError(f"patience: expected more than {BEAT_SECONDS} seconds, got {patience!r}")
        if ranks.world > 1 and store is None:
            raise ValueError(f"store: expected one for {ranks.world} ranks, got None")
        self.ranks = ranks
        self.store = store
        self.patience = patience
        self.lost: dict[int, str] = {}
        self._ended = self._store_gone = False
        self._others = [rank for rank in range(ranks.world) if rank != ranks.rank]
        now = time.monotonic()
        self._heard = dict.fromkeys(self._others, (0, now))
        self._quit = threading.Event()
        self._thread: threading.Thread | None = None
        if self._others:
            self._thread = threading.Thread(target=self._beat, name="roll call", daemon=True)
            self._thread.start()

    @classmethod
    def join(cls, ranks: Ranks, patience: float = PATIENCE_SECONDS, timeout: float = JOIN_SECONDS) -> RollCall:
        """Meet the other ranks at MASTER_ADDR:MASTER_PORT; the launcher's own store is used where there is one.

        Raises:
            RuntimeError: not all of them came within `timeout` seconds.
        """
        if ranks.world == 1:
            return cls(ranks, None, patience)
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        try:
            store, _, _ = next(
                rendezvous("env://", ranks.rank, ranks.world, timeout=datetime.timedelta(seconds=timeout))
            )
        except (RuntimeError, OSError) as error:
            raise RuntimeError(
                f"rank {ranks.rank}: not all {ranks.world} ranks met within {timeout:g} s: {_first_line(error)}"
            ) from error
        # A launcher's store outlives the ranks that it starts anew, with all that the dead ones wrote.
        return cls(ranks, dist.PrefixStore(f"attempt {ranks.attempt}", store), patience)

    # ---- while working

    def share(self, name: str, make: Callable[[], T]) -> T:
        """What rank 0's `make` returned, as JSON holds it, on every rank; the others do not call theirs.

        Raises:
            Whatever `make` raised, on rank 0; ValueError with the same text on the others. RuntimeError: rank 0 is gone.
        """
        if not self._others:
            return make()
        if self.ranks.rank == 0:
            try:
                value = make()
            except Exception as error:
                self._set(f"share/{name}", json.dumps({"error": str(error)}))
                raise
            self._set(f"share/{name}", json.dumps({"value": value}))
            return value
        while not self._has(f"share/{name}"):
            why = self._why_gone(0)
            if why is not None:
                raise RuntimeError(f"rank 0 {why}, before it said what to draw")
            time.sleep(0.02)
        answer = json.loads(self.store.get(f"share/{name}"))
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["value"]

    # ---- the end

    def finish(self, failure: str = "", stop: Callable[[], bool] = lambda: False) -> dict[int, str]:
        """Say that this rank has ended and wait until every other one has, or is gone.

        Args:
            failure: what went wrong here; empty: nothing. stop: True ends the waiting.

        Returns:
            rank -> what became of it, of the others that failed or are gone; also in `lost`.
        """
        if not self._others or self._ended:
            return self.lost
        self._set(f"end/{self.ranks.rank}", failure)
        self._ended = True
        waiting = set(self._others)
        while waiting and not stop():
            for rank in sorted(waiting):
                if self._has(f"end/{rank}"):
                    said = self._get(f"end/{rank}")
                    if said:
                        self.lost[rank] = f"failed: {said}"
                    waiting.discard(rank)
                else:
                    why = self._why_gone(rank)
                    if why is not None:
                        self.lost[rank] = why
                        waiting.discard(rank)
            time.sleep(0.02 if waiting else 0)
        self._set(f"left/{self.ranks.rank}", "")
        if self.ranks.rank == 0:
            self._host_until_others_left(stop)
        self.leave()
        return self.lost

    def leave(self) -> None:
        """Stop beating, without waiting for anyone."""
        self._quit.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def speaker(self) -> bool:
        """Whether this is the rank that reports for all: the lowest of those that are not lost."""
        return all(rank in self.lost for rank in range(self.ranks.rank))

    def __enter__(self) -> RollCall:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self.finish(_first_line(error) or type(error).__name__)
        self.leave()

    # ---- the store, which may vanish with the rank that keeps it

    def _beat(self) -> None:
        try:
            # A connection of its own: a call that waits on the other one must not hold the beats up.
            store = self.store.clone() if hasattr(self.store, "clone") else self.store
            while not self._quit.is_set():
                store.add(f"beat/{self.ranks.rank}", 1)
                for rank in self._others:
                    beats = int(store.add(f"beat/{rank}", 0))
                    if beats != self._heard[rank][0]:
                        self._heard[rank] = (beats, time.monotonic())
                self._quit.wait(BEAT_SECONDS)
        except (RuntimeError, OSError):
            self._store_gone = True

    def _why_gone(self, rank: int) -> str | None:
        if self._store_gone:
            return "is gone, or out of reach: the store of the ranks does not answer"
        silent = time.monotonic() - self._heard[rank][1]
        return f"is gone: not heard of for {silent:.0f} s" if silent > self.patience else None

    def _host_until_others_left(self, stop: Callable[[], bool]) -> None:
        """The store ends with the rank that keeps it, so that one goes last; what it waits for takes no time."""
        until = time.monotonic() + self.patience
        left = [rank for rank in self._others if self.lost.get(rank, "failed").startswith("failed")]
        while left and time.monotonic() < until and not stop() and not self._store_gone:
            left = [rank for rank in left if not self._has(f"left/{rank}")]
            time.sleep(0.02)

    def _set(self, key: str, value: str) -> None:
        self._ask(lambda: self.store.set(key, value), None)

    def _has(self, key: str) -> bool:
        return bool(self._ask(lambda: self.store.check([key]), False))

    def _get(self, key: str) -> str:
        return bytes(self._ask(lambda: self.store.get(key), b"")).decode("utf-8", "replace")

    def _ask(self, call: Callable[[], Any], otherwise: Any) -> Any:
        if not self._store_gone:
            try:
                return call()
            except (RuntimeError, OSError):
                self._store_gone = True
        return otherwise


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


# ---- the two branches of guidance on two ranks


@contextlib.contextmanager
def guidance_group(roll: RollCall, device: torch.device, timeout: float = GROUP_SECONDS) -> Iterator[Any]:
    """The process group that `sample_guided` exchanges through while the block runs: NCCL on GPUs, gloo on CPUs.

    Args:
        roll: of two ranks. timeout: seconds that an evaluation of the other branch may take.

    Raises:
        ValueError: other than two ranks.
    """
    import torch.distributed as dist

    ranks = roll.ranks
    if ranks.world != 2:
        raise ValueError(f"guidance-parallel: expected 2 ranks, one for each branch, got {ranks.world}")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("guidance", roll.store),
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
    from .schedule import StepPlan

    if config.skip_unit_guidance:
        raise ValueError(
            "FlashUConfig.skip_unit_guidance: expected False under guidance-parallel, where the unconditional branch is "
            "another rank's, got True"
        )
    if any(step.measure for step in StepPlan.build(config, steps, layers, None, tokens).steps):
        raise ValueError(
            "FlashUConfig.layer_skip_ratio: expected 0 under guidance-parallel, as layers are chosen by a mean over the rows "
            f"of both branches, got {config.layer_skip_ratio!r}"
        )
    if steps is not None and config.approximates and steps != (config.steps or _default_steps()):
        raise ValueError(
            f"steps: expected None or {config.steps or _default_steps()}, which the model was accelerated for "
            f"(FlashUConfig.steps), got {steps}"
        )


def _default_steps() -> int:
    from .showo2.sampling import DEFAULT_STEPS

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
    from .runtime import find_runner
    from .showo2 import validate
    from .showo2.sampling import time_grid

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
    from .showo2 import validate

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
                f"rank {1 - self.rank} is gone, it does not answer in guidance-parallel: {_first_line(error)}"
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
