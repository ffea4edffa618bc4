"""Decides before the loop what every evaluation of an image computes, with dead work removed.

Pure Python over FlashUConfig; nothing here knows of tensors or models. The rules are those of Flash-Unified's
reference code and of this library's further knobs, on top of which every evaluation is asked: does its result reach
the latents?
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .config import FlashUConfig

__all__ = ["Step", "StepPlan", "least_important"]


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
        residual: the backbone runs, and what is carried forward is the head's residual, not its output.
        adaptive: planned to run, but decided while running: it may become what `cached` returns.
        encode: the SigLIP encoder runs; otherwise its last features are used.
        measure_tokens: token importance is measured here, on a pass that skips nothing.
        tokens_from: the steps whose token importance, the newest first, routes tokens here; empty: all are computed.
        guided: both branches of guidance are run, where the caller asks for guidance; otherwise the conditional one.
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
    residual: bool = False
    adaptive: bool = False
    encode: bool = True
    measure_tokens: bool = False
    tokens_from: tuple[int, ...] = ()
    guided: bool = True

    @property
    def kind(self) -> str:
        """'full', 'pruned' (neurons, layers or tokens are left out), 'measure', 'measure only' (its head does not run),
        'head residual' (so it is, without a measurement) or 'head cached' (nothing but the final layer)."""
        if not self.backbone:
            return "head cached"
        if self.measure or self.measure_tokens:
            return "measure" if self.head else "measure only"
        if self.residual:
            return "head residual"
        return "pruned" if self.pruned or self.skip_from is not None or self.tokens_from else "full"

    def cached(self, head_from: int, residual: bool) -> Step:
        """This adaptive step where it was decided to carry the head state of step `head_from` forward."""
        step = dataclasses.replace(self, head=False, head_from=head_from, keep_head=False, residual=residual)
        if residual:
            return step
        return dataclasses.replace(step, backbone=False, pruned=False, skip_from=None, tokens_from=(), encode=False)


@dataclass(frozen=True)
class StepPlan:
    """The evaluations of one image, in order. Build it with `StepPlan.build`."""

    config: FlashUConfig
    grid_points: int
    steps: tuple[Step, ...]

    @classmethod
    def build(
        cls,
        config: FlashUConfig,
        steps: int | None = None,
        num_layers: int | None = None,
        guidance_scale: float | None = None,
        num_tokens: int | None = None,
    ) -> StepPlan:
        """Plan an image.

        Args:
            config: the settings.
            steps: grid points; None takes `config.steps`, or 50 where that is None too.
            num_layers: LLM layers, to know whether `layer_skip_ratio` rounds down to none; None assumes that it does not.
            guidance_scale: the caller's, to know where the scale of a step is 1; None takes no step whose scale depends
                on it for one.
            num_tokens: image tokens, to know whether `token_skip_ratio` rounds down to none; None assumes that it does not.

        Raises:
            ValueError: fewer than two grid points.
        """
        grid_points = steps if steps is not None else (config.steps if config.steps is not None else 50)
        if not isinstance(grid_points, int) or isinstance(grid_points, bool) or grid_points < 2:
            raise ValueError(f"steps: expected an integer >= 2 (grid points), got {grid_points!r}")
        if num_tokens is not None and int(num_tokens * config.token_skip_ratio) == 0:
            config = config.replace(token_skip=False)
        drafts = _drafts(config, grid_points, num_layers)
        live = _with_branches(config, guidance_scale, _without_dead_work(config, drafts))
        return cls(config, grid_points, _with_encoder(config, drafts, live))

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
    def encoder_evaluations(self) -> int:
        return sum(step.encode for step in self.steps)

    @property
    def adaptive_evaluations(self) -> int:
        """Evaluations counted as run above that may be cached instead, as decided while running."""
        return sum(step.adaptive for step in self.steps)

    @property
    def dead_evaluations(self) -> int:
        return sum(step.dead for step in self.steps)

    def counts(self) -> dict[str, int]:
        """Evaluations by kind."""
        return dict(Counter(step.kind for step in self.steps))

    def describe(self, guidance_scale: float = 5.0) -> str:
        """The plan as a table for people, one line per evaluation, totals last. Columns of knobs that are off are left out."""
        rows = [self._cells(step, guidance_scale) for step in self.steps]
        config = self.config
        shown = {"encoder": config.encoder_cache, "tokens": config.token_skip, "branches": config.skip_unit_guidance}
        columns = [name for name in rows[0] if shown.get(name, True)]
        table = [columns, *([row[name] for name in columns] for row in rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(columns))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        total = (
            f"{self.grid_points} grid points = {len(self)} evaluations: {self.backbone_evaluations} run the backbone, "
            f"{self.head_evaluations} the head, {self.dead_evaluations} were dead and are not run"
        )
        if config.encoder_cache:
            total += f"; {self.encoder_evaluations} run the encoder"
        if config.adaptive_cache:
            total += f"; {self.adaptive_evaluations} of these may be cached, as decided while running"
        return "\n".join([*lines, total])

    def _cells(self, step: Step, guidance_scale: float) -> dict[str, str]:
        """A step's row of the table by column."""
        carry = "reuse" if self.config.head_forecast_order == 0 else "forecast"
        if step.residual:
            carry += " residual"
        head = ("compute, keep" if step.keep_head else "compute") if step.head else f"{carry} {step.head_from}"
        layers = "all" if step.skip_from is None else f"skip as of {step.skip_from}"
        tokens = f"skip as of {', '.join(map(str, step.tokens_from))}" if step.tokens_from else "all"
        pruned = f"{100 * (1 - self.config.ffn_prune_ratio):g} %"
        return {
            "step": str(step.index),
            "kind": step.kind,
            "encoder": ("run" if step.encode else "reuse") if step.backbone else "-",
            "FFN": (pruned if step.pruned else "all") if step.backbone else "-",
            "layers": layers if step.backbone else "-",
            "tokens": tokens if step.backbone else "-",
            "head": f"{head}, or {carry}" if step.adaptive else head,
            "branches": "both" if step.guided else "one",
            "guidance": f"{self.config.guidance_at(step.index, guidance_scale):g}",
        }


