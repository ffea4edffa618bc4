"""Room: the step plan. Decides before the loop what every evaluation of an image computes, with dead work removed.

Pure Python over FlashUConfig; nothing here knows of tensors or models. The rules are those of Flash-Unified's
reference code, on top of which every evaluation is asked: does its result reach the latents?
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .config import FlashUConfig

__all__ = ["Step", "StepPlan"]


@dataclass(frozen=True)
class Step:
    """What one evaluation computes. `index` counts from 1.

    Attributes:
        pruned: the FFNs run on the plan's neuron set instead of all neurons.
        backbone: encoder and LLM run at all.
        measure: layer importance is measured here, on a pass that skips nothing.
        skip_from: the measuring step whose choice of layers is skipped here, or None: nothing is skipped.
        head: the head blocks run; otherwise the state kept by `head_from` is carried forward.
        head_from: the step whose head state is used, or None when `head`.
        keep_head: a later step uses this step's head state.
        dead: the reference code computes the backbone here and throws it away.
    """

    index: int
    pruned: bool
    backbone: bool
    measure: bool
    skip_from: int | None
    head: bool
    head_from: int | None
    keep_head: bool
    dead: bool

    @property
    def kind(self) -> str:
        """'full', 'pruned', 'measure', 'measure only' (its head state comes from the cache) or 'head cached'."""
        if not self.backbone:
            return "head cached"
        if self.measure:
            return "measure" if self.head else "measure only"
        return "pruned" if self.pruned or self.skip_from is not None else "full"


@dataclass(frozen=True)
class StepPlan:
    """The evaluations of one image, in order. Build it with `StepPlan.build`."""

    config: FlashUConfig
    grid_points: int
    steps: tuple[Step, ...]

    @classmethod
    def build(cls, config: FlashUConfig, steps: int | None = None, num_layers: int | None = None) -> StepPlan:
        """Plan an image.

        Args:
            config: the settings.
            steps: grid points; None takes `config.steps`, or 50 where that is None too.
            num_layers: LLM layers, to know whether `layer_skip_ratio` rounds down to none; None assumes that it does not.

        Raises:
            ValueError: fewer than two grid points.
        """
        grid_points = steps if steps is not None else (config.steps if config.steps is not None else 50)
        if not isinstance(grid_points, int) or isinstance(grid_points, bool) or grid_points < 2:
            raise ValueError(f"steps: expected an integer >= 2 (grid points), got {grid_points!r}")
        draft = _reference_schedule(config, grid_points, num_layers)
        return cls(config, grid_points, _without_dead_work(draft, config.ffn_prune_ratio > 0))

    def __len__(self) -> int:
        return len(self.steps)

    def at(self, index: int) -> Step:
        """The evaluation with number `index`; past the end the last one's kind of work goes on."""
        if index <= len(self.steps):
            return self.steps[index - 1]
        return Step(index, False, True, False, None, True, None, False, False)

    @property
    def backbone_evaluations(self) -> int:
        return sum(step.backbone for step in self.steps)

    @property
    def head_evaluations(self) -> int:
        return sum(step.head for step in self.steps)

    @property
    def dead_evaluations(self) -> int:
        return sum(step.dead for step in self.steps)

    def counts(self) -> dict[str, int]:
        """Evaluations by kind."""
        return dict(Counter(step.kind for step in self.steps))

    def describe(self, guidance_scale: float = 5.0) -> str:
        """The plan as a table for people, one line per evaluation, totals last."""
        rows = [("step", "kind", "FFN", "layers", "head", "guidance")]
        pruned = f"{100 * (1 - self.config.ffn_prune_ratio):g} %"
        for step in self.steps:
            forecast = "reuse" if self.config.head_forecast_order == 0 else "forecast"
            rows.append(
                (
                    str(step.index),
                    step.kind,
                    (pruned if step.pruned else "all") if step.backbone else "-",
                    ("all" if step.skip_from is None else f"skip as of {step.skip_from}") if step.backbone else "-",
                    ("compute, keep" if step.keep_head else "compute") if step.head else f"{forecast} {step.head_from}",
                    f"{self.config.guidance_at(step.index, guidance_scale):g}",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(
            f"{self.grid_points} grid points = {len(self)} evaluations: {self.backbone_evaluations} run the backbone, "
            f"{self.head_evaluations} the head, {self.dead_evaluations} were dead and are not run"
        )
        return "\n".join(lines)


@dataclass
class _Draft:
    """One evaluation as the reference code would run it, before liveness is known."""

    index: int
    full: bool
    measures: bool
    skip_from: int | None
    head_from: int | None


def _reference_schedule(config: FlashUConfig, grid_points: int, num_layers: int | None) -> list[_Draft]:
    tau = config.full_steps(grid_points)
    skips = config.layer_skip_ratio > 0 and config.layer_skip_interval > 0
    if num_layers is not None and int(num_layers * config.layer_skip_ratio) == 0:
        skips = False
    drafts: list[_Draft] = []
    measured: int | None = None
    cached: int | None = None
    for index in range(1, grid_points):
        full = tau > 0 and index > grid_points - tau
        measures = skips and not full and (index - 1) % config.layer_skip_interval == 0
        stores = config.head_cache_interval > 0 and not full and index % config.head_cache_interval == 0
        head_from = cached if not full and not stores else None
        drafts.append(_Draft(index, full, measures, None if full or measures else measured, head_from))
        if measures:
            measured = index
        if stores:
            cached = index
    return drafts


def _without_dead_work(drafts: list[_Draft], prunes: bool) -> tuple[Step, ...]:
    runs_head = {draft.index for draft in drafts if draft.head_from is None}
    # A choice of layers matters only to a step that runs its backbone under it, and that is decided by its head:
    # a measuring step skips nothing itself, so liveness never chains from one measurement to another.
    live_measures = {draft.skip_from for draft in drafts if draft.skip_from is not None and draft.index in runs_head}
    kept = {draft.head_from for draft in drafts if draft.head_from is not None}
    steps = []
    for draft in drafts:
        head = draft.index in runs_head
        measure = draft.measures and draft.index in live_measures
        backbone = head or measure
        steps.append(
            Step(
                index=draft.index,
                pruned=prunes and not draft.full and backbone,
                backbone=backbone,
                measure=measure,
                skip_from=draft.skip_from if backbone else None,
                head=head,
                head_from=draft.head_from,
                keep_head=draft.index in kept,
                dead=not backbone,
            )
        )
    return tuple(steps)
