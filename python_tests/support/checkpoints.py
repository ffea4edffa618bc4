"""Checkpoint folders as upstream publishes them, of small random models of every family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import flashu_ext as fx
from flashu_ext.models.bagel import checkpoint as bagel_checkpoint
from flashu_ext.models.checkpoint import Layout
from flashu_ext.models.janusflow import checkpoint as janusflow_checkpoint
from flashu_ext.models.showo2 import checkpoint as showo2_checkpoint

__all__ = ["FAMILIES", "Family", "write_json", "write_weights"]

SHOWO2 = fx.showo2.Showo2Config(
    llm={
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 48},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
        **{"rope_theta": 500.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    },
    vision={"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2},
    head={
        **{"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"head_dim": 16, "num_layers": 2},
    },
    image_latent_height=4,
    image_latent_width=4,
)

JANUSFLOW = fx.janusflow.JanusFlowConfig(
    **{"hidden": 32, "inter": 48, "layers": 2, "heads": 4, "kv": 2, "vocab": 64, "channels": 8, "rope_theta": 500.0},
    **{"vit": 768, "vit_layers": 1, "vit_heads": 12, "vit_ratio": 1, "vit_patch": 4, "image_size": 8, "eps": 1e-5},
)
"""What upstream's code fixes is as there: 24 image tokens a side, and a published width of SigLIP."""

BAGEL = fx.bagel.BagelConfig(
    **{"hidden": 32, "inter": 48, "layers": 2, "heads": 4, "kv": 2, "vocab": 64, "rope_theta": 500.0, "eps": 1e-5},
    **{"vit": 16, "vit_inter": 24, "vit_layers": 3, "vit_layers_kept": 2, "vit_heads": 2, "vit_patch": 4},
    **{"vit_side": 5, "vit_eps": 1e-5, "latent_side": 6, "latent_channels": 3},
)


@dataclass(frozen=True, eq=False)
class Family:
    """How checkpoints of a family are made here.

    Attributes:
        kind: the model's class. layout: of its folders.
        config, tied: of a small model, and the same with a tied head.
        configs: what upstream's config files say of the small model, by their names.
    """

    kind: Any
    layout: Layout[Any]
    config: Any
    tied: Any
    configs: Mapping[str, Mapping[str, Any]]

    def model(self) -> Any:
        return _model(self)

    @property
    def weight(self) -> str:
        """A matrix of layer 0."""
        return f"{self.layout.language_model}.model.layers.0.mlp.up_proj.weight"

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.model().state_dict().items()}

    @property
    def stem(self) -> str:
        """Of upstream's weights."""
        return self.layout.files.stems[0]

    def upstream(self, folder: Path, **changes: Mapping[str, Any]) -> Path:
        """Upstream's config files, without weights. changes: fields of a config file, by its name without `.json`."""
        for name, fields in self.configs.items():
            write_json(folder / name, {**fields, **changes.pop(name.removesuffix(".json"), {})})
        assert not changes
        return folder


@cache
def _model(family: Family) -> Any:
    torch.manual_seed(0)
    return family.kind(family.config).eval()


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def write_weights(
    state: Mapping[str, Tensor], folder: Path, stem: str, *, sharded: bool = False, suffix: str = "safetensors"
) -> Path:
    """Weights in one file, or in two with an index. Returns the file, or the index."""

    def write(tensors: dict[str, Tensor], name: str) -> None:
        (save_file if suffix == "safetensors" else torch.save)(tensors, folder / name)

    if not sharded:
        write(dict(state), f"{stem}.{suffix}")
        return folder / f"{stem}.{suffix}"
    names = sorted(state)
    shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, held in shards.items():
        write({name: state[name] for name in held}, file)
    index = folder / f"{stem}.{suffix}.index.json"
    write_json(index, {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}})
    return index


_SHOWO2 = {
    "llm/config.json": {
        "num_attention_heads": SHOWO2.llm["num_attention_heads"],
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
    },
    "clip/config.json": {"vision_config": {"num_attention_heads": 2}},
    "config.json": {
        "_class_name": "Showo2Qwen2_5",
        "_diffusers_version": "0.31.0",
        "llm_vocab_size": 48,
        "llm_model_path": "llm",
        "clip_pretrained_model_path": "clip",
        "hidden_size": 32,
        "clip_latent_dim": 24,
        "image_latent_dim": 16,
        "image_latent_height": 4,
        "image_latent_width": 4,
        "patch_size": 2,
        "add_time_embeds": True,
        "add_qk_norm": True,
    },
}

_JANUSFLOW = {
    "config.json": {
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "torch_dtype": "bfloat16",
        "language_config": {
            "model_type": "llama",
            "num_attention_heads": 4,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500.0,
        },
    }
}

_BAGEL = {
    "llm_config.json": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.1,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "layer_module": "Qwen2DecoderLayer",
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "qk_norm": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "sliding_window": 131072,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 64,
    },
    "vit_config.json": {
        "hidden_size": 16,
        "image_size": 22,  # 5 whole patches a side
        "intermediate_size": 24,
        "layer_norm_eps": 1e-5,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "patch_size": 4,
        "rope": True,
    },
}
"""What upstream's app.py sets itself, the files say otherwise."""


FAMILIES = {
    "showo2": Family(
        fx.showo2.Showo2,
        showo2_checkpoint.LAYOUT,
        SHOWO2,
        replace(SHOWO2, llm={**SHOWO2.llm, "tie_word_embeddings": True}),
        _SHOWO2,
    ),
    "janusflow": Family(
        fx.janusflow.JanusFlow,
        janusflow_checkpoint.LAYOUT,
        JANUSFLOW,
        replace(JANUSFLOW, tie_word_embeddings=True),
        _JANUSFLOW,
    ),
    "bagel": Family(
        fx.bagel.Bagel,
        bagel_checkpoint.LAYOUT,
        BAGEL,
        replace(BAGEL, tie_word_embeddings=True),
        _BAGEL,
    ),
}
