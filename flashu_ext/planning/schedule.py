"""Decides before the loop what every evaluation of an image computes, with dead work removed.

Pure Python over FlashUConfig, without tensors or models. First come the rules of Flash-Unified's reference code and of this
library's further settings; then work whose result never reaches the latents is removed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .config import FlashUConfig
from .groups import HeadCaching, LayerSkip, TokenSkip, steps_of
from .tables import text_table

__all__ = ["Step", "StepPlan", "least_important"]


@dataclass(frozen=True)
class Step:
    """What one evaluation computes. `index` counts from 1.

    Attributes:
        pruned: the FFNs run on the plan's neuron set, not on all neurons.
        backbone: encoder and LLM run.
        measure: layer importance is measured, in a pass that skips nothing.
        skip_from: the measuring step that chose the layers skipped here; None: none is skipped.
        head: the head blocks run; otherwise their result is predicted from the state stored at `head_from`.
        head_from: the step whose head state is used; None if `head`.
        keep_head: the head's state is stored, for a later step.
        dead: the reference code computes the backbone here and discards the result.
        residual: the backbone runs, and the predicted state is the head's residual, not its output.
        adaptive: planned to run, but may become `cached` by a decision while running.
        encode: the SigLIP encoder runs; otherwise its last features are reused.
        measure_tokens: token importance is measured, in a pass that skips nothing.
        tokens_from: the steps whose token importance routes tokens here, newest first; empty: all tokens are computed.
        guided: under guidance both branches run; False: the conditional branch alone.
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
        """'full', 'pruned' (neurons, layers or tokens are skipped), 'measure', 'measure only' (without the head), 'head
        residual' (the head's residual is reused) or 'head cached' (only the final layer runs)."""
        if not self.backbone:
            return "head cached"
        if self.measure or self.measure_tokens:
            return "measure" if self.head else "measure only"
        if self.residual:
            return "head residual"
        return "pruned" if self.pruned or self.skip_from is not None or self.tokens_from else "full"

    def cached(self, head_from: int, residual: bool) -> Step:
        """This adaptive step after the decision to reuse the head state of step `head_from`."""
        step = dataclasses.replace(self, head=False, head_from=head_from, keep_head=False, residual=residual)
        if residual:
            return step
        return dataclasses.replace(step, backbone=False, pruned=False, skip_from=None, tokens_from=(), encode=False)


@dataclass(frozen=True)
class StepPlan:
    """The evaluations of one image, in order. Made by `StepPlan.build`."""

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
        guides: Sequence[bool] | None = None,
        computes: Sequence[bool] | None = None,
    ) -> StepPlan:
        """Plan an image.

        Args:
            config: the settings.
            steps: grid points; None: `config.steps`, or 50 if that is None too.
            num_layers: LLM layers; needed to see whether `LayerSkip.ratio` rounds down to none. None: it does not.
            guidance_scale: the caller's; needed to see which steps have scale 1. None: those that depend on it do not.
            num_tokens: image tokens; needed to see whether `TokenSkip.ratio` rounds down to none. None: it does not.
            guides: for each evaluation whether its result is guided; None: where the scale asks for it.
            computes: for each evaluation whether it is computed, and else predicted; None: as `HeadCaching` says.

        Raises:
            ValueError: fewer than two grid points.
        """
        grid_points = steps_of("steps", config.steps if steps is None else steps, 2, "grid points") or 50
        rules = _Rules.from_config(config, grid_points, num_layers, num_tokens)
        drafts = _drafts(rules, computes)
        live = _with_branches(rules, config, guidance_scale, guides, _without_dead_work(rules, drafts))
        return cls(config, grid_points, _with_encoder(rules, drafts, live))

    def __len__(self) -> int:
        return len(self.steps)

    def at(self, index: int) -> Step:
        """The evaluation with number `index`; a full one past the end of the plan."""
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
        """Evaluations counted as run above that may be cached by a decision while running."""
        return sum(step.adaptive for step in self.steps)

    @property
    def dead_evaluations(self) -> int:
        return sum(step.dead for step in self.steps)

    def counts(self) -> dict[str, int]:
        """Evaluations by kind."""
        return dict(Counter(step.kind for step in self.steps))

    def describe(self, guidance_scale: float = 5.0) -> str:
        """The plan as a table, one line per evaluation, totals last. Columns of settings that are off are omitted."""
        rows = [self._cells(step, guidance_scale) for step in self.steps]
        config = self.config
        shares = config.encoder is not None and config.encoder.on
        shown = {
            "encoder": shares,
            "tokens": config.tokens is not None and config.tokens.on,
            "branches": config.execution.skip_unit_guidance,
        }
        columns = [name for name in rows[0] if shown.get(name, True)]
        table = [columns, *([row[name] for name in columns] for row in rows)]
        lines = [text_table(table, rule=True)]
        total = (
            f"{self.grid_points} grid points = {len(self)} evaluations: {self.backbone_evaluations} run the backbone, "
            f"{self.head_evaluations} the head, {self.dead_evaluations} were dead and are not run"
        )
        if shares:
            total += f"; {self.encoder_evaluations} run the encoder"
        if config.head is not None and config.head.adaptive:
            total += f"; {self.adaptive_evaluations} of these may be cached, as decided while running"
        return "\n".join([*lines, total])

    def _cells(self, step: Step, guidance_scale: float) -> dict[str, str]:
        """A step's row of the table by column."""
        config = self.config
        predict = "forecast" if config.head is not None and config.head.order > 0 else "reuse"
        if step.residual:
            predict += " residual"
        head = ("compute, store" if step.keep_head else "compute") if step.head else f"{predict} {step.head_from}"
        layers = "all" if step.skip_from is None else f"skip as of {step.skip_from}"
        tokens = f"skip as of {', '.join(map(str, step.tokens_from))}" if step.tokens_from else "all"
        pruned = f"{100 * (1 - config.ffn.ratio):g} %" if config.ffn is not None else "all"
        return {
            "step": str(step.index),
            "kind": step.kind,
            "encoder": ("run" if step.encode else "reuse") if step.backbone else "-",
            "FFN": (pruned if step.pruned else "all") if step.backbone else "-",
            "layers": layers if step.backbone else "-",
            "tokens": tokens if step.backbone else "-",
            "head": f"{head}, or {predict}" if step.adaptive else head,
            "branches": "both" if step.guided else "one",
            "guidance": f"{config.guidance_at(step.index, guidance_scale):g}",
        }


