"""An interrupt at any line of `accelerate` leaves the model unchanged; after one at any line of `remove` or `editing`, a second
call completes the work."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import generation_inputs, small_model

import flashu_ext as fx
from flashu_ext.runtime import placement

RUNTIME = Path(fx.__file__).parent / "runtime"
FILES = {str(RUNTIME / name) for name in ("handle.py", "runner.py", "placement.py", "order.py", "overrides.py")}
"""The files that change a model."""

CONFIG = fx.FlashUConfig(ffn_prune_ratio=0.25, prune_multiple=8)
ORDER = (1, 0)
PLAN = fx.TaskPlan.from_scores(
    generation=[torch.rand(64, generator=torch.Generator().manual_seed(i)) for i in range(len(ORDER))],
    ratio=0.25,
    multiple=8,
)

Line = tuple[str, int]


@pytest.fixture(autouse=True)
def no_search_for_shared_memory(monkeypatch):
    """The search changes nothing, and takes most of the time of accelerating a small model."""
    monkeypatch.setattr(placement, "why_not_moved", lambda ffns: [None] * len(ffns))


class Interrupt(KeyboardInterrupt):
    pass


def traced(run: Callable[[], Any], at_line: Callable[[Line], None]) -> None:
    """Runs a function and calls at_line before each of its lines in `FILES`."""

    def local(frame: Any, event: str, _argument: Any) -> Any:
        if event == "line":
            at_line((frame.f_code.co_filename, frame.f_lineno))
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, _event, _argument: local if frame.f_code.co_filename in FILES else None)
    try:
        run()
    finally:
        sys.settrace(before)


def lines_of(run: Callable[[], Any]) -> list[tuple[Line, int]]:
    """Each line that runs, with the passes to interrupt: the first, and the last where weights are moved layer by layer."""
    counts: Counter[Line] = Counter()
    traced(run, lambda line: counts.update([line]))
    assert len(counts) > 20
    moving = str(RUNTIME / "order.py")
    return [(line, turn) for line, count in counts.items() for turn in sorted({1, count if line[0] == moving else 1})]


def interrupted(run: Callable[[], Any], line: Line, turn: int) -> bool:
    """Whether the run reached the line."""
    left = [turn]

    def at_line(each: Line) -> None:
        left[0] -= each == line
        if each == line and left[0] == 0:
            raise Interrupt(str(line))

    try:
        traced(run, at_line)
    except Interrupt:
        return True
    return False


class Watched:
    """A model, and its expected state after acceleration ends."""

    def __init__(self) -> None:
        self.model = small_model(order=ORDER)
        self.state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.attributes = self._attributes()

    def _attributes(self) -> dict[str, set[str]]:
        return {name: set(vars(module)) for name, module in self.model.named_modules()}

    def accelerate(self) -> Any:
        return fx.accelerate(self.model, CONFIG, PLAN)

    def check(self, where: Any) -> None:
        assert fx.handle_of(self.model) is None and self._attributes() == self.attributes, where
        wrong = [name for name, value in self.model.state_dict().items() if not torch.equal(value, self.state[name])]
        assert not wrong, (where, wrong)


def test_an_interrupted_accelerate_changes_nothing():
    watched = Watched()
    lines = lines_of(watched.accelerate)
    fx.handle_of(watched.model).remove()
    for line, turn in lines:
        if not interrupted(watched.accelerate, line, turn):
            fx.handle_of(watched.model).remove()
        watched.check((line, turn))


def test_an_interrupted_remove_is_completed_by_another():
    watched = Watched()
    lines = lines_of(watched.accelerate().remove)
    for line, turn in lines:
        handle = watched.accelerate()
        interrupted(handle.remove, line, turn)
        handle.remove()
        watched.check((line, turn))


def test_an_interrupted_editing_leaves_a_model_that_works_or_can_be_restored():
    watched = Watched()
    inputs = generation_inputs(watched.model, images=1)

    def edit(handle: Any) -> None:
        with handle.editing():
            pass

    handle = watched.accelerate()
    expected = fx.showo2.sample(watched.model, steps=2, **inputs)
    lines = lines_of(lambda: edit(handle))
    handle.remove()
    for line, turn in lines[::3]:  # an image for each takes time
        handle = watched.accelerate()
        interrupted(lambda handle=handle: edit(handle), line, turn)
        try:
            assert torch.equal(fx.showo2.sample(watched.model, steps=2, **inputs), expected), (line, turn)
        except RuntimeError as error:
            assert "editing" in str(error) or "interrupted" in str(error), (line, turn)
        handle.remove()
        watched.check((line, turn))