@dataclass
class _Draft:
    """One evaluation before liveness is known: without the knobs of its own, as the reference code would run it."""

    index: int
    full: bool
    measures: bool
    skip_from: int | None
    head_from: int | None
    measures_tokens: bool
    tokens_from: tuple[int, ...]
    adaptive: bool

    @property
    def measuring(self) -> bool:
        return self.measures or self.measures_tokens


def _drafts(config: FlashUConfig, grid_points: int, num_layers: int | None) -> list[_Draft]:
    tau = config.full_steps(grid_points)
    skips = config.layer_skip_ratio > 0 and config.layer_skip_interval > 0
    if num_layers is not None and int(num_layers * config.layer_skip_ratio) == 0:
        skips = False
    routes = config.token_skip and config.token_skip_ratio > 0
    caches = config.head_cache_interval > 0 and not config.adaptive_cache
    drafts: list[_Draft] = []
    measured: int | None = None
    cached: int | None = None
    measured_tokens: tuple[int, ...] = ()
    for index in range(1, grid_points):
        full = tau > 0 and index > grid_points - tau
        measures = skips and not full and (index - 1) % config.layer_skip_interval == 0
        measures_tokens = routes and not full and (index - 1) % config.token_skip_interval == 0
        all_runs = full or measures or measures_tokens
        stores = caches and not full and index % config.head_cache_interval == 0
        drafts.append(
            _Draft(
                index=index,
                full=full,
                measures=measures,
                skip_from=None if all_runs else measured,
                head_from=cached if not full and not stores else None,
                measures_tokens=measures_tokens,
                tokens_from=() if all_runs else measured_tokens,
                # A measuring step runs its backbone anyway, and a choice must not hang on a decision made while running.
                adaptive=config.adaptive_cache and not all_runs and index > 1,
            )
        )
        if measures:
            measured = index
        if stores:
            cached = index
        if measures_tokens:
            measured_tokens = (index, *measured_tokens)[: 2 if config.token_skip_forecast else 1]
    return drafts


