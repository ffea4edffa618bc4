"""Measures the embedded model on held-out scenes: prompt adherence and answer accuracy, dense and per preset."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import click
import torch
from torch import Tensor

from ..planning.config import PRESETS
from ..planning.intervals import wilson
from . import codec
from .judge import judge
from .subject import DATA, subject_of
from .world import Question, Scene, captions, questions, render, scenes

__all__ = ["Proportion", "answer", "generate", "make_noise", "measure_answers", "measure_images"]


@dataclass(frozen=True)
class Proportion:
    """Correct ones of n, with Wilson's 95 % interval."""

    right: int
    n: int

    @property
    def value(self) -> float:
        return self.right / self.n if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.value, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({self.right}/{self.n}, 95 % {100 * low:.1f} to {100 * high:.1f})"


def make_noise(count: int, seed: int) -> Tensor:
    """Noise of `count` images, fp32 [count, 16, 72, 2] on the CPU; the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(count, *codec.LATENT_SHAPE, generator=generator, dtype=torch.float32, device="cpu")


def generate(
    model: Any,
    prompts: Sequence[str],
    noise: Tensor,
    steps: int | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Generate one image per prompt, in one batch: final latents [B, 16, 72, 2].

    Args:
        noise: [B, 16, 72, 2].
        steps: grid points if the config has none.
        callback: as for `showo2.sample`.
    """
    return subject_of(model).generate(model, prompts, noise, steps, callback)


def measure_images(
    model: Any, among: Sequence[Scene], n: int, steps: int | None = None, seed: int = 0, batch: int = 20
) -> Proportion:
    """Generate and judge images for `n` captions of scenes from `among`, in turn."""
    rng = random.Random(seed)
    order = [among[i % len(among)] for i in range(n)]
    right = 0
    for start in range(0, n, batch):
        chosen = order[start : start + batch]
        prompts = [rng.choice(captions(scene)) for scene in chosen]
        images = codec.pictures(generate(model, prompts, make_noise(len(chosen), seed * 7919 + start), steps))
        right += sum(judge(image, scene).right for image, scene in zip(images, chosen, strict=True))
    return Proportion(right, n)


def answer(model: Any, latents: Tensor, question: Question) -> tuple[str, list[int]]:
    """The model's answer to a question about latents [1, 16, 72, 2], as text and as token ids."""
    return subject_of(model).answer(model, latents, question)


def measure_answers(model: Any, among: Sequence[Scene], n: int, seed: int = 0) -> dict[str, Proportion]:
    """Ask about freshly rendered scenes until `n` questions are asked; proportions by kind, and 'all'."""
    rng = random.Random(seed)
    counts: dict[str, list[int]] = {}
    asked = index = 0
    while asked < n:
        scene = among[index % len(among)]
        index += 1
        latents = codec.encode(codec.to_unit(render(scene, rng)[None]))
        for question in questions(scene, rng):
            right = answer(model, latents, question)[0] == question.answer
            counts.setdefault(question.kind, [0, 0])
            counts[question.kind][0] += right
            counts[question.kind][1] += 1
            asked += 1
    total = Proportion(sum(r for r, _ in counts.values()), sum(m for _, m in counts.values()))
    return {**{kind: Proportion(*count) for kind, count in sorted(counts.items())}, "all": total}


@click.command(
    epilog="Example: python -m flashu_ext.nano.evaluate --preset dense --preset paper --n 200 --json result.json"
)
@click.option(
    "--preset", "presets", type=click.Choice(PRESETS), multiple=True, default=PRESETS, help="May be repeated."
)
@click.option("--n", default=200, show_default=True, help="Images of each kind, and questions.")
@click.option("--seed", default=0, show_default=True)
@click.option("--steps", type=int, default=None, help="Grid points; default 50, and the preset's own for paper.")
@click.option(
    "--model",
    "directory",
    type=click.Path(exists=True, file_okay=False),
    default=None,
    help="Checkpoint; default: the shipped one.",
)
@click.option("--split", type=click.Choice(["held-out", "training"]), default="held-out", show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), default=None, help="Also write the numbers here.")
def main(
    presets: tuple[str, ...],
    n: int,
    seed: int,
    steps: int | None,
    directory: str | None,
    split: str,
    json_path: str | None,
) -> None:
    """Measure prompt adherence and answer accuracy on scenes the model was not trained on."""
    from pathlib import Path

    from ..ops.machine import command_line, facts
    from ..runtime.handle import accelerate
    from .model import load_model, load_plan

    folder = Path(directory) if directory else DATA
    model = load_model(folder)
    held_out = split == "held-out"
    results: dict[str, Any] = {}
    for name in presets:
        config = subject_of(model).preset_config(name, steps)
        plan = load_plan(model, folder, config) if config is not None else None
        began = time.time()
        with accelerate(model, config, plan) if config is not None else nullcontext():
            rows = {
                "one object": measure_images(model, scenes(held_out, 1), n, steps, seed),
                "two objects": measure_images(model, scenes(held_out, 2), n, steps, seed),
                **{
                    f"answers: {kind}": share
                    for kind, share in measure_answers(model, scenes(held_out), n, seed).items()
                },
            }
        click.echo(f"{name} ({time.time() - began:.0f} s)")
        for row, share in rows.items():
            click.echo(f"  {row:20} {share}")
        results[name] = {row: {**asdict(share), "interval": share.interval} for row, share in rows.items()}
    if json_path:
        record = {"command": command_line(), "machine": facts(), "split": split, "seed": seed, "presets": results}
        Path(json_path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
