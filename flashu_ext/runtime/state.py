"""The state of an image in progress, and the record that outlives it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..models.sampling import Formula
from ..models.velocity import first_branch
from ..planning.config import FlashUConfig
from ..planning.groups import HeadCaching
from ..planning.schedule import Step, StepPlan
from .history import HeadHistory, TokenHistory
from .image_memory import ImageMemory
from .memory import Lease
from .modules.attention import RowGeometry
from .readback import Readback
from .work import Variant

__all__ = ["ImageRecord", "ImageState", "StepCounts"]

MAX_PREFIXES = 3
"""Prefixes stored per image: of the pruned network before and after a measurement, and of the whole network."""


@dataclass(frozen=True)
class StepCounts:
    """What one evaluation cost the device and the host."""

    kind: str
    launches: int
    syncs: int
    waits: int
    """Times that the host waited for numbers sent earlier."""


@dataclass
class ImageRecord:
    """What was done for an image (or a batch of them); outlives its memory."""

    plan: StepPlan
    branches: int
    """Rows of an image, which share its latents; the first is the one without guidance."""
    geometry: RowGeometry
    length: int
    """Tokens of a whole row."""
    tail: int
    """Tokens behind the span, of the row that has most."""
    skipped_tokens: int
    """Tokens of a row's span that each layer skips where tokens are routed."""
    memory: dict[str, int]
    """Bytes by purpose: at the start, or at the end once the image has ended."""
    ran: list[Step] = field(default_factory=list)
    """The plan's steps as they ran, with all decisions made."""
    counts: list[StepCounts] = field(default_factory=list)
    """One for each step in `ran`."""
    choices: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    """(step, layers skipped) for every measurement of the layers."""
    routed: Counter[str] = field(default_factory=Counter)
    """Span tokens times layers of the language model: 'computed' and 'skipped'."""

    @property
    def step(self) -> int:
        """Steps begun so far; the first is 1."""
        return len(self.ran)

    @property
    def kinds(self) -> list[str]:
        return [step.kind for step in self.ran]


@dataclass
class ImageState:
    """An image (or a batch of images) in progress."""

    lease: Lease[ImageMemory]
    record: ImageRecord
    config: FlashUConfig
    caching: HeadCaching
    head: HeadHistory
    adapter: str | None = None
    """The LoRA adapter that draws; None: what is active."""
    formula: Formula | None = None
    """Of the family's own guidance."""
    guides: Sequence[bool] | None = None
    """See `DrawInputs`."""
    tokens: TokenHistory = field(default_factory=TokenHistory)
    skipped: tuple[int, ...] | None = None
    """Layers chosen by the last measurement; None before the first."""
    measured: int | None = None
    """The step whose layer measurement is being read back, or None."""
    importance: Readback = field(default_factory=Readback)
    """That measurement."""
    flag: Readback = field(default_factory=Readback)
    """The adaptive cache's decision."""
    watched: int = 0
    """Rows of the adaptive cache's last signal."""
    semantic_rows: int = 0
    """Latents whose encoder features are stored for later steps."""
    encode_due: bool = False
    """A step that should have run the encoder was cached instead."""
    prefix: tuple[Variant, int] | None = None
    """The variant and the number of rows of the prefix in memory."""
    prefixes: OrderedDict[tuple[Variant, int], tuple[Tensor, Tensor]] = field(default_factory=OrderedDict)
    """Stored copies of prefixes, of language model and head."""

    @property
    def memory(self) -> ImageMemory:
        return self.lease.memory

    @property
    def plan(self) -> StepPlan:
        return self.record.plan

    @property
    def step(self) -> int:
        """Evaluations done."""
        return self.record.step

    @property
    def images(self) -> int:
        return self.memory.shape.rows // self.record.branches

    @property
    def waits(self) -> int:
        """Times that the host waited for numbers from the device."""
        return self.importance.waits + self.flag.waits

    def rows(self, step: Step) -> int:
        """How many rows a step runs: all, or the conditional branch only."""
        return self.memory.shape.rows if step.guided else self.images

    def formula_at(self, step: Step) -> Formula | None:
        """`HeadWork.formula` of a step."""
        if self.formula is None or not step.guided:
            return None
        # Branches may run for what a later step reuses of them.
        return self.formula if self.guides is None or self.guides[step.index - 1] else first_branch

    def store_prefix(self) -> None:
        """Store a copy of the prefix in memory, which another variant will overwrite."""
        assert self.prefix is not None
        llm, head = self.memory.prefix(self.prefix[1])
        self.prefixes[self.prefix] = (llm.clone(), head.clone())
        while len(self.prefixes) > MAX_PREFIXES:
            self.prefixes.popitem(last=False)

    def load_prefix(self, variant: Variant, rows: int) -> bool:
        """Make sure that memory holds a variant's prefix, of at least `rows` rows; False where it must be computed."""
        if self.prefix is not None and self.prefix[0] == variant and self.prefix[1] >= rows:
            return True
        for stored in ((variant, self.memory.shape.rows), (variant, rows)):
            if stored in self.prefixes:
                for mine, theirs in zip(self.memory.prefix(stored[1]), self.prefixes[stored], strict=True):
                    mine.copy_(theirs)
                self.prefix = stored
                self.prefixes.move_to_end(stored)
                return True
        return False

    def nbytes(self) -> dict[str, int]:
        """Bytes held by this image, by purpose."""
        stored = sum(llm.nbytes + head.nbytes for llm, head in self.prefixes.values())
        return self.memory.nbytes() | ({"stored prefixes": stored} if stored else {})