def _without_dead_work(config: FlashUConfig, drafts: list[_Draft]) -> list[Step]:
    runs_head = {draft.index for draft in drafts if draft.head_from is None}
    # A residual is added to a fresh head input, so there the backbone's result reaches the latents although no block runs.
    uses_backbone = {draft.index for draft in drafts if draft.index in runs_head or config.head_residual_reuse}
    # A choice of layers or tokens matters only to a step whose backbone's result is used: a measuring step skips nothing
    # itself, so liveness never chains from one measurement to another.
    users = [draft for draft in drafts if draft.index in uses_backbone]
    live_measures = {draft.skip_from for draft in users}
    live_tokens = {source for draft in users for source in draft.tokens_from}
    kept = {draft.head_from for draft in drafts} | {draft.index - 1 for draft in drafts if draft.adaptive}
    steps = []
    for draft in drafts:
        head = draft.index in runs_head
        measure = draft.measures and draft.index in live_measures
        measure_tokens = draft.measures_tokens and draft.index in live_tokens
        backbone = draft.index in uses_backbone or measure or measure_tokens
        steps.append(
            Step(
                index=draft.index,
                pruned=config.ffn_prune_ratio > 0 and not draft.full and backbone,
                backbone=backbone,
                measure=measure,
                skip_from=draft.skip_from if backbone else None,
                head=head,
                head_from=draft.head_from,
                keep_head=draft.index in kept,
                dead=not backbone,
                residual=config.head_residual_reuse and not head,
                adaptive=draft.adaptive,
                measure_tokens=measure_tokens,
                tokens_from=draft.tokens_from if backbone else (),
            )
        )
    return steps


def _with_branches(config: FlashUConfig, guidance_scale: float | None, steps: list[Step]) -> list[Step]:
    """Leave out the unconditional branch where the guidance scale is 1 and nothing that is kept there needs it later."""
    if not config.skip_unit_guidance:
        return steps
    # NaN is no scale's 1, and no factor makes it so.
    asked = float("nan") if guidance_scale is None else guidance_scale
    guided = {step.index for step in steps if config.guidance_at(step.index, asked) != 1.0}
    kept = [step.index for step in steps if step.keep_head]
    for step in reversed(steps):  # what a step needs was computed before it, so one pass backwards is enough
        if step.measure:
            # Layers are chosen by a mean over the rows of both branches; with one the choice would be another.
            guided.add(step.index)
        if step.index not in guided:
            continue
        guided.update(step.tokens_from if step.backbone else ())
        if step.head_from is not None:
            upto = kept.index(step.head_from) + 1
            guided.update(kept[max(0, upto - 1 - config.head_forecast_order) : upto])
    # Which step's state an adaptive one would carry forward is not known here. Where the second branch comes back, it is
    # computed, so that a state kept with one branch is never carried into a step that needs two.
    result = []
    for step in steps:
        returns = step.index in guided and step.index - 1 not in guided
        result.append(dataclasses.replace(step, guided=step.index in guided, adaptive=step.adaptive and not returns))
    return [
        dataclasses.replace(
            step, keep_head=step.keep_head and (not config.adaptive_cache or (after is not None and after.adaptive))
        )
        for step, after in zip(result, [*result[1:], None], strict=True)
    ]


def _with_encoder(config: FlashUConfig, drafts: list[_Draft], steps: list[Step]) -> tuple[Step, ...]:
    """Set where the SigLIP encoder runs: with a cache once per interval of evaluations that run the backbone, and in every
    full-network step. Adaptive steps are counted as if they ran; one that does not leaves its turn to the next that does."""
    result = []
    uses = config.encoder_cache_interval
    for draft, step in zip(drafts, steps, strict=True):
        encode = step.backbone and (not config.encoder_cache or draft.full or uses >= config.encoder_cache_interval)
        uses = 1 if encode else uses + step.backbone
        result.append(dataclasses.replace(step, encode=encode))
    return tuple(result)


def least_important(scores: Sequence[float], ratio: float) -> tuple[int, ...]:
    """The int(ratio * n) of n layers with the lowest scores, ascending; of equal ones the first."""
    count = int(len(scores) * ratio)
    return tuple(sorted(sorted(range(len(scores)), key=scores.__getitem__)[:count]))
