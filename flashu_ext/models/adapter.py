"""What the runtime asks of a model. A family of models is a folder here with an `Adapter`; docs/adding-a-model.md is the way in.

The runtime reads a model only through its adapter, so differences between models, and between versions of one, are handled
there alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from ..planning.config import FlashUConfig
from ..planning.cost import ModelShape
from ..planning.decoders import FAMILIES, Family, find
from ..planning.groups import Answers
from .calibration import DensePass, Noise, Sample
from .sampling import DrawInputs, Stepper

__all__ = [
    "BLOCK_PARTS",
    "Adapter",
    "AttentionShape",
    "Kit",
    "Question",
    "Sizes",
    "adapter_of",
    "family_of",
    "norm_eps",
    "out_features",
]


BLOCK_PARTS = 6
"""Shift, scale and gate of attention and FFN in a head's block."""


@dataclass(frozen=True)
class AttentionShape:
    """Heads of one attention: `heads` queries and `kv_heads` keys and values of `head_dim` each."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Sizes:
    """Sizes of what an evaluation computes for one row, at one size of the latents."""

    patches: int
    """Image tokens."""
    velocity: tuple[int, int]
    """[patches, numbers]: see `Adapter.velocity`."""
    modulation: int = 0
    """Numbers that `Adapter.modulation` gives for a time."""
    features: int = 0
    """Width of `Adapter.features`; 0: the model has no encoder that can be shared by several steps."""
    early: tuple[int, ...] = ()
    """Shape of `Adapter.early`; (): it computes none."""
    cached: int = 0
    """Width of what the head's cache keeps of every token of a span: of the blocks' output, or without blocks of the language
    model's."""
    signal: int = 0
    """Width of `Adapter.signal`."""


@dataclass(frozen=True)
class Question:
    """A question as the language model reads it."""

    embeds: Tensor
    """[1, length, hidden]."""
    allowed: Tensor
    """bool [length, length], True where a row may attend to a column."""
    spans: tuple[tuple[int, int], ...]
    """(first token, count) of each image's tokens: those that token pruning may drop."""
    positions: Tensor | None = None
    """int64 [length], each token's for the rotary embedding, at most its place; the answer's follow the largest. None: one after
    another."""


class Kit(Protocol):
    """Callables that compute what a model's modules compute, on the runtime's kernels; one that the runtime does not know is
    called as itself, and the handle's summary says why."""

    def linear(self, module: Any) -> Any:
        """nn.Linear: (x [rows, ..., in], epilogue='none', residual=None) -> [rows, ..., out]. The rows are those, or the
        images, of the method that calls it: each may have a LoRA adapter of its own."""

    def chain(self, module: Any) -> Any:
        """nn.Sequential of linear layers, norms and activations."""

    def norm(self, module: Any) -> Any:
        """RMS norm, and any other as itself: (x [rows, n, width], shift=None, scale=None) -> norm(x) * (1 + scale[:, None]) +
        shift[:, None], both [rows, width]."""

    def patches(self, module: Any) -> Any:
        """nn.Conv2d over patches side by side, or a module with one in `proj`: [images, channels, H, W] -> [images, patches,
        width]."""

    def time(self, module: Any) -> Any:
        """Sinusoids and an MLP: (t [rows], dtype) -> [rows, width]."""

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[rows, heads, n, d] each -> [rows, n, heads, d]; all keys are seen."""

    def vision(self, module: Any) -> Any:
        """transformers' SigLIP encoder: [images, patches, width] -> {"last_hidden_state": the same}."""


