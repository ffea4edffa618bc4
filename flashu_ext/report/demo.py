"""Room: report. The demo's run: draws and answers held-out scenes under every preset, and times both."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bench import machine
from ..config import FlashUConfig
from ..nano import codec
from ..nano.evaluate import GUIDANCE, PRESETS, SHIFT, Share, preset_config, to_images
from ..nano.judge import judge
from ..nano.model import load_model, load_plan
from ..nano.tokenizer import layout
from ..nano.world import Question, Scene, captions, questions, render, scenes
from ..plan import TaskPlan
from ..schedule import StepPlan
from ..showo2.sampling import sample
from ..showo2.understanding import answer_tokens
from ..swap import accelerate
from .result import Answer, DemoResult, Drawing, PresetResult

__all__ = ["run"]

BATCH = 24
SHOWN_DRAWINGS = 12
SHOWN_ANSWERS = 12
NEW_TOKENS = 4


@dataclass(frozen=True)
class _Task:
    """What is drawn and asked, the same for every preset."""

    scenes: list[Scene]
    prompts: list[str]
    noise: Tensor
    pictures: list[np.ndarray]
    picture_latents: list[Tensor]
    asked: list[tuple[int, Question]]


@dataclass
class _Outputs:
    """What one preset made of a task."""

    latents: Tensor
    images: np.ndarray
    answers: list[str]
    tokens: list[list[int]]


def run(seed: int = 0, images: int = 48, questions: int = 96, repeats: int = 5) -> DemoResult:
    """Run the demo on the embedded model.

    Args:
        seed: of noise, wordings and the choice of scenes. images: prompts drawn per preset.
        questions: asked per preset. repeats: timed rounds, one image and one answer each.

    Raises:
        FileNotFoundError: the package was installed without the model's data.
    """
    began = time.perf_counter()
    model = load_model()
    plan = load_plan(model)
    task = _task(seed, images, questions)
    outputs: dict[str, _Outputs] = {}
    results: dict[str, PresetResult] = {}
    with _progress(len(PRESETS) * (images + questions) + repeats * len(PRESETS)) as advance:
        for preset in PRESETS:
            with _accelerated(model, preset, plan) as handle:
                outputs[preset] = _perform(model, task, advance)
                summary = str(handle.summary()) if handle is not None else ""
            results[preset] = _judged(preset, task, outputs, summary)
        for index in range(repeats):
            for preset in PRESETS:
                with _accelerated(model, preset, plan):
                    _time(model, task, index, results[preset])
                advance(1)
    return DemoResult(
        model=f"nano ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters)",
        command=machine.command_line(),
        machine=machine.facts(),
        seconds=time.perf_counter() - began,
        presets=list(results.values()),
        drawings=_drawings(task, outputs),
        answers=_answers(task, outputs),
    )


def _task(seed: int, images: int, asked: int) -> _Task:
    rng = random.Random(seed)
    # Half of each kind: one object, and two with a relation.
    one, two = (rng.sample(pool, len(pool)) for pool in (scenes(True, 1), scenes(True, 2)))
    chosen = [(two if i % 2 else one)[i // 2 % len(two if i % 2 else one)] for i in range(images)]
    generator = torch.Generator().manual_seed(seed)
    pictures: list[np.ndarray] = []
    latents: list[Tensor] = []
    queue: list[tuple[int, Question]] = []
    while len(queue) < asked:
        scene = (two if len(pictures) % 3 else one)[len(pictures) % len(one)]
        picture = render(scene, rng)
        latents.append(codec.encode(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1))
        queue += [(len(pictures), question) for question in questions(scene, rng)]
        pictures.append(picture)
    return _Task(
        scenes=chosen,
        prompts=[rng.choice(captions(scene)) for scene in chosen],
        noise=torch.randn(images, *codec.LATENT_SHAPE, generator=generator),
        pictures=pictures,
        picture_latents=latents,
        asked=queue[:asked],
    )


@contextmanager
def _accelerated(model: Any, preset: str, plan: TaskPlan) -> Iterator[Any]:
    """The model under a preset; a fresh handle, so that nothing is kept from an earlier round."""
    config = preset_config(preset)
    if config is None:
        yield None
        return
    with accelerate(model, config, plan if config.ffn_prune_ratio > 0 else None) as handle:
        yield handle


def _draw(model: Any, prompts: list[str], noise: Tensor) -> Tensor:
    rows = layout().generation(prompts)
    return sample(model, noise, **vars(rows), guidance_scale=GUIDANCE, time_shifting_factor=SHIFT)


def _ask(model: Any, latents: Tensor, question: Question) -> tuple[str, list[int]]:
    words = layout()
    before, after = words.question(question.text)
    tokens = answer_tokens(model, latents, before, after, max_new_tokens=NEW_TOKENS, eos_token=words.eos)
    return words.answer(tokens), tokens.tolist()


def _perform(model: Any, task: _Task, advance: Any) -> _Outputs:
    drawn = []
    for start in range(0, len(task.prompts), BATCH):
        prompts = task.prompts[start : start + BATCH]
        drawn.append(_draw(model, prompts, task.noise[start : start + BATCH]))
        advance(len(prompts))
    latents = torch.cat(drawn)
    answers, tokens = [], []
    for picture, question in task.asked:
        text, ids = _ask(model, task.picture_latents[picture], question)
        answers.append(text)
        tokens.append(ids)
        advance(1)
    return _Outputs(latents, to_images(latents), answers, tokens)


def _time(model: Any, task: _Task, index: int, result: PresetResult) -> None:
    """One image and one answer, alone; round `index` has the same prompt and question under every preset."""
    pick = index % len(task.prompts)
    picture, question = task.asked[index % len(task.asked)]
    start = time.perf_counter()
    _draw(model, task.prompts[pick : pick + 1], task.noise[pick : pick + 1])
    result.image_seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    _ask(model, task.picture_latents[picture], question)
    result.answer_seconds.append(time.perf_counter() - start)


def _judged(preset: str, task: _Task, outputs: dict[str, _Outputs], summary: str) -> PresetResult:
    own, dense = outputs[preset], outputs[PRESETS[0]]
    config = preset_config(preset)
    steps = StepPlan.build(config if config is not None else FlashUConfig.exact(), None, None)
    verdicts = [judge(image, scene).right for image, scene in zip(own.images, task.scenes, strict=True)]
    answers = [text == question.answer for text, (_, question) in zip(own.answers, task.asked, strict=True)]
    equal = [a == b for a, b in zip(own.tokens, dense.tokens, strict=True)]
    exact = config is not None and not config.approximates
    return PresetResult(
        name=preset,
        grid_points=steps.grid_points,
        kinds=[step.kind for step in steps.steps],
        backbone=steps.backbone_evaluations,
        head=steps.head_evaluations,
        adherence=Share(sum(verdicts), len(verdicts)),
        accuracy=Share(sum(answers), len(answers)),
        equal_answers=Share(sum(equal), len(equal)),
        max_difference=float((own.latents - dense.latents).abs().max()) if exact else None,
        psnr=None if preset == PRESETS[0] else _psnr(own.images, dense.images),
        summary=summary,
    )


def _psnr(images: np.ndarray, others: np.ndarray) -> float | None:
    """Mean PSNR in dB over images that differ at all; None where none does."""
    errors = ((images.astype(np.float64) - others.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    errors = errors[errors > 0]
    return float((10 * np.log10(255**2 / errors)).mean()) if errors.size else None


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _drawings(task: _Task, outputs: dict[str, _Outputs]) -> list[Drawing]:
    return [
        Drawing(
            task.prompts[i],
            {preset: _png(own.images[i]) for preset, own in outputs.items()},
            {preset: judge(own.images[i], task.scenes[i]).right for preset, own in outputs.items()},
        )
        for i in range(min(SHOWN_DRAWINGS, len(task.prompts)))
    ]


def _answers(task: _Task, outputs: dict[str, _Outputs]) -> list[Answer]:
    # Spread over all questions, so that every kind and many images are seen.
    count = min(SHOWN_ANSWERS, len(task.asked))
    shown = [i * len(task.asked) // count for i in range(count)]
    return [
        Answer(
            _png(task.pictures[task.asked[i][0]]),
            task.asked[i][1].text,
            task.asked[i][1].answer,
            {preset: own.answers[i] for preset, own in outputs.items()},
        )
        for i in shown
    ]


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda count: None
        return
    with tqdm(total=total, leave=False, desc="demo", bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}") as bar:
        yield bar.update
