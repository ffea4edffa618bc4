"""The published sizes on the meta device: parameter names and shapes, without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashu_ext as fx
from flashu_ext.models.showo2.checkpoint import LAYOUT

SIZES = {
    ("1.5B", 432): (fx.showo2.Showo2Config.show_o2_1_5b, 1536, 8960, 28, 151_671),
    ("1.5B", 512): (fx.showo2.Showo2Config.show_o2_1_5b, 1536, 8960, 28, 151_671),
    ("1.5B", 1024): (fx.showo2.Showo2Config.show_o2_1_5b, 1536, 8960, 28, 151_671),
    ("7B", 432): (fx.showo2.Showo2Config.show_o2_7b, 3584, 18944, 28, 152_070),
}


def meta_model(config: Any) -> Any:
    with torch.device("meta"):
        return fx.showo2.Showo2(config)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parameters(size: tuple[str, int]):
    make, hidden, ffn, layers, vocab = SIZES[size]
    config = make(size[1])
    shapes = {name: tuple(t.shape) for name, t in meta_model(config).state_dict().items()}
    grid = {432: 27, 512: 32, 1024: 64}[size[1]]
    assert (config.image_latent_height, config.image_tokens) == (grid, grid * grid + 1)
    expected: dict[str, tuple[int, ...]] = {
        "showo.model.embed_tokens.weight": (vocab, hidden),
        "showo.lm_head.weight": (vocab, hidden),
        "showo.model.norm.weight": (hidden,),
        "position_embedding.weight": (729, 1152),
        "image_embedder_und.proj.weight": (1152, 16, 2, 2),
        "image_embedder_gen.proj.weight": (hidden, 16, 2, 2),
        "fusion_proj.0.weight": (1152 + hidden,),
        "fusion_proj.1.weight": (hidden, 1152 + hidden),
        "fusion_proj.3.weight": (hidden, hidden),
        "diff_proj.0.weight": (2048, hidden),
        "time_embed_proj.weight": (hidden, 2048),
        "diffusion_head_b.linear.weight": (64, 2048),
    }
    heads, kv = (12, 2) if size[0] == "1.5B" else (28, 4)
    for i in range(layers):
        at = f"showo.model.layers.{i}"
        expected[f"{at}.self_attn.q_proj.weight"] = (heads * 128, hidden)
        expected[f"{at}.self_attn.q_proj.bias"] = (heads * 128,)
        expected[f"{at}.self_attn.v_proj.weight"] = (kv * 128, hidden)
        expected[f"{at}.mlp.down_proj.weight"] = (hidden, ffn)
    for i in range(26):
        expected[f"und_trans.layers.{i}.mlp.fc1.weight"] = (4304, 1152)
    for i in range(10):
        at = f"diffusion_head_a.{i}"
        expected[f"{at}.adaLN_modulation.1.weight"] = (6 * 2048, 2048)
        expected[f"{at}.self_attn.q_norm.weight"] = (64,)
        expected[f"{at}.self_attn.k_proj.weight"] = (512, 2048)
        expected[f"{at}.mlp.gate_proj.weight"] = (8192, 2048)
    for name, shape in expected.items():
        assert shapes.get(name) == shape, f"{name}: {shapes.get(name)}"
    stacks = {"showo.model.layers": layers, "und_trans.layers": 26, "diffusion_head_a": 10}
    for stack, count in stacks.items():
        numbers = {int(name[len(stack) + 1 :].split(".")[0]) for name in shapes if name.startswith(f"{stack}.")}
        assert numbers == set(range(count)), stack


@pytest.mark.parametrize("size", [("1.5B", 432), ("7B", 432)], ids=str)
def test_the_published_config_json_gives_that_size(size: tuple[str, int], tmp_path: Any):
    """The fields of upstream's demo configs; the missing ones follow from the names and the weights' shapes."""
    make, hidden, *_rest, vocab = SIZES[size]
    config = make(size[1])
    shapes = {name: tuple(t.shape) for name, t in meta_model(config).state_dict().items()}
    fields = {
        "_class_name": "Showo2Qwen2_5",
        "llm_vocab_size": vocab,
        "llm_model_path": f"Qwen/Qwen2.5-{size[0]}-Instruct",
        "clip_pretrained_model_path": "google/siglip-so400m-patch14-384",
        "load_from_showo": False,
        "hidden_size": hidden,
        "clip_latent_dim": 1152,
        "image_latent_dim": 16,
        "image_latent_height": 27,
        "image_latent_width": 27,
        "patch_size": 2,
        "add_time_embeds": True,
        "add_qk_norm": True,
        "num_diffusion_layers": 10,
    }
    read = LAYOUT.config_of(tmp_path, {"config.json": fields}, shapes)
    assert {name: tuple(t.shape) for name, t in meta_model(read).state_dict().items()} == shapes
    assert read.llm["num_attention_heads"] == config.llm["num_attention_heads"]
    assert read.llm["rope_theta"] == 1e6 and read.vision["num_attention_heads"] == 16
