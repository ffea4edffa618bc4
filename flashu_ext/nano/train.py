"""Trains the embedded model: flow matching on images and next tokens on answers, seeded and resumable.

Every step's data, noise and times come from a generator seeded by (seed, step), so a resumed run equals an
uninterrupted one.
"""

from __future__ import annotations

import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..planning.safe_files import atomic_path
from . import codec
from .subject import FAMILIES, subject
from .tokenizer import write_tokenizer
from .world import Question, Scene, captions, crowded_scene, description, questions, render, scenes

__all__ = ["Settings", "Trainer"]

NULL_SHARE = 0.1
VARIANTS = 24
LOOSE_VARIANTS = 64
MATRICES = ("layers.", "blocks.", "diffusion_head_a")
"""In the names of the hidden matrices, which Muon trains."""
CROWDED = 12_000
"""Renderings of every training scene, for generation and for answers; and scenes of three objects."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one mixture and one learning-rate cycle (warm-up, then a cosine down to 2 %).

    Attributes:
        drawings, answers: samples per step.
        answer_weight: weight of the answers' loss; that of the images is 1.
        averaging: decay of the averaged weights, which are the result.
        described: fraction of questions about the whole scene, if scenes are varied.
        focused: fraction of the others that are of the kinds in `focus`, in addition to their natural fraction.
        varied: questions are asked about loosely rendered scenes and crowded ones (see `world`), not about the generated ones.
    """

    steps: int
    drawings: int
    answers: int
    answer_weight: float
    varied: bool
    averaging: float
    described: float = 0.4
    focus: tuple[str, ...] = ()
    focused: float = 0.0


PHASES = (
    Phase(2000, 48, 32, 0.5, False, 0.9985),
    Phase(1200, 10, 96, 1.0, True, 0.995, described=0.4),
    Phase(600, 10, 112, 1.0, True, 0.99, described=0.1, focus=("relation", "yes/no"), focused=0.6),
    Phase(320, 10, 112, 1.0, True, 0.98, described=0.2, focus=("color", "yes/no"), focused=0.6),
)
"""Generation is learned first; answering starts from its features."""


