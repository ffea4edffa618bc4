"""Device work as values: everything that it depends on besides the memory it runs on.

The value is the key of the captured graph, so a parameter that changes what runs cannot be missing from the key. One function
executes each type of work; its inputs are the memory and the value, and nothing else that can change.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from ..models.sampling import Formula

__all__ = [
    "BackboneWork",
    "EarlyWork",
    "HeadPrediction",
    "HeadUpdate",
    "HeadWork",
    "PrefixWork",
    "Routing",
    "TokenWork",
    "Variant",
    "WatchWork",
]


@dataclass(frozen=True)
class Variant:
    """The network that runs: with the FFN neurons of a task (None: all neurons), without the skipped layers."""

    task: str | None
    skipped: tuple[int, ...] = ()


@dataclass(frozen=True)
class Work:
    """What all types of work have."""

    rows: int
    """Rows of the batch that run."""

    @property
    def rare(self) -> bool:
        """Whether the same work may never recur: then it is captured only after several runs."""
        return False


@dataclass(frozen=True)
class ImageWork(Work):
    """What all types of work on images have."""

    adapter: str | None = field(kw_only=True)
    """The LoRA adapter that draws; None: what is active."""


@dataclass(frozen=True)
class EarlyWork(ImageWork):
    """Compute what head and language model need of the latents (`Adapter.early`)."""

    images: int
    """Latents, as in `BackboneWork`."""

    @property
    def alone(self) -> bool:
        return False

    @property
    def computes(self) -> Hashable:
        """What images must agree in to run together."""
        return ()


@dataclass(frozen=True)
class WatchWork(ImageWork):
    """Update the adaptive cache's drift."""

    compared: int
    """Rows that the previous signal has too."""


@dataclass(frozen=True)
class PrefixWork(ImageWork):
    """Compute the prompt's keys and values, or those of other segments."""

    variant: Variant
    segments: tuple[tuple[int, ...], ...] = ()
    """Of every row the lengths of what it sees, where that is not its text."""

    @property
    def rare(self) -> bool:
        return bool(self.variant.skipped)  # the skipped layers may differ for every prompt


@dataclass(frozen=True)
class Routing:
    """Which measurements of token importance choose the tokens: one, or two that are extrapolated."""

    newest: int
    """Slot of a measurement."""
    earlier: int | None = None
    slope: float = 0.0
    """Steps since the newest measurement, divided by the steps between the two."""


@dataclass(frozen=True)
class BackboneWork(ImageWork):
    """Embed the image and run the language model on it."""

    images: int
    """Latents: as many as rows, or half of them where both branches of guidance share one."""
    encode: bool
    """Run the SigLIP encoder; else reuse its features of an earlier step."""
    variant: Variant
    measure: bool
    """Measure the layers' importance, over the whole sequence."""
    stores_prefix: bool
    """Also store the prompt's keys and values (in a measurement)."""
    token_slot: int | None
    """Slot for the measured token importance; None: tokens are not measured."""
    routing: Routing | None
    """How the tokens that each layer computes are chosen; None: all tokens."""
    skipped_tokens: int
    """Of every row, where they are routed."""
    groups: int | None
    """Attention calls per layer; None where prompt lengths are read on the device."""

    @property
    def rare(self) -> bool:
        return bool(self.variant.skipped)

    @property
    def alone(self) -> bool:
        """Whether it cannot run with another image's: a measurement is of whole sequences, whose lengths differ."""
        return self.measure

    @property
    def computes(self) -> Hashable:
        """What images must agree in to run together."""
        routed = None if self.routing is None else self.skipped_tokens
        return self.encode, self.variant, self.token_slot is None, routed


@dataclass(frozen=True)
class HeadUpdate:
    """Update the diffusion head's table of finite differences with a new feature."""

    rows: int
    """Of the table."""
    copied_from: int
    """Rows of the table whose differences are copied first; 0: none."""
    interval: float
    """Steps since the last feature."""
    count: int
    """Earlier features in the table."""


@dataclass(frozen=True)
class HeadPrediction:
    """Extrapolate the diffusion head's feature from its table."""

    rows: int
    """Of the table."""
    ahead: float
    """Steps since the last feature."""
    count: int
    """Features in the table."""


@dataclass(frozen=True)
class HeadWork(ImageWork):
    """Run the diffusion head, and the Euler step."""

    update: HeadUpdate | None
    """Stores the blocks' output for later steps; None: not stored."""
    prediction: HeadPrediction | None
    """Replaces the blocks' output; None: the blocks run."""
    residual: bool
    """The feature is what the blocks add to their input, not their output."""
    stepped: int
    """Images that take the Euler step here; 0: the caller does it."""
    formula: Formula | None
    """The family's own guidance; None: `velocity.guide`, or no second branch runs."""
    groups: int | None
    """As in `BackboneWork`."""

    @property
    def alone(self) -> bool:
        return False

    @property
    def computes(self) -> Hashable:
        """What images must agree in to run together."""
        return self.prediction is None


@dataclass(frozen=True)
class TokenWork(Work):
    """Compute the next token of every row of a batch of answers."""

    layers: tuple[bool | None, ...]
    """Per layer: all rows run it, none does, or (None) those in `AnswerMemory.runs`."""
    adapters: tuple[str | None, ...]
    """The LoRA adapter of each row; None: what is active."""
