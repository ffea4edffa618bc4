"""A model's configuration: sizes, the published ones, and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...planning.groups import Check, expect, is_int, is_real
from ...planning.reading import refusal, shown
from ..fields import JsonConfig

__all__ = ["HeadConfig", "Showo2Config"]


@dataclass(frozen=True)
class HeadConfig:
    """Diffusion head. RoPE scaling and epsilons are constants of the architecture (see `head.py`)."""

    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 64
    num_layers: int = 10


# A file may name any sizes: these limits keep what is built from one small until the weights confirm it.
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 512
MAX_PATCHES = 2**24
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu")

_SIZE = expect(f"an integer in [1, {MAX_SIZE}]", lambda v: is_int(v) and 1 <= v <= MAX_SIZE)
_LAYERS = expect(f"an integer in [1, {MAX_LAYERS}]", lambda v: is_int(v) and 1 <= v <= MAX_LAYERS)
_EVEN = expect("an even integer >= 2", lambda v: is_int(v) and v >= 2 and v % 2 == 0)
_EPSILON = expect("a finite number >= 0", lambda v: is_real(v) and v >= 0)
_BASE = expect("a finite number > 0", lambda v: is_real(v) and v > 0)
_FRACTION = expect("a number in [0, 1)", lambda v: is_real(v) and 0 <= v < 1)
_SWITCH = expect("True or False", lambda v: isinstance(v, bool))
_ACTIVATION = expect(f"one of {', '.join(ACTIVATIONS)}", lambda v: isinstance(v, str) and v in ACTIVATIONS)

_STACK: Mapping[str, Check] = {
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _SIZE,
}
_LLM_OPTIONS: Mapping[str, Check] = {
    "num_key_value_heads": _SIZE,
    "head_dim": _EVEN,
    "max_position_embeddings": _SIZE,
    "rope_theta": _BASE,
    "rms_norm_eps": _EPSILON,
    "hidden_act": _ACTIVATION,
    "attention_dropout": _FRACTION,
    "initializer_range": _EPSILON,
    "tie_word_embeddings": _SWITCH,
}
_VISION_OPTIONS: Mapping[str, Check] = {
    "image_size": _SIZE,
    "patch_size": _SIZE,
    "layer_norm_eps": _EPSILON,
    "hidden_act": _ACTIVATION,
    "attention_dropout": _FRACTION,
}
_HEAD: Mapping[str, Check] = {
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _SIZE,
    "head_dim": _EVEN,
    "num_layers": _LAYERS,
}


def _check_fields(
    where: str, given: Mapping[str, Any], required: Mapping[str, Check], optional: Mapping[str, Check]
) -> None:
    """Every field known and in its range, none of the required ones missing; an optional one may be None."""
    for name in given:
        if name not in required and name not in optional:
            raise refusal(where, f"unknown field {shown(name)}")
    for name, check in required.items():
        if name not in given:
            raise ValueError(f"{where}: missing field {name!r}")
        check(f"{where}[{name!r}]", given[name])
    for name, check in optional.items():
        if given.get(name) is not None:
            check(f"{where}[{name!r}]", given[name])


def _check_heads(where: str, group: Mapping[str, Any]) -> None:
    heads, kv = group["num_attention_heads"], group.get("num_key_value_heads") or group["num_attention_heads"]
    if heads % kv:
        raise ValueError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv}")
    if group.get("head_dim") is None and group["hidden_size"] % heads:
        raise ValueError(
            f"{where}: hidden_size {group['hidden_size']} is not a multiple of num_attention_heads {heads}"
        )


@dataclass(frozen=True)
class Showo2Config(JsonConfig):
    """A Show-o2 model's shape.

    Attributes:
        llm: fields of transformers' Qwen2Config: `vocab_size`, those of `_STACK` and of `_LLM_OPTIONS`.
        vision: fields of transformers' SiglipVisionConfig, of `_STACK` and `_VISION_OPTIONS`. `num_hidden_layers` counts the
            layers in use (upstream drops the last layer of the published encoder). The position table has
            (image_size // patch_size)^2 rows where both are given, else one per image patch.
        head: fields of HeadConfig.
        image_latent_dim: latent channels.
        image_latent_height, image_latent_width: the image grid, in patches.
        patch_size: latents per patch side.
        add_time_embeds: a time token precedes the image tokens.

    Raises:
        ValueError: a field is missing, unknown or not positive, or sizes do not fit together.
    """

    FORMAT: ClassVar = "flashu_ext.showo2"

    llm: dict[str, Any]
    vision: dict[str, Any]
    head: Mapping[str, Any] = field(default_factory=dict)
    image_latent_dim: int = 16
    image_latent_height: int = 27
    image_latent_width: int = 27
    patch_size: int = 2
    add_time_embeds: bool = True

    def __post_init__(self) -> None:
        for name in ("llm", "vision", "head"):
            value = getattr(self, name)
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                value = dataclasses.asdict(value)
            if not isinstance(value, Mapping):
                raise ValueError(f"Showo2Config.{name}: expected a dict, got {type(value).__name__}")
            object.__setattr__(self, name, dict(value))
        _check_fields("Showo2Config.llm", self.llm, {**_STACK, "vocab_size": _SIZE}, _LLM_OPTIONS)
        _check_fields("Showo2Config.vision", self.vision, _STACK, _VISION_OPTIONS)
        for group in (self.llm, self.vision):
            for name in [name for name, value in group.items() if value is None]:
                del group[name]  # the default: transformers' classes refuse None
        self.llm.setdefault("num_key_value_heads", self.llm["num_attention_heads"])
        _check_fields("Showo2Config.head", self.head, {}, _HEAD)
        object.__setattr__(self, "head", dataclasses.asdict(HeadConfig(**self.head)))
        _check_fields("Showo2Config.head", self.head, _HEAD, {})
        for name in ("image_latent_dim", "image_latent_height", "image_latent_width", "patch_size"):
            _SIZE(f"Showo2Config.{name}", getattr(self, name))
        if self.image_latent_height * self.image_latent_width > MAX_PATCHES:
            raise ValueError(
                f"Showo2Config.image_latent_height, image_latent_width: expected at most {MAX_PATCHES} patches, got "
                f"{self.image_latent_height} x {self.image_latent_width}"
            )
        _SWITCH("Showo2Config.add_time_embeds", self.add_time_embeds)
        for name in ("llm", "vision", "head"):
            _check_heads(f"Showo2Config.{name}", getattr(self, name))

    # Upstream's names, which its own code and the runtime read from `model.config`.

    def with_tied_head(self, tied: bool) -> Showo2Config:
        return dataclasses.replace(self, llm={**self.llm, "tie_word_embeddings": tied})

    @property
    def hidden_size(self) -> int:
        return int(self.llm["hidden_size"])

    @property
    def clip_latent_dim(self) -> int:
        return int(self.vision["hidden_size"])

    @property
    def llm_vocab_size(self) -> int:
        return int(self.llm["vocab_size"])

    @property
    def position_rows(self) -> int:
        """Rows of SigLIP's position table."""
        image, patch = self.vision.get("image_size"), self.vision.get("patch_size")
        if isinstance(image, int) and isinstance(patch, int):
            return (image // patch) ** 2
        return self.image_latent_height * self.image_latent_width

    @property
    def image_tokens(self) -> int:
        """Tokens of an image span: patches, and the time token if there is one."""
        return self.image_latent_height * self.image_latent_width + (1 if self.add_time_embeds else 0)

    # ---- published sizes

    @classmethod
    def show_o2_1_5b(cls, resolution: int = 432, vocab_size: int = 151_671) -> Showo2Config:
        """Show-o2 1.5B at 432, 512 or 1024 pixels. Source: upstream configs/showo2_1.5b_*.yaml, Qwen2.5-1.5B, SigLIP so400m."""
        llm = _qwen2(1536, 8960, 28, 12, 2, vocab_size)
        return cls(llm=llm, vision=_SIGLIP, **_grid(resolution))

    @classmethod
    def show_o2_7b(cls, resolution: int = 432, vocab_size: int = 152_070) -> Showo2Config:
        """Show-o2 7B. Source: upstream configs/showo2_7b_*.yaml, Qwen2.5-7B, SigLIP so400m."""
        llm = _qwen2(3584, 18944, 28, 28, 4, vocab_size)
        return cls(llm=llm, vision=_SIGLIP, **_grid(resolution))


_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


def _qwen2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": hidden == 1536,
    }


def _grid(resolution: int) -> dict[str, Any]:
    grids = {432: 27, 512: 32, 1024: 64}
    if resolution not in grids:
        raise ValueError(f"resolution: expected one of {sorted(grids)}, got {resolution!r}")
    return {"image_latent_height": grids[resolution], "image_latent_width": grids[resolution]}
