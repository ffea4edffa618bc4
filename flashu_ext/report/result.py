"""Results of the demo as records, the source of plots, page, terminal text and JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from typing import Any

from ..nano.evaluate import Proportion
from ..planning.tables import text_table

__all__ = ["Answer", "DemoResult", "Drawing", "PresetResult"]


@dataclass
class PresetResult:
    """One preset over all prompts and questions.

    Attributes:
        grid_points, kinds, backbone, head: of one image; kinds names each evaluation's kind, in order.
        image_seconds, answer_seconds: wall-clock times of single images and answers, batch 1.
        adherence: images judged correct.
        accuracy: correct answers.
        max_difference: largest absolute difference of the latents to dense at the same seed, for presets that
            promise dense's outputs.
        equal_answers: answers that equal dense's, token for token.
        psnr: mean PSNR in dB of the images that differ from dense's at the same seed; None where none does.
        summary: the handle's summary; empty for dense.
    """

    name: str
    grid_points: int
    kinds: list[str]
    backbone: int
    head: int
    adherence: Proportion
    accuracy: Proportion
    equal_answers: Proportion
    image_seconds: list[float] = field(default_factory=list)
    answer_seconds: list[float] = field(default_factory=list)
    max_difference: float | None = None
    psnr: float | None = None
    summary: str = ""

    @property
    def image_time(self) -> float:
        return statistics.median(self.image_seconds)

    @property
    def answer_time(self) -> float:
        return statistics.median(self.answer_seconds)


@dataclass(frozen=True)
class Drawing:
    """A prompt with, per preset, its PNG, whether the judge found it right, and the first thing that is wrong, or ''."""

    prompt: str
    images: dict[str, bytes]
    right: dict[str, bool]
    reasons: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """A question about a held-out image (PNG), the true answer, and that of each preset."""

    image: bytes
    question: str
    expected: str
    answers: dict[str, str]


@dataclass
class DemoResult:
    """Everything that the report shows. `presets` starts with dense, the reference."""

    model: str
    command: str
    machine: dict[str, str]
    seconds: float
    presets: list[PresetResult]
    drawings: list[Drawing]
    answers: list[Answer]

    def image_speedup(self, preset: PresetResult) -> float:
        return self.presets[0].image_time / preset.image_time

    def answer_speedup(self, preset: PresetResult) -> float:
        return self.presets[0].answer_time / preset.answer_time

    def table(self) -> str:
        """The result in a few lines, for a terminal."""
        header = (
            "preset",
            "image",
            "x",
            "answer",
            "x",
            "evaluations",
            "adherence",
            "accuracy",
            "against dense",
        )
        rows = [header]
        for preset in self.presets:
            rows.append(
                (
                    preset.name,
                    f"{1e3 * preset.image_time:.0f} ms",
                    f"{self.image_speedup(preset):.2f}",
                    f"{1e3 * preset.answer_time:.1f} ms",
                    f"{self.answer_speedup(preset):.2f}",
                    f"{preset.backbone} + {preset.head} head",
                    f"{100 * preset.adherence.value:.0f} %",
                    f"{100 * preset.accuracy.value:.0f} %",
                    self.against_dense(preset),
                )
            )
        return text_table(rows, rule=True)

    def against_dense(self, preset: PresetResult) -> str:
        """How far a preset's images are from dense's, as text."""
        if preset is self.presets[0]:
            return "-"
        if preset.max_difference is not None:
            return f"latents within {preset.max_difference:.1e}"
        return "equal pixels" if preset.psnr is None else f"PSNR {preset.psnr:.1f} dB"

    def to_json(self) -> str:
        """All figures, without the images."""
        record: dict[str, Any] = {
            "model": self.model,
            "command": self.command,
            "machine": self.machine,
            "seconds": self.seconds,
            "presets": [
                dataclasses.asdict(preset)
                | {
                    "image_median": preset.image_time,
                    "answer_median": preset.answer_time,
                    "image_speedup": self.image_speedup(preset),
                    "answer_speedup": self.answer_speedup(preset),
                }
                for preset in self.presets
            ],
            "drawings": [{"prompt": d.prompt, "right": d.right, "reasons": d.reasons} for d in self.drawings],
            "answers": [{"question": a.question, "expected": a.expected, "answers": a.answers} for a in self.answers],
        }
        return json.dumps(record, indent=1, allow_nan=False) + "\n"