@dataclass(frozen=True)
class Settings:
    """What a run is; a checkpoint of other settings is not resumed.

    Attributes:
        family: of the model, one of `subject.FAMILIES`.
        phases: how many of PHASES are run.
    """

    family: str = "showo2"
    phases: int = len(PHASES)
    muon_lr: float = 0.015
    adam_lr: float = 2e-3
    warmup: int = 100
    seed: int = 0

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in PHASES[: self.phases])

    def phase(self, index: int) -> tuple[Phase, int]:
        """The phase of step `index`, and the step's number in it."""
        for phase in PHASES[: self.phases]:
            if index < phase.steps:
                return phase, index
            index -= phase.steps
        raise IndexError(f"step: expected a number below {self.steps}")


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised by Newton-Schulz iterations (Jordan et al. 2024), in fp32.

    torch.optim.Muon iterates in bf16, which takes 2.6 s a step for this model on a CPU without bf16 units; in fp32 it takes
    a twentieth of that. It learns this task in fewer steps than Adam.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:  # in the checkpoint, but never run
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                buffer = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = _orthogonal(parameter.grad.lerp(buffer, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5)


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: five quintic Newton-Schulz iterations."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Data:
    """The training scenes, rendered and encoded once: all of one or two objects, and many of three for answers."""

    def __init__(self, seed: int):
        rng = random.Random(seed)
        self.scenes = scenes(held_out=False)
        singles = [i for i, scene in enumerate(self.scenes) if len(scene.objects) == 1]
        pairs = [i for i, scene in enumerate(self.scenes) if len(scene.objects) == 2]
        self.groups = (singles, pairs)
        self.latents = _rendered(self.scenes, rng, VARIANTS, loose=False)
        self.loose = _rendered(self.scenes, rng, LOOSE_VARIANTS, loose=True)
        self.crowds = [crowded_scene(rng) for _ in range(CROWDED)]
        self.crowded = _rendered(self.crowds, rng, 1, loose=True)

    def sample(self, rng: random.Random, count: int) -> tuple[list[Scene], Tensor]:
        """`count` scenes to generate, two in five with one object, and their latents [count, ...]."""
        index = [rng.choice(self.groups[0 if rng.random() < 0.4 else 1]) for _ in range(count)]
        return [self.scenes[i] for i in index], self.latents[index, [rng.randrange(VARIANTS) for _ in index]]

    def ask(self, rng: random.Random, count: int) -> tuple[list[Scene], Tensor]:
        """`count` scenes to ask about, half of them of three objects, and their latents [count, ...]."""
        crowds = rng.sample(range(CROWDED), count // 2)
        index = [rng.choice(self.groups[0 if rng.random() < 0.4 else 1]) for _ in range(count - len(crowds))]
        chosen = [self.scenes[i] for i in index] + [self.crowds[i] for i in crowds]
        loose = self.loose[index, [rng.randrange(LOOSE_VARIANTS) for _ in index]]
        return chosen, torch.cat([loose, self.crowded[crowds, 0]])


def _rendered(among: list[Scene], rng: random.Random, variants: int, loose: bool) -> Tensor:
    """Latents [scenes, variants, ...]."""
    images = np.stack([render(scene, rng, loose) for scene in among for _ in range(variants)])
    codes = codec.encode(codec.to_unit(images))
    return codes.unflatten(0, (len(among), variants))


def _question(scene: Scene, phase: Phase, rng: random.Random) -> Question:
    if phase.varied and rng.random() < phase.described:
        return description(scene)
    possible = questions(scene, rng)
    if phase.focus and rng.random() < phase.focused:
        possible = [question for question in possible if question.kind in phase.focus]
    return rng.choice(possible)


class Trainer:
    """Model, optimisers and averaged weights; `step(i)` trains on batch i."""

    def __init__(self, settings: Settings, data: Data, device: torch.device):
        torch.manual_seed(settings.seed)
        self.settings, self.data, self.device = settings, data, device
        self.subject = subject(settings.family)
        self.model: Any = self.subject.build().to(device).train()
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            hidden = parameter.dim() == 2 and any(part in name for part in MATRICES)
            (matrices if hidden else others).append(parameter)
        self.muon = Muon(matrices, settings.muon_lr)
        self.adam = torch.optim.AdamW(others, lr=settings.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)

    # ---- batches

    def _image_loss(self, count: int, rng: random.Random, generator: torch.Generator) -> Tensor:
        chosen, target = self.data.sample(rng, count)
        prompts = [rng.choice(captions(scene)) for scene in chosen]
        null = torch.tensor([rng.random() < NULL_SHARE for _ in prompts], device=self.device)
        target = target.to(self.device)
        noise = torch.randn(target.shape, generator=generator).to(self.device)
        t = torch.sigmoid(torch.randn(len(prompts), generator=generator) * 1.2 - 0.3).to(self.device)
        mixed = t[:, None, None, None] * target + (1 - t[:, None, None, None]) * noise
        return F.mse_loss(self.subject.velocity(self.model, prompts, null, mixed, t), target - noise)

    def _answer_loss(self, phase: Phase, rng: random.Random) -> Tensor:
        among = self.data.ask if phase.varied else self.data.sample
        chosen, latents = among(rng, phase.answers)
        asked = [_question(scene, phase, rng) for scene in chosen]
        return F.cross_entropy(*self.subject.answered(self.model, latents.to(self.device), asked))

    def step(self, index: int) -> tuple[float, float]:
        """Train on batch `index`: (flow loss, answer loss)."""
        rng = random.Random(self.settings.seed * 1_000_003 + index)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + index)
        phase, number = self.settings.phase(index)
        warm = min(1.0, (number + 1) / self.settings.warmup)
        rate = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * number / phase.steps)))
        for optimiser, base in ((self.muon, self.settings.muon_lr), (self.adam, self.settings.adam_lr)):
            for group in optimiser.param_groups:
                group["lr"] = base * rate
            optimiser.zero_grad(set_to_none=True)
        flow = self._image_loss(phase.drawings, rng, generator)
        flow.backward()
        answer = self._answer_loss(phase, rng)
        (phase.answer_weight * answer).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step()
        self.adam.step()
        decay = min(phase.averaging, (index + 1) / (index + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.model.parameters()], 1 - decay)
        return float(flow.detach()), float(answer.detach())

    # ---- files

    def averaged(self) -> Any:
        """The model with averaged weights, in eval mode; shares nothing with the one being trained."""
        model = self.subject.build()
        model.load_state_dict({name: value.cpu() for name, value in self.average.items()}, strict=True)
        return model.eval()

    def save(self, path: Path, step: int) -> None:
        state = {
            "step": step,
            "settings": dict(vars(self.settings)),
            "model": {name: p.detach() for name, p in self.model.named_parameters()},
            "average": self.average,
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
        }
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    def resume(self, path: Path) -> int:
        """Load a run in progress and return the next step.

        Raises:
            ValueError: the file belongs to a run of other settings.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["settings"] != dict(vars(self.settings)):
            raise ValueError(f"{path}: a run of other settings: {state['settings']}; remove it or give the same ones")
        self.model.load_state_dict(state["model"], strict=True)
        self.average = state["average"]
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        return int(state["step"])


@click.command(epilog="Example: python -m flashu_ext.nano.train --out nano_run")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("nano_run"), help="Folder of the run and its result."
)
@click.option("--family", type=click.Choice(FAMILIES), default=Settings.family, show_default=True, help="Of the model.")
@click.option(
    "--phases",
    default=Settings.phases,
    show_default=True,
    type=click.IntRange(1, len(PHASES)),
    help="Phases of training to run.",
)
@click.option("--muon-lr", default=Settings.muon_lr, show_default=True)
@click.option("--adam-lr", default=Settings.adam_lr, show_default=True)
@click.option("--seed", default=Settings.seed, show_default=True)
@click.option("--save-every", default=250, show_default=True, help="Steps between saves of the run.")
@click.option("--check-every", default=1000, show_default=True, help="Steps between measurements on training scenes.")
def main(out: Path, save_every: int, check_every: int, **settings: Any) -> None:
    """Train the embedded model and write a checkpoint directory (bf16) to OUT/model. Resumes an interrupted run."""
    from tqdm import tqdm

    from .evaluate import measure_answers, measure_images
    from .tokenizer import FILE

    if not FILE.is_file():
        write_tokenizer()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(Settings(**settings), Data(settings["seed"]), device)
    steps = trainer.settings.steps
    run = out / "run.pt"
    first = trainer.resume(run) if run.is_file() else 0
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters:,} parameters, steps {first} to {steps} on {device}", file=sys.stderr)
    began = time.time()
    flow_average, answer_average = 0.0, 0.0
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="train", mininterval=5)
    for index in bar:
        flow, answer = trainer.step(index)
        weight = min(0.99, (index - first) / (index - first + 1))
        flow_average = weight * flow_average + (1 - weight) * flow
        answer_average = weight * answer_average + (1 - weight) * answer
        if (index + 1) % save_every == 0:
            bar.set_postfix(flow=f"{flow_average:.4f}", answer=f"{answer_average:.4f}")
            trainer.save(run, index + 1)
        if (index + 1) % check_every == 0:
            model = trainer.averaged()
            drawn = measure_images(model, scenes(held_out=False), 60, steps=25, seed=index)
            answered = measure_answers(model, scenes(held_out=False), 100, seed=index)["all"]
            took = f"({time.time() - began:.0f} s)"
            tqdm.write(
                f"step {index + 1}: flow {flow_average:.4f} answer {answer_average:.4f} drawn {drawn} answered {answered} {took}"
            )
    trainer.save(run, steps)
    trainer.averaged().to(torch.bfloat16).save_pretrained(out / "model")
    print(f"wrote {out / 'model'}", file=sys.stderr)


if __name__ == "__main__":
    main()
