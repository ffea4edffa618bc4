"""Device work as values: everything that a piece of work depends on beside the memory it runs in.

The value is the key of the work's captured graph, so a number that changes what runs cannot be left out of the key. Each type
of work has one function that does it, which takes the memory and the value and reads no other plain number.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "BackboneWork",
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
    """A network that is run: with the FFN neurons of a task (None: all of them), without the skipped layers."""

    task: str | None
    skipped: tuple[int, ...] = ()


@dataclass(frozen=True)
class Work:
    """What every kind of work says."""

    rows: int
    """Rows of the batch that run."""

    @property
    def rare(self) -> bool:
        """Whether it may never come back: then a capture has to wait until it has."""
        return False


@dataclass(frozen=True)
class WatchWork(Work):
    """Take in the adaptive cache's signal."""

    compared: int
    """Rows that the signal before it has too."""


@dataclass(frozen=True)
class PrefixWork(Work):
    """Compute the prompt's keys and values."""

    variant: Variant

    @property
    def rare(self) -> bool:
        return bool(self.variant.skipped)  # which layers are skipped may be another choice for every prompt


@dataclass(frozen=True)
class Routing:
    """Where the token importance lies that chooses tokens: in one measurement's slot, or extrapolated from two."""

    newest: int
    earlier: int | None = None
    slope: float = 0.0
    """Steps ahead of the newest measurement, over the steps between the two."""


@dataclass(frozen=True)
class BackboneWork(Work):
    """Embed the image and run the language model on it."""

    images: int
    """Latents: as many as rows, or half of them where both branches of guidance share one."""
    encode: bool
    """Run the SigLIP encoder; else its features of an earlier step are used."""
    variant: Variant
    measure: bool
    """Measure the layers' importance, over the whole sequence."""
    stores_prefix: bool
    """A measurement that leaves the prompt's keys and values behind."""
    token_slot: int | None
    """Where the measured importance of the tokens goes; None: not measured."""
    routing: Routing | None
    """Which tokens every layer computes; None: all of them."""
    groups: int | None
    """Calls of attention, where the prompts' lengths are read on the host; None: on the device."""

    @property
    def rare(self) -> bool:
        return bool(self.variant.skipped)


@dataclass(frozen=True)
class HeadUpdate:
    """Take a feature of the diffusion head into its table of finite differences."""

    rows: int
    """Of the table."""
    carried_from: int
    """Rows of the table that goes on in this one; 0: none does."""
    interval: float
    """Steps since the last feature."""
    count: int
    """Earlier features that count."""


@dataclass(frozen=True)
class HeadPrediction:
    """Extrapolate the diffusion head's feature from its table."""

    rows: int
    """Of the table."""
    ahead: float
    """Steps since the last feature."""
    count: int
    """Features that count."""


@dataclass(frozen=True)
class HeadWork(Work):
    """The diffusion head, and the latents' step."""

    update: HeadUpdate | None
    """What is kept of the blocks' output for later steps; None: nothing."""
    prediction: HeadPrediction | None
    """What stands for the blocks' output; None: the blocks run."""
    residual: bool
    """What is kept or predicted is what the blocks add to their input."""
    moved: int
    """Images whose latents are moved along; 0: the caller does that."""
    groups: int | None
    """As in `BackboneWork`."""


@dataclass(frozen=True)
class TokenWork(Work):
    """The next token of every row of a batch of answers."""

    layers: tuple[bool | None, ...]
    """Which layers run: all rows, none, or (None) those that `AnswerMemory.runs` says."""
