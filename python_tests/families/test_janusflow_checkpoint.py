"""JanusFlow's checkpoint folders: what upstream's config.json may say. What all families have in common is in
test_checkpoint_folders.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import FAMILIES, write_weights

import flashu_ext as fx

FAMILY = FAMILIES["janusflow"]
LANGUAGE = FAMILY.configs["config.json"]["language_config"]
JanusFlow, JanusFlowConfig = fx.janusflow.JanusFlow, fx.janusflow.JanusFlowConfig


def refused(folder: Path, text: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=text):
        JanusFlow.from_pretrained(folder)


def test_pickles_are_not_taken(tmp_path: Path):
    folder = FAMILY.upstream(tmp_path)
    torch.save(FAMILY.state(), folder / "pytorch_model.bin")
    refused(folder, "expected weights: model.safetensors, .*or their", FileNotFoundError)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    refused(folder, "expected the name of a .safetensors file in the folder")


def test_both_halves_have_as_many_blocks(tmp_path: Path):
    folder, state = FAMILY.upstream(tmp_path), FAMILY.state()
    decoder = [name for name in state if name.startswith("vision_gen_dec_model.mid_block.res_blocks.1.")]
    save_file({name: x for name, x in state.items() if name not in decoder}, folder / "model.safetensors")
    refused(folder, "blocks: expected 1, as the weights have, got 2")
    save_file({**state, "beg_of_und_embed": torch.zeros(2, 32)}, folder / "model.safetensors")
    refused(folder, r"beg_of_und_embed: expected shape \[1, 32\], got \[2, 32\]")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "llama"}, "expected model_type 'multi_modality' or our own format, got 'llama'"),
        ({"language_config": None}, "language_config: expected an object, got None"),
        ({"language": {"num_attention_heads": 3}}, r"num_attention_heads: expected a divisor of the width 32, got 3"),
        ({"language": {"num_hidden_layers": 3}}, r"num_hidden_layers: expected 2, as the weights have, got 3"),
        ({"language": {"attention_bias": True}}, r"attention_bias: expected False, got True"),
        ({"language": {"rope_scaling": {"type": "linear"}}}, r"rope_scaling: expected None, got"),
        ({"language": {"rope_parameters": {"rope_type": "yarn"}}}, r"rope_type: expected 'default', got 'yarn'"),
        ({"language": {"model_type": "qwen2"}}, r"language_config.model_type: expected 'llama', got 'qwen2'"),
        ({"language": {"rope_theta": "big"}}, "rope_theta: expected a finite number > 0, got 'big'"),
        ({"language": {"rms_norm_eps": -1}}, "eps: expected a finite number > 0, got -1"),
        ({"format": "flashu_ext.showo2"}, "expected a JSON object with format 'flashu_ext.janusflow'"),
    ],
)
def test_bad_configs(tmp_path: Path, changes: dict[str, Any], text: str):
    if "language" in changes:
        changes = {"language_config": {**LANGUAGE, **changes["language"]}}
    write_weights(FAMILY.state(), FAMILY.upstream(tmp_path, config=changes), "model")
    refused(tmp_path, text)


def test_another_width_of_siglip_is_named(tmp_path: Path):
    folder, state = FAMILY.upstream(tmp_path), FAMILY.state()
    pos = "vision_und_enc_model.vision_tower.pos_embed"
    save_file({**state, pos: torch.zeros(1, 4, 700)}, folder / "model.safetensors")
    refused(folder, r"expected the width of a published SigLIP tower \(768, 1024, 1152\), got 700")
    save_file({**state, pos: torch.zeros(1, 5, 768)}, folder / "model.safetensors")
    refused(folder, "expected a square number of places, got 5")


def test_sizes_of_a_configuration_are_checked():
    assert JanusFlowConfig.from_json(JanusFlowConfig().to_json()) == JanusFlowConfig()
    fields = json.loads(JanusFlowConfig().to_json())
    with pytest.raises(ValueError, match=r"layers: expected an integer in \[1, 512\], got 0"):
        JanusFlowConfig.from_json(json.dumps({**fields, "layers": 0}))
