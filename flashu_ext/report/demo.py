"""Runs the demo: images and answers of held-out scenes under every preset, with times."""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..nano.model import load_model, load_plan
from ..nano.probe import Outputs, Probe
from ..nano.subject import Subject, subject
from ..ops import machine
from ..planning.config import PRESETS, FlashUConfig
from ..planning.extras import extra
from ..planning.schedule import StepPlan
from ..studies.comparison import equal_proportion, running, time_round
from ..studies.fidelity import psnr
from .result import Answer, DemoResult, Drawing, PresetResult

__all__ = ["run"]

SHOWN_DRAWINGS = 12
SHOWN_ANSWERS = 12


def run(seed: int = 0, images: int = 48, questions: int = 96, repeats: int = 5, family: str = "showo2") -> DemoResult:
    """Run the demo on an embedded model.

    Args:
        seed: of noise, wordings and the choice of scenes.
        images: prompts per preset.
        questions: asked per preset.
        repeats: timed rounds, one image and one answer each.
        family: of the model, one of `nano.subject.FAMILIES`.

    Raises:
        FileNotFoundError: the package was installed without the model's data.
    """
    began = time.perf_counter()
    own = subject(family)
    model = load_model(own.folder)
    plan = load_plan(model, own.folder)
    probe = Probe.build(images, questions, seed)
    outputs: dict[str, Outputs] = {}
    results: dict[str, PresetResult] = {}
    with _progress(len(PRESETS) * (images + questions) + repeats * len(PRESETS)) as advance:
        for preset in PRESETS:
            with running(model, own.preset_config(preset), plan) as handle:
                outputs[preset] = probe.perform(model, advance)
                summary = str(handle.summary()) if handle is not None else ""
            results[preset] = _judged(own, preset, probe, outputs, summary)
        for index in range(repeats):
            for preset in PRESETS:
                with running(model, own.preset_config(preset), plan):
                    time_round(model, probe, index, results[preset])
                advance(1)
    return DemoResult(
        model=f"nano, {family} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters)",
        command=machine.command_line(),
        machine=machine.facts(),
        seconds=time.perf_counter() - began,
        presets=list(results.values()),
        drawings=_drawings(probe, outputs),
        answers=_answers(probe, outputs),
    )


def _judged(of: Subject, preset: str, probe: Probe, outputs: dict[str, Outputs], summary: str) -> PresetResult:
    own, dense = outputs[preset], outputs[PRESETS[0]]
    config = of.preset_config(preset)
    steps = StepPlan.build(config if config is not None else FlashUConfig.exact(), None, None)
    exact = config is not None and not config.approximates
    return PresetResult(
        name=preset,
        grid_points=steps.grid_points,
        kinds=[step.kind for step in steps.steps],
        backbone=steps.backbone_evaluations,
        head=steps.head_evaluations,
        adherence=probe.adherence(own),
        accuracy=probe.accuracy(own),
        equal_answers=equal_proportion(own, dense),
        max_difference=float((own.latents - dense.latents).abs().max()) if exact else None,
        psnr=None if preset == PRESETS[0] else _psnr(own.images, dense.images),
        summary=summary,
    )


def _psnr(images: np.ndarray, others: np.ndarray) -> float | None:
    """Mean PSNR in dB over images that differ at all; None where none does."""
    differing = [value for value in psnr(images, others) if math.isfinite(value)]
    return statistics.fmean(differing) if differing else None


def _png(image: np.ndarray) -> bytes:
    with extra("report"):
        from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _drawings(probe: Probe, outputs: dict[str, Outputs]) -> list[Drawing]:
    verdicts = {preset: probe.verdicts(own) for preset, own in outputs.items()}
    return [
        Drawing(
            probe.prompts[i],
            {preset: _png(own.images[i]) for preset, own in outputs.items()},
            {preset: judged[i].right for preset, judged in verdicts.items()},
            {preset: judged[i].reason for preset, judged in verdicts.items()},
        )
        for i in range(min(SHOWN_DRAWINGS, len(probe.prompts)))
    ]


def _answers(probe: Probe, outputs: dict[str, Outputs]) -> list[Answer]:
    # Spread over all questions, so that every kind and many images are shown.
    count = min(SHOWN_ANSWERS, len(probe.asked))
    shown = [i * len(probe.asked) // count for i in range(count)]
    return [
        Answer(
            _png(probe.pictures[probe.asked[i][0]]),
            probe.asked[i][1].text,
            probe.asked[i][1].answer,
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