@dataclass(frozen=True, kw_only=True)
class Adapter(ABC):
    """A model's parts, and how it draws and answers with them. Modules are the model's own objects; nothing is copied.

    `on` gives the same adapter with callables of the runtime in place of modules. What an adapter computes must depend on its
    arguments alone, row by row, and work on the device without reading values back.
    """

    family: ClassVar[str]
    methods: ClassVar[tuple[str, ...]] = ()
    """Of the model's class, which the runtime takes over (`Family.upstream`): names, or dotted paths to a part's."""
    evaluates: ClassVar[str | None] = None
    """The one of them that computes one evaluation of a drawing, where there is one."""
    drops_unit_guidance: ClassVar[bool] = False
    """Whether the model's own formula gives at guidance scale 1 the bits of the prompt's branch, so that the other one need not
    run. Elsewhere that is a switch, `FlashUConfig.skip_unit_guidance`."""
    grid_points: ClassVar[int] = 50
    """Of an image, where nobody says how many."""
    causal: ClassVar[bool] = False
    """Whether a token of an image span attends to earlier ones only; else the span is seen whole."""

    flat: ClassVar[bool] = False
    """Whether all tokens of an image span have one rotary position."""
    norms_span: ClassVar[bool] = True
    """Whether `final_norm` is applied to a span. Else `velocity` norms it, and the head's cache has it before its norm."""
    samples: ClassVar[tuple[type[Sample], ...]] = ()
    """Types of calibration samples that `passes` takes; `TokenSample` among them only where the language model is not called as
    transformers'."""
    skips_tokens: ClassVar[bool] = True
    """Whether its layers can leave out tokens of a drawing (`FlashUConfig.token_skip_ratio`)."""

    model: Any
    embed_tokens: Any
    layers: Any
    """Decoder layers: `input_layernorm`, `self_attn` with q, k, v and o_proj, `post_attention_layernorm`, `mlp` with gate, up
    and down_proj."""
    final_norm: Any
    llm_rope: Any
    """(x, position_ids) -> cos and sin."""
    lm_head: Any
    llm_attention: AttentionShape
    experts: Any = ()
    """Layers, as `layers`, that compute a drawing's patches where these have experts of their own; `layers` then compute all
    other tokens, on all neurons. Attention is over both."""
    expert_norm: Any = None
    """The experts' `final_norm`."""
    blocks: Any = ()
    """Of a head of attention blocks behind the language model, as `layers`, with a rotary module of their own. Their parts of
    the `modulation` come first, `BLOCK_PARTS` widths each."""
    head_attention: AttentionShape = AttentionShape(1, 1, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def hidden(self) -> int:
        return int(self.embed_tokens.weight.shape[1])

    @property
    def head_rope(self) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """Rotary module of the blocks; None without blocks."""
        return self.blocks[0].self_attn.rotary_emb if len(self.blocks) else None

    @abstractmethod
    def on(self, kit: Kit) -> Self:
        """The same model with the runtime's callables in place of the modules that the methods below call."""

    @abstractmethod
    def refused(self) -> Iterator[tuple[str, str]]:
        """(path in the model, reason) of modules that the runtime passes over and whose class it does not know: a hook, an
        adapter or a replaced method there would be lost. See `models.known`."""

    def own(self, path: str) -> tuple[str, ...]:
        """The `methods` of the model's part at a path; '': of the model itself."""
        parts = (method.rpartition(".") for method in self.methods)
        return tuple(name for owner, _, name in parts if owner == path)

    @abstractmethod
    def shape(self) -> ModelShape:
        """The sizes that the cost model needs."""

    def check_config(self, config: FlashUConfig) -> None:
        """Raise ValueError for a setting that means nothing to the model."""
        layers, answers = len(self.layers), config.answers or Answers()
        if answers.token_prune_ratio > 0 and answers.token_prune_layer >= layers:
            raise ValueError(
                f"config.token_prune_layer: expected a layer in [0, {layers}) of this model, got {answers.token_prune_layer}"
            )
        tokens = config.tokens
        if not self.skips_tokens and tokens is not None and tokens.on and tokens.ratio > 0:
            raise ValueError(f"token_skip_ratio: expected 0 for a {self.family} model, got {tokens.ratio:g}")

    def dense(self, inputs: DrawInputs) -> Stepper:
        """The steps of an image by the model's own method that `evaluates` names."""
        raise ValueError("guidance_scale: expected one for all images that share their state, got one for each")

    # ---- drawing

    @property
    def lead(self) -> int:
        """Tokens of an image span before the patches."""
        return 0

    @property
    def trail(self) -> int:
        """Tokens of an image span behind the patches (`DrawInputs.trailing`)."""
        return 0

    @abstractmethod
    def sizes(self, latent_size: tuple[int, int]) -> Sizes:
        """Of an image whose latents are (H, W); a ValueError where the model draws none of that size."""

    @property
    @abstractmethod
    def latent_channels(self) -> int: ...

    @property
    @abstractmethod
    def latent_size(self) -> tuple[int, int]:
        """(H, W) of the latents that the model was made for."""

    @abstractmethod
    def embed_time(self, t: Tensor) -> Tensor:
        """Times fp32 [rows] -> their embeddings [rows, width]."""

    @abstractmethod
    def time_token(self, time: Tensor) -> Tensor:
        """Embeddings [rows, width] -> what the language model's input needs of them [rows, hidden]: a token of the span (`lead`),
        or what `span` adds to the patches."""

    def modulation(self, time: Tensor) -> Tensor:
        """Embeddings [rows, width] -> what encoder and head need of them [rows, `Sizes.modulation`]; computed once for all times
        of an image."""
        return time[:, :0]

    def place(self, latent_size: tuple[int, int]) -> Tensor:
        """A table [1, patches, `Sizes.features`] that `features` takes."""
        raise NotImplementedError("Adapter.place: expected of this family, whose `Sizes` or layers ask for it")

    def features(self, latents: Tensor, place: Tensor) -> Tensor:
        """The encoder whose features several steps may share: latents fp32 [images, channels, H, W] -> [images, patches,
        `Sizes.features`]."""
        raise NotImplementedError("Adapter.features: expected of this family, whose `Sizes` or layers ask for it")

    def early(self, latents: Tensor, modulation: Tensor) -> Tensor:
        """What every evaluation computes from the latents, also where the language model is skipped: [images, `Sizes.early`]."""
        raise NotImplementedError("Adapter.early: expected of this family, whose `Sizes` or layers ask for it")

    @abstractmethod
    def span(self, latents: Tensor, features: Tensor | None, early: Tensor | None, token: Tensor) -> Tensor:
        """The image span's embeddings [images, `lead` + patches, hidden]. token [images, hidden] is the `time_token`."""

    def signal(self, latents: Tensor, token: Tensor) -> Tensor:
        """What the adaptive cache watches: [images, patches, `Sizes.signal`], contiguous; cheap."""
        raise NotImplementedError("Adapter.signal: expected of this family, whose `Sizes` or layers ask for it")

    def head_input(self, hidden: Tensor) -> Tensor:
        """The language model's output [rows, n, hidden] -> the input of the blocks, or of `velocity` without blocks."""
        return hidden

    @abstractmethod
    def velocity(self, x: Tensor, modulation: Tensor, early: Tensor | None) -> Tensor:
        """The head's end: span [rows, `lead` + patches + `trail`, width] -> velocity rows [rows, patches, numbers]: those of
        `velocity.patchify(image's velocity, patch)`, vectors of channels in raster order of the latents, not square patches."""

    # ---- answering

    @property
    def question_tokens(self) -> int:
        """Of the largest image that a question may be about, for predicting its cost."""
        return self.lead + self.sizes(self.latent_size).patches

    @abstractmethod
    def embed_image(self, image: Tensor) -> Tensor:
        """What a question's images are given as, [images, ...] -> [images, tokens, hidden]."""

    @abstractmethod
    def question(self, images: Sequence[Tensor], before: Any, after: Any) -> Question:
        """A question about encoded images, [1, tokens, hidden] each; before and after int64 [1, n], the tokens around them,
        or what the family's answers have in their place."""

    # ---- calibration

    def passes(self, sample: Any, times: Sequence[float], noise: Noise) -> Iterator[DensePass]:
        """What the dense model runs for one of the `samples`: for a drawing a pass for each time with all branches of its
        guidance, for a question one over question and answer.

        Args:
            times: in [0, 1], of a drawing; 0 is noise, 1 the image.
            noise: what a drawing's latents are noised with (`calibration.noised`).

        Raises:
            TypeError, ValueError, IndexError: the sample is wrong, before the first pass; the message names the field.
        """
        raise NotImplementedError("Adapter.passes: expected of this family, whose `Sizes` or layers ask for it")


def family_of(model: Any) -> Family | None:
    """A model's family, whether or not the model is complete; None for any other decoder."""
    return next((family for family in FAMILIES.values() if hasattr(model, family.mark)), None)


def adapter_of(model: Any) -> Adapter:
    """The adapter of a model of any family, found by its structure.

    Raises:
        TypeError: no family has such a model, or a part of it is missing; the message says which.
    """
    if (family := family_of(model)) is not None:
        found: Adapter = import_module(family.module).adapter(model)
        return found
    names, marks = (" or ".join(each) for each in zip(*(family[:2] for family in FAMILIES.values()), strict=True))
    inside = any(find(model, f"model.{family.mark}") is not None for family in FAMILIES.values())
    raise TypeError(
        f"model: expected a {names} model, got {type(model).__name__} without {marks}"
        + ("; pass its .model" if inside else "")
    )


def out_features(projection: Any) -> int:
    """Of a linear layer, or of one that wraps it."""
    for owner in (projection, *projection.children()):
        if (width := getattr(owner, "out_features", None)) is not None:
            return int(width)
    raise TypeError(
        f"model: expected a linear layer, or one that wraps it, with out_features, got {type(projection).__name__}"
    )


def norm_eps(norm: nn.Module) -> float:
    """The epsilon of an RMSNorm, under either of its names."""
    for name in ("variance_epsilon", "eps"):
        value = getattr(norm, name, None)
        if value is not None:
            return float(value)
    raise TypeError(f"{type(norm).__name__}: expected variance_epsilon or eps")