@dataclass(frozen=True)
class _Rules:
    """The settings that a step plan depends on. A new one must be read here.

    Attributes:
        evaluations: of the image.
        whole_after: later evaluations run the whole network.
        prunes: the others run on the plan's neurons.
        measure_layers, measure_tokens, keep_head: interval in evaluations; 0: never.
        token_sources: measurements used to choose tokens.
        residual, adaptive, order: as in `HeadCaching`.
        encode: the encoder runs once per this many evaluations of the backbone.
        one_branch: skip the unconditional branch where the guidance scale is 1.
    """

    evaluations: int
    whole_after: int
    prunes: bool
    measure_layers: int
    measure_tokens: int
    token_sources: int
    keep_head: int
    residual: bool
    adaptive: bool
    order: int
    encode: int
    one_branch: bool

    @classmethod
    def from_config(
        cls, config: FlashUConfig, grid_points: int, num_layers: int | None, num_tokens: int | None
    ) -> _Rules:
        layers = config.layers or LayerSkip(0.0, 0)
        skips_layers = layers.ratio > 0 and (num_layers is None or layers.count(num_layers) > 0)
        tokens = config.tokens or TokenSkip(0.0)
        skips_tokens = tokens.on and tokens.ratio > 0 and (num_tokens is None or tokens.count(num_tokens) > 0)
        head = config.head or HeadCaching()
        return cls(
            evaluations=grid_points - 1,
            whole_after=grid_points - config.full_steps(grid_points),
            prunes=config.needs_plan,
            measure_layers=layers.interval if skips_layers else 0,
            measure_tokens=tokens.interval if skips_tokens else 0,
            token_sources=2 if tokens.forecast else 1,
            keep_head=0 if head.adaptive else head.interval,
            residual=head.residual,
            adaptive=head.adaptive,
            order=head.order,
            encode=config.encoder.interval if config.encoder is not None and config.encoder.on else 1,
            one_branch=config.execution.skip_unit_guidance,
        )


@dataclass
class _Draft:
    """One evaluation as the reference code would run it, before dead work is removed."""

    index: int
    full: bool
    measures: bool
    skip_from: int | None
    head_from: int | None
    kept: bool
    measures_tokens: bool
    tokens_from: tuple[int, ...]
    adaptive: bool

    @property
    def measuring(self) -> bool:
        return self.measures or self.measures_tokens


def _due(every: int, count: int) -> bool:
    """Whether something that happens every `every` evaluations (0: never) happens after `count` of them."""
    return every > 0 and count % every == 0


def _drafts(rules: _Rules, computes: Sequence[bool] | None) -> list[_Draft]:
    drafts: list[_Draft] = []
    measured: int | None = None
    cached: int | None = None
    measured_tokens: tuple[int, ...] = ()
    for index in range(1, rules.evaluations + 1):
        full = index > rules.whole_after
        measures = not full and _due(rules.measure_layers, index - 1)
        measures_tokens = not full and _due(rules.measure_tokens, index - 1)
        all_runs = full or measures or measures_tokens
        stores = (not full and _due(rules.keep_head, index)) if computes is None else computes[index - 1]
        drafts.append(
            _Draft(
                index=index,
                full=full,
                measures=measures,
                skip_from=None if all_runs else measured,
                head_from=cached if (computes is not None or not full) and not stores else None,
                kept=computes is not None and stores,
                measures_tokens=measures_tokens,
                tokens_from=() if all_runs else measured_tokens,
                # A measuring step runs its backbone anyway, and what it measures must not depend on a decision while running.
                adaptive=rules.adaptive and not all_runs and index > 1,
            )
        )
        if measures:
            measured = index
        if stores:
            cached = index
        if measures_tokens:
            measured_tokens = (index, *measured_tokens)[: rules.token_sources]
    return drafts


