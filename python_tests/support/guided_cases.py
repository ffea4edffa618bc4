"""The images of the tests of guidance-parallel: on two ranks (this file as a program), or on one process."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import flashu_ext as fx
from flashu_ext.nano.evaluate import make_noise
from flashu_ext.nano.model import load_model, load_plan
from flashu_ext.nano.subject import PRUNE_MULTIPLE
from flashu_ext.nano.tokenizer import layout

STEPS = 6
SCALE = 2.5
PROMPTS = ["a red circle", "a green square to the left of a blue triangle"]

CONFIGS: dict[str, fx.FlashUConfig | None] = {
    "dense": None,
    "exact": fx.FlashUConfig.exact(steps=STEPS),
    "plain torch": fx.FlashUConfig.exact(steps=STEPS, ffn_kernels=False, norm_kernels=False, step_kernels=False),
    "neurons, cached head, guidance": fx.FlashUConfig.paper(
        steps=STEPS, prune_multiple=PRUNE_MULTIPLE, layer_skip_ratio=0.0, head_cache_interval=2
    ),
    "forecast head, shared encoder": fx.FlashUConfig(
        steps=STEPS, head_cache_interval=2, head_forecast_order=1, encoder_cache=True
    ),
    "tokens": fx.FlashUConfig(steps=STEPS, token_skip=True, token_skip_ratio=0.2, token_skip_interval=2),
    "adaptive": fx.FlashUConfig(steps=STEPS, adaptive_cache=True, adaptive_cache_budget=0.3),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [(name, "fp32") for name in CONFIGS] + [("dense", "bf16"), ("exact", "bf16")]


@contextlib.contextmanager
def model_of(name: str, dtype: torch.dtype) -> Any:
    model, config = load_model(), CONFIGS[name]
    plan = load_plan(model, config=config) if config is not None and config.ffn_prune_ratio else None
    model = model.to(dtype)
    with fx.accelerate(model, config, plan) if config is not None else contextlib.nullcontext():
        yield model


def generate(sampler: Callable[..., Any], name: str, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor]:
    """Latents and guided velocities of a case."""
    inputs = layout().generation(PROMPTS)
    arguments = {"steps": STEPS, "guidance_scale": SCALE, "return_velocity": True} | options
    with model_of(name, dtype) as model:
        return sampler(model, make_noise(len(PROMPTS), 3), **vars(inputs), **arguments)


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def main(out: Path) -> None:
    """On each rank: runs every case, and the refusals before and between them."""
    from flashu_ext.batch import Heartbeat, Ranks, guidance_group, sample_guided

    ranks = Ranks.from_environment()
    errors = {"no group": refused(partial(generate, sample_guided, "dense", torch.float32))}
    tensors: dict[str, Tensor] = {}
    with Heartbeat.join(ranks) as heartbeat, guidance_group(heartbeat, torch.device("cpu"), timeout=60) as group:
        sampler = partial(sample_guided, group=group)
        for what, options in (
            ("one branch", {"guidance_scale": 0}),
            ("one step", {"steps": 1}),
            ("other arguments", {"guidance_scale": 2.0 + ranks.rank}),
        ):
            errors[what] = refused(partial(generate, sampler, "exact", torch.float32, **options))
        errors["other steps"] = refused(partial(generate, sampler, "tokens", torch.float32, steps=STEPS + 1))
        for name, dtype in CASES:
            seen: list[int] = []
            watch = {"callback": lambda step, latents, seen=seen: seen.append(step)}
            latents, velocities = generate(sampler, name, DTYPES[dtype], **watch)
            assert seen == list(range(1, STEPS))
            tensors |= {f"{name} {dtype} latents": latents, f"{name} {dtype} velocities": velocities}
        tensors["exact, 3 steps"] = generate(sampler, "exact", torch.float32, steps=3)[0]
        heartbeat.finish()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / f"{ranks.rank}.safetensors")
    (out / f"{ranks.rank}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
