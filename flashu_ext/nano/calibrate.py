"""Makes the shipped task plan: FFN neuron scores of the embedded model for generation and understanding."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import click
import torch

from ..calibration.calibrate import calibrate
from . import codec
from .model import load_model
from .subject import DATA, PRUNE_MULTIPLE, subject, subject_of
from .world import Scene, captions, questions, render, scenes

__all__ = ["SAMPLES", "samples"]

SAMPLES = 40
"""Images, and questions, from which the shipped plan is made."""


def _latents(scene: Scene, rng: random.Random) -> torch.Tensor:
    return codec.encode(codec.to_unit(render(scene, rng)[None]))


def samples(count: int, seed: int, family: str = "showo2") -> tuple[list[Any], list[Any]]:
    """`count` images and `count` questions with answers, from training scenes, as samples of a family.

    Raises:
        ValueError: more than there are training scenes.
    """
    rng = random.Random(seed)
    own = subject(family)
    generation, understanding = [], []
    everything = scenes(held_out=False)
    if count > len(everything):
        raise ValueError(f"count: expected at most {len(everything)} training scenes, got {count}")
    for scene in rng.sample(everything, count):
        prompt = rng.choice(captions(scene))
        generation.append(own.generation_sample(_latents(scene, rng), prompt))
        question = rng.choice(questions(scene, rng))
        understanding.append(own.understanding_sample(_latents(scene, rng), question))
    return generation, understanding


@click.command(epilog="Example: python -m flashu_ext.nano.calibrate --model nano_run/model")
@click.option(
    "--model",
    "directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=DATA,
    help="Checkpoint folder; the plan is written into it. Default: the shipped one.",
)
@click.option(
    "--samples",
    "count",
    default=SAMPLES,
    show_default=True,
    type=click.IntRange(1, 200),
    help="Images, and questions.",
)
@click.option(
    "--ratio",
    default=0.2,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Fraction of neurons to prune.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
def main(directory: Path, count: int, ratio: float, seed: int) -> None:
    """Score the neurons of a model in training and write plan.safetensors beside its weights.

    `flashu-ext calibrate nano` does the same for the shipped model, with every setting.
    """
    model = load_model(directory)
    given = samples(count, seed, subject_of(model).family)
    plan = calibrate(model, *given, ratio=ratio, multiple=PRUNE_MULTIPLE, seed=seed)
    plan.save(directory / "plan.safetensors")
    click.echo(f"{directory / 'plan.safetensors'}\n{plan.describe()}")


if __name__ == "__main__":
    main()