def _without_dead_work(rules: _Rules, drafts: list[_Draft]) -> list[Step]:
    runs_head = {draft.index for draft in drafts if draft.head_from is None}
    # A residual is added to a new head input, so the backbone's result reaches the latents although no block runs.
    uses_backbone = {draft.index for draft in drafts if draft.index in runs_head or rules.residual}
    # A choice of layers or tokens matters only to steps whose backbone result is used. Measuring steps skip nothing, so
    # liveness never chains from one measurement to another.
    users = [draft for draft in drafts if draft.index in uses_backbone]
    live_measures = {draft.skip_from for draft in users}
    live_tokens = {source for draft in users for source in draft.tokens_from}
    kept = {draft.head_from for draft in drafts} | {draft.index - 1 for draft in drafts if draft.adaptive}
    kept |= {draft.index for draft in drafts if draft.kept}  # extrapolation reads earlier states too
    steps = []
    for draft in drafts:
        head = draft.index in runs_head
        measure = draft.measures and draft.index in live_measures
        measure_tokens = draft.measures_tokens and draft.index in live_tokens
        backbone = draft.index in uses_backbone or measure or measure_tokens
        steps.append(
            Step(
                index=draft.index,
                pruned=rules.prunes and not draft.full and backbone,
                backbone=backbone,
                measure=measure,
                skip_from=draft.skip_from if backbone else None,
                head=head,
                head_from=draft.head_from,
                keep_head=draft.index in kept,
                dead=not backbone,
                residual=rules.residual and not head,
                adaptive=draft.adaptive,
                measure_tokens=measure_tokens,
                tokens_from=draft.tokens_from if backbone else (),
            )
        )
    return steps


def _with_branches(
    rules: _Rules,
    config: FlashUConfig,
    guidance_scale: float | None,
    guides: Sequence[bool] | None,
    steps: list[Step],
) -> list[Step]:
    """Skip the branches behind the first where nothing is guided and no later step needs what they would store."""
    if not rules.one_branch and guides is None:
        return steps
    # NaN never equals 1, so an unknown scale is never taken for unit guidance.
    asked = float("nan") if guidance_scale is None else guidance_scale
    guided = {step.index for step in steps if config.guidance_at(step.index, asked) != 1.0}
    if guides is not None:
        guided = {step.index for step, runs in zip(steps, guides, strict=True) if runs}
    kept = [step.index for step in steps if step.keep_head]
    for step in reversed(steps):  # a step depends on earlier ones only, so one pass backwards is enough
        if step.measure:
            # Layers are chosen by a mean over the rows of both branches; one branch could choose differently.
            guided.add(step.index)
        if step.index not in guided:
            continue
        guided.update(step.tokens_from if step.backbone else ())
        if step.head_from is not None:
            upto = kept.index(step.head_from) + 1
            guided.update(kept[max(0, upto - 1 - rules.order) : upto])
    # Which state an adaptive step would reuse is not known yet. A step in which the second branch returns is always computed,
    # so that a state stored with one branch is never reused with two.
    result = []
    for step in steps:
        returns = step.index in guided and step.index - 1 not in guided
        result.append(dataclasses.replace(step, guided=step.index in guided, adaptive=step.adaptive and not returns))
    return [
        dataclasses.replace(
            step, keep_head=step.keep_head and (not rules.adaptive or (after is not None and after.adaptive))
        )
        for step, after in zip(result, [*result[1:], None], strict=True)
    ]


def _with_encoder(rules: _Rules, drafts: list[_Draft], steps: list[Step]) -> tuple[Step, ...]:
    """Set where the SigLIP encoder runs: once per interval of evaluations that run the backbone, and in every full-network
    step. Adaptive steps count as run; if one is cached, the next step that runs encodes instead."""
    result = []
    uses = rules.encode
    for draft, step in zip(drafts, steps, strict=True):
        encode = step.backbone and (draft.full or uses >= rules.encode)
        uses = 1 if encode else uses + step.backbone
        result.append(dataclasses.replace(step, encode=encode))
    return tuple(result)


def least_important(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` layers with the lowest scores, ascending; ties go to the lower layer."""
    return tuple(sorted(sorted(range(len(scores)), key=scores.__getitem__)[:count]))
