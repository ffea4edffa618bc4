"""A model's configuration: sizes, the published ones, and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...planning.reading import strict_json

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


def _positive(where: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Showo2Config.{where}: expected an integer >= 1, got {value!r}")


@dataclass(frozen=True)
class Showo2Config:
    """A Show-o2 model's shape.

    Attributes:
        llm: fields of transformers' Qwen2Config (`hidden_size`, `intermediate_size`, `num_hidden_layers`, ...).
        vision: fields of transformers' SiglipVisionConfig. `num_hidden_layers` counts the layers in use (upstream drops the
            last layer of the published encoder). The position table has (image_size // patch_size)^2 rows where both are
            given, else one per image patch.
        head: fields of HeadConfig.
        image_latent_dim: latent channels.
        image_latent_height, image_latent_width: the image grid, in patches.
        patch_size: latents per patch side.
        add_time_embeds: a time token precedes the image tokens.

    Raises:
        ValueError: a field is missing, unknown or not positive, or sizes do not fit together.
    """

    llm: Mapping[str, Any]
    vision: Mapping[str, Any]
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
        unknown = sorted(set(self.head) - {f.name for f in dataclasses.fields(HeadConfig)})
        if unknown:
            raise ValueError(f"Showo2Config.head: unknown field {unknown[0]!r}")
        object.__setattr__(self, "head", dataclasses.asdict(HeadConfig(**self.head)))
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            if name not in self.llm:
                raise ValueError(f"Showo2Config.llm: missing field {name!r}")
            _positive(f"llm[{name!r}]", self.llm[name])
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if name not in self.vision:
                raise ValueError(f"Showo2Config.vision: missing field {name!r}")
            _positive(f"vision[{name!r}]", self.vision[name])
        for name, value in self.head.items():
            _positive(f"head[{name!r}]", value)
        for name in ("image_latent_dim", "image_latent_height", "image_latent_width", "patch_size"):
            _positive(name, getattr(self, name))
        if not isinstance(self.add_time_embeds, bool):
            raise ValueError(f"Showo2Config.add_time_embeds: expected True or False, got {self.add_time_embeds!r}")
        for where, group in (("llm", self.llm), ("head", self.head)):
            kv = group.get("num_key_value_heads") or group["num_attention_heads"]
            if group["num_attention_heads"] % kv:
                raise ValueError(
                    f"Showo2Config.{where}: num_attention_heads {group['num_attention_heads']} is not a multiple of "
                    f"num_key_value_heads {kv}"
                )

    # Upstream's names, which its own code and the runtime read from `model.config`.

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

    # ---- JSON

    def to_json(self) -> str:
        """The config as a JSON object, readable by `from_json`."""
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, name: str = "Showo2Config") -> Showo2Config:
        """Read what `to_json` wrote; unknown or repeated fields, NaN and Infinity are refused with a ValueError."""
        data = strict_json(text, name)
        if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
            raise ValueError(f"{name}: expected a JSON object with format {_FORMAT!r}")
        unknown = sorted(set(data) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{name}: unknown field {unknown[0]!r}")
        for required in ("llm", "vision"):
            if required not in data:
                raise ValueError(f"{name}: missing field {required!r}")
        return cls(**data)


_FORMAT = "flashu_ext.showo2"

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
