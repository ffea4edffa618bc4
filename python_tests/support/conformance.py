"""The conformance fixtures: outputs of the unmodified upstream programs on small random models."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import flashu_ext as fx
from flashu_ext.models import comparison
from flashu_ext.models.comparison import relative
from flashu_ext.models.showo2 import conformance

__all__ = ["DATA", "FIXTURES", "Fixture", "public", "relative", "released_shapes"]

FIXTURES = Path(__file__).parents[1] / "data"
DATA = FIXTURES / "conformance"


class Fixture:
    """Show-o2's: the model, inputs and upstream's outputs."""

    def __init__(self, directory: Path = DATA):
        self.directory = directory
        self._files = comparison.Fixture.read(directory)
        self.spec = self._files.spec
        self.t2i, self.mmu, self.flashu = (self._files.tensors(name) for name in ("t2i", "mmu", "flashu"))

    def model(self) -> Any:
        """A fresh dense model with the fixture's weights."""
        return conformance.model_of(self._files)

    @property
    def sample_inputs(self) -> dict[str, Any]:
        names = ("noise", "text_tokens", "text_tokens_null", "modality_positions", "modality_positions_null")
        return {
            **{name: self.t2i[name] for name in names},
            "guidance_scale": self.spec["guidance_scale"],
            "time_shifting_factor": self.spec["time_shifting_factor"],
        }

    def flashu_config(self, **overrides: Any) -> fx.FlashUConfig:
        """The settings of FlashU's run."""
        return conformance.flashu_config(self._files, **overrides)

    def flashu_plan(self) -> fx.TaskPlan:
        return conformance.flashu_plan(self._files)

    @property
    def answer_inputs(self) -> dict[str, Any]:
        return {
            **{name: self.mmu[name] for name in ("image_latents", "tokens_before_image", "tokens_after_boi")},
            "max_new_tokens": self.spec["mmu"]["max_new_tokens"],
        }


@cache
def public() -> Fixture:
    return Fixture()


def released_shapes(family: str) -> dict[str, list[int]]:
    """Names and shapes of a released checkpoint's weights."""
    shapes: dict[str, list[int]] = {}
    for line in (FIXTURES / f"shapes_{family}.txt").read_text().splitlines():
        if line.startswith("parameters:"):
            continue
        name, shape, *times = line.split("  ")
        for index in range(int(times[0].removeprefix("x")) if times else 1):
            shapes[name.replace(".N.", f".{index}.", 1)] = json.loads(shape)
    return shapes
