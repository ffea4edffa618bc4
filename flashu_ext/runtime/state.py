"""An image in progress, and the record of it that lasts."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from torch import Tensor

from ..planning.schedule import Step, StepPlan
from .history import HeadHistory, TokenHistory
from .memory import Lease
from .modules.attention import RowGeometry
from .readback import Readback
from .work import Variant
from .workspace import Workspace

__all__ = ["ImageRecord", "ImageState", "StepWork"]

MAX_PREFIXES = 3
"""Prefixes that an image stores: of the pruned network before and after a measurement, and of the whole one."""


@dataclass(frozen=True)
class StepWork:
    """What one evaluation asked of the device. waits: the times that the host waited for an answer."""

    kind: str
    launches: int
    syncs: int
    waits: int


@dataclass
class ImageRecord:
    """What was done for an image (or a batch of them); outlives its memory.

    Attributes:
        guided: rows come in two halves that share one latent.
        geometry, length: where the rows' spans lie, and how long the rows are.
        skipped_tokens: of a row's span, that a layer leaves out where tokens are routed.
        ran: the plan's steps with everything decided. work: what each asked of the device.
        choices: (step, layers skipped) for every measurement of the layers.
        routed: tokens of the span times layers of the language model, 'computed' and 'carried' past a layer.
        memory: bytes by purpose, when it began or, once it has ended, when it ended.
    """

    plan: StepPlan
    guided: bool
    geometry: RowGeometry
    length: int
    skipped_tokens: int
    memory: dict[str, int]
    ran: list[Step] = field(default_factory=list)
    work: list[StepWork] = field(default_factory=list)
    choices: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    routed: Counter[str] = field(default_factory=Counter)

    @property
    def kinds(self) -> list[str]:
        return [step.kind for step in self.ran]


@dataclass
class ImageState:
    """An image (or a batch of images) in progress.

    Attributes:
        lease: its memory. record: what stays of it.
        head, tokens: what was kept and measured for later steps.
        skipped: the layers chosen by the last measurement, or None before the first.
        measured: the step whose measurement is on its way to the host, or None. importance: that measurement of the layers.
        flag: the adaptive cache's answer. watched: rows of its last signal.
        semantic_rows: latents whose encoder features are kept for later steps.
        encode_due: a step that should have run the encoder was cached instead.
        prefix: the variant, and its rows, whose prompt's keys and values are in the workspace.
        prefixes: others that are stored, of the language model and of the head.
    """

    lease: Lease[Workspace]
    record: ImageRecord
    head: HeadHistory
    tokens: TokenHistory = field(default_factory=TokenHistory)
    skipped: tuple[int, ...] | None = None
    measured: int | None = None
    importance: Readback = field(default_factory=Readback)
    flag: Readback = field(default_factory=Readback)
    watched: int = 0
    semantic_rows: int = 0
    encode_due: bool = False
    prefix: tuple[Variant, int] | None = None
    prefixes: OrderedDict[tuple[Variant, int], tuple[Tensor, Tensor]] = field(default_factory=OrderedDict)

    @property
    def workspace(self) -> Workspace:
        return self.lease.memory

    @property
    def plan(self) -> StepPlan:
        return self.record.plan

    @property
    def guided(self) -> bool:
        return self.record.guided

    @property
    def step(self) -> int:
        """Evaluations done."""
        return len(self.record.ran)

    @property
    def images(self) -> int:
        rows = self.workspace.shape.rows
        return rows // 2 if self.guided else rows

    @property
    def waits(self) -> int:
        """Times that the host waited for an answer."""
        return self.importance.waits + self.flag.waits

    def rows(self, step: Step) -> int:
        """How many rows a step runs: all, or those of the conditional branch."""
        return self.workspace.shape.rows if step.guided else self.images

    def store_prefix(self) -> None:
        """Copy the prefix in the workspace, for when another variant has taken its place."""
        assert self.prefix is not None
        llm, head = self.workspace.prefix(self.prefix[1])
        self.prefixes[self.prefix] = (llm.clone(), head.clone())
        while len(self.prefixes) > MAX_PREFIXES:
            self.prefixes.popitem(last=False)

    def load_prefix(self, variant: Variant, rows: int) -> bool:
        """Have a variant's prefix of at least so many rows in the workspace; False where it must be computed."""
        if self.prefix is not None and self.prefix[0] == variant and self.prefix[1] >= rows:
            return True
        for stored in ((variant, self.workspace.shape.rows), (variant, rows)):
            if stored in self.prefixes:
                for mine, theirs in zip(self.workspace.prefix(stored[1]), self.prefixes[stored], strict=True):
                    mine.copy_(theirs)
                self.prefix = stored
                self.prefixes.move_to_end(stored)
                return True
        return False

    def nbytes(self) -> dict[str, int]:
        """Bytes of all that this image holds, by purpose."""
        stored = sum(llm.nbytes + head.nbytes for llm, head in self.prefixes.values())
        return self.workspace.nbytes() | ({"stored prefixes": stored} if stored else {})
