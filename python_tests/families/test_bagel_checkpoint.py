"""BAGEL's checkpoint folders: upstream's config files, its VAE beside the weights, position tables, the released sizes. What all
families have in common is in test_checkpoint_folders.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import FAMILIES, write_json, write_weights
from support.conformance import FIXTURES, relative, released_shapes

import flashu_ext as fx
from flashu_ext.models.bagel.checkpoint import LAYOUT, read_config
from flashu_ext.models.comparison import Fixture

FAMILY = FAMILIES["bagel"]
Bagel, BagelConfig = fx.bagel.Bagel, fx.bagel.BagelConfig
TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")

RELEASED = {
    "llm_config.json": {
        **{"model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944},
        **{"num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064},
        **{"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 131072},
    },
    "vit_config.json": {
        **{"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 980},
        **{"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14},
    },
}


def upstream(folder: Path, state: Any = None, **changes: Any) -> Path:
    write_weights(FAMILY.state() if state is None else state, FAMILY.upstream(folder, **changes), "ema")
    return folder


def refused(folder: Path, text: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=text):
        Bagel.from_pretrained(folder)


def test_the_released_sizes(tmp_path: Path):
    shapes = {name: tuple(shape) for name, shape in released_shapes("bagel").items()}
    config = LAYOUT.config_of(tmp_path, RELEASED, shapes)
    assert config == BagelConfig()
    with torch.device("meta"):
        model = Bagel(config)
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == shapes


def test_upstreams_weights_draw_upstreams_image(tmp_path: Path):
    fixture = Fixture.read(FIXTURES / "bagel")
    model, draw, drawn = fixture.spec["model"], fixture.spec["draws"][0], fixture.tensors("t2i")
    write_weights(fixture.tensors("model"), tmp_path, "ema")
    write_json(tmp_path / "llm_config.json", {"rope_theta": model["rope_theta"], "rms_norm_eps": model["eps"]})
    write_json(tmp_path / "vit_config.json", {"num_attention_heads": model["vit_heads"]})
    loaded = Bagel.from_pretrained(tmp_path)
    assert loaded.config == BagelConfig(**model)
    settings = {name: draw[name] for name in ("num_timesteps", "cfg_text_scale", "cfg_img_scale", "timestep_shift")}
    texts, size = [fx.bagel.Text(torch.tensor(draw["prompt"]))], tuple(draw["size"])
    tokens = fx.bagel.sample(
        loaded, drawn["noise.0"], texts, size, fixture.spec["token_ids"], cfg_interval=draw["cfg_interval"], **settings
    )
    assert relative(loaded.unpacked(tokens, size), drawn["latents.0"]) < 1e-4


@pytest.mark.parametrize(
    "content", ['{\n  "name": [\n    "BAGEL-7B-MoT"\n  ],\n}', "{}", '{"model_type": "bagel"}', None]
)
def test_upstreams_config_json_does_not_count(tmp_path: Path, content: str | None):
    folder = upstream(tmp_path)
    if content is not None:
        (folder / "config.json").write_text(content)
    assert Bagel.from_pretrained(folder).config == FAMILY.config == read_config(folder)
    (folder / "llm_config.json").unlink()
    refused(folder, r"expected llm_config.json in the checkpoint folder", FileNotFoundError)
    (folder / "vit_config.json").unlink()
    if content is None:
        text = "expected config.json in the checkpoint folder, or upstream's llm_config.json, vit_config.json"
        refused(folder, text, FileNotFoundError)
    elif content.endswith(",\n}"):
        refused(folder, r"/config\.json: ")
    else:
        refused(folder, r"expected llm_config.json in the checkpoint folder", FileNotFoundError)


@pytest.mark.parametrize("sharded", [False, True])
def test_upstreams_vae_is_not_read(tmp_path: Path, sharded: bool):
    folder = FAMILY.upstream(tmp_path)
    (folder / "ae.safetensors").write_bytes(b"not safetensors")
    (folder / "model.safetensors").write_bytes(b"of a training, which app.py does not read")
    refused(folder, r"expected weights: ema\.safetensors, or their \.index\.json with shards", FileNotFoundError)
    write_weights(FAMILY.state(), folder, "ema", sharded=sharded)
    assert Bagel.from_pretrained(folder).config == FAMILY.config


def test_position_tables_are_the_files_and_stay_fixed(tmp_path: Path):
    state = FAMILY.state()
    for name in TABLES:
        state[name] = state[name].bfloat16().float()
    loaded = Bagel.from_pretrained(upstream(tmp_path, state))
    assert all(torch.equal(loaded.state_dict()[name], state[name]) for name in TABLES)
    assert [name for name, x in loaded.named_parameters() if not x.requires_grad] == list(TABLES)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (TABLES[0], None, f"missing: {TABLES[0]}|a weight {TABLES[0]}"),
        (TABLES[0], torch.zeros(35, 32), f"{TABLES[0]}: expected a square number of places, got 35"),
        (TABLES[0], torch.zeros(36, 30), rf"{TABLES[0]}: expected shape \[36, 32\], got \[36, 30\]"),
        (TABLES[1], None, f"missing: {TABLES[1]}"),
        (TABLES[1], torch.zeros(16, 32), rf"{TABLES[1]}: expected shape \[25, 32\], got \[16, 32\]"),
        ("vae2llm.weight", torch.zeros(32, 13), "vae2llm.weight: expected numbers of 2 x 2 latents, got 13"),
        (
            "vit_model.vision_model.embeddings.patch_embedding.weight",
            torch.zeros(16, 49),
            "patch_embedding.weight: expected three numbers for each pixel of a square patch, got 49",
        ),
        (
            "vit_model.vision_model.embeddings.position_embedding.weight",
            torch.zeros(24, 16),
            "position_embedding.weight: expected a square number of places, got 24",
        ),
        (
            "language_model.model.layers.0.self_attn.q_norm.weight",
            torch.zeros(7),
            "q_norm.weight: expected a divisor of the width 32, got 7",
        ),
        (
            "language_model.model.layers.1.self_attn.k_proj_moe_gen.weight",
            torch.zeros(8, 32),
            r"k_proj_moe_gen.weight: expected shape \[16, 32\], got \[8, 32\]",
        ),
        ("language_model.lm_head.weight", None, "missing: language_model.lm_head.weight"),
    ],
)
def test_weights_that_are_no_model(tmp_path: Path, name: str, value: torch.Tensor | None, text: str):
    state = {**FAMILY.state(), name: value}
    refused(upstream(tmp_path, {each: x for each, x in state.items() if x is not None}), text)


@pytest.mark.parametrize(
    ("file", "changes", "text"),
    [
        ("llm", {"model_type": "llama"}, "model_type: expected 'qwen2', got 'llama'"),
        ("llm", {"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ("llm", {"use_sliding_window": True}, "use_sliding_window: expected False, got True"),
        ("llm", {"rope_scaling": {"type": "yarn"}}, "rope_scaling: expected None, got"),
        ("llm", {"rope_parameters": {"rope_type": "linear"}}, "rope_type: expected 'default', got 'linear'"),
        ("llm", {"rope_theta": 0}, "rope_theta: expected a finite number > 0, got 0"),
        ("llm", {"rope_theta": "big"}, "rope_theta: expected a finite number > 0, got 'big'"),
        ("llm", {"rms_norm_eps": None}, "eps: expected a finite number > 0, got None"),
        ("llm", {"hidden_size": 64}, "hidden_size: expected 32, as the weights have, got 64"),
        ("llm", {"intermediate_size": 47}, "intermediate_size: expected 48, as the weights have, got 47"),
        ("llm", {"num_hidden_layers": 3}, "num_hidden_layers: expected 2, as the weights have, got 3"),
        ("llm", {"num_attention_heads": 2}, "num_attention_heads: expected 4, as the weights have, got 2"),
        ("llm", {"num_key_value_heads": 4}, "num_key_value_heads: expected 2, as the weights have, got 4"),
        ("llm", {"vocab_size": "64"}, "vocab_size: expected 64, as the weights have, got '64'"),
        ("llm", {"head_dim": 16}, "head_dim: expected 8, as the weights have, got 16"),
        ("vit", {"model_type": "siglip"}, "model_type: expected 'siglip_vision_model', got 'siglip'"),
        ("vit", {"hidden_act": "gelu"}, "hidden_act: expected 'gelu_pytorch_tanh', got 'gelu'"),
        ("vit", {"num_channels": 1}, "num_channels: expected 3, got 1"),
        ("vit", {"num_hidden_layers": 2}, "num_hidden_layers: expected 3, as the weights have, got 2"),
        ("vit", {"hidden_size": [16]}, r"hidden_size: expected 16, as the weights have, got \[16\]"),
        ("vit", {"intermediate_size": 25}, "intermediate_size: expected 24, as the weights have, got 25"),
        ("vit", {"patch_size": 2}, "patch_size: expected 4, as the weights have, got 2"),
        ("vit", {"image_size": 24}, "image_size: expected 5 patches of 4 pixels, got 24"),
        ("vit", {"image_size": "20"}, "image_size: expected 5 patches of 4 pixels, got '20'"),
        ("vit", {"num_attention_heads": 3}, "vit_heads: expected a divisor of 16, got 3"),
        ("vit", {"num_attention_heads": 0}, "vit_heads: expected an integer in"),
        ("vit", {"layer_norm_eps": -1}, "vit_eps: expected a finite number > 0, got -1"),
    ],
)
def test_bad_configs(tmp_path: Path, file: str, changes: dict[str, Any], text: str):
    name = f"{file}_config"
    refused(upstream(tmp_path, **{name: changes}), text)
    with pytest.raises(ValueError, match=text):
        read_config(tmp_path)


def test_what_files_do_not_say_is_upstreams_default(tmp_path: Path):
    folder = upstream(tmp_path)
    (folder / "llm_config.json").write_text("{}")
    (folder / "vit_config.json").write_text('{"num_attention_heads": 2}')
    config = read_config(folder)
    assert (config.rope_theta, config.eps, config.vit_eps) == (10000.0, 1e-6, 1e-6)
    (folder / "vit_config.json").write_text("{}")  # 12 heads
    refused(folder, "vit_heads: expected a divisor of 16, got 12")


def test_a_loaded_model_is_accelerated(tmp_path: Path):
    model = Bagel.from_pretrained(upstream(tmp_path))
    ids = fx.bagel.TokenIds(1, 2, 3, 4)
    noise = torch.randn(6, model.config.patch_width, generator=torch.Generator().manual_seed(0))
    arguments = (noise, [fx.bagel.Text(torch.tensor([5, 6, 7]))], (32, 48), ids)
    dense = fx.bagel.sample(model, *arguments, num_timesteps=4)
    with fx.accelerate(model, fx.FlashUConfig.exact()):
        assert relative(fx.bagel.sample(model, *arguments, num_timesteps=4), dense) < 1e-5
