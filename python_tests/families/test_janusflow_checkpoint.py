"""JanusFlow's checkpoint folders: saved ones load, upstream's load, and malformed ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.conformance import FIXTURES

import flashu_ext as fx
from flashu_ext.models.comparison import Fixture
from flashu_ext.models.janusflow.checkpoint import read_config
from flashu_ext.models.janusflow.conformance import model_of

FIXTURE = Fixture.read(FIXTURES / "janusflow")
JanusFlow, JanusFlowConfig = fx.janusflow.JanusFlow, fx.janusflow.JanusFlowConfig

SMALL = JanusFlowConfig(
    **{"hidden": 32, "inter": 48, "layers": 2, "heads": 4, "kv": 2, "vocab": 64, "channels": 8, "rope_theta": 500.0},
    **{"vit": 768, "vit_layers": 1, "vit_heads": 12, "vit_ratio": 1, "vit_patch": 4, "image_size": 8, "eps": 1e-5},
)
"""What upstream's code fixes is as there: 24 image tokens a side, and a published width of SigLIP."""

LANGUAGE = {"model_type": "llama", "num_attention_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 500.0}
UPSTREAM = {"model_type": "multi_modality", "architectures": ["MultiModalityCausalLM"], "torch_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def small() -> Any:
    torch.manual_seed(0)
    return JanusFlow(SMALL).eval()


@pytest.fixture(scope="module")
def state(small: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in small.state_dict().items()}


def upstream(folder: Path, language: Any = None, **changes: Any) -> Path:
    """A folder as upstream's, without weights."""
    language = LANGUAGE if language is None else language
    (folder / "config.json").write_text(json.dumps({**UPSTREAM, "language_config": language, **changes}))
    return folder


def evaluate(model: Any) -> torch.Tensor:
    config = model.config
    torch.manual_seed(1)
    noise = torch.randn(1, config.latent_channels, config.latent_size, config.latent_size)
    return fx.janusflow.sample(model, noise, torch.tensor([1, 2, 3, 4]), steps=1)


def test_round_trip_is_bitwise(tmp_path: Path):
    model = model_of(FIXTURE)
    model.save_pretrained(tmp_path / "new")
    loaded = JanusFlow.from_pretrained(tmp_path / "new")
    assert not loaded.training and loaded.config == model.config == read_config(tmp_path / "new")
    ours, theirs = dict(loaded.named_buffers()), dict(model.named_buffers())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(evaluate(loaded), evaluate(model))
    bf16 = JanusFlow.from_pretrained(tmp_path / "new", torch.bfloat16)
    assert {p.dtype for p in bf16.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("sharded", [False, True])
def test_upstreams_layout(tmp_path: Path, small: Any, state: dict, sharded: bool):
    folder = upstream(tmp_path)
    if sharded:
        names = sorted(state)
        shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for file, held in shards.items():
            save_file({name: state[name] for name in held}, folder / file)
        weight_map = {name: file for file, held in shards.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        save_file(state, folder / "model.safetensors")
    loaded = JanusFlow.from_pretrained(folder)
    assert loaded.config == SMALL == read_config(folder)
    torch.testing.assert_close(evaluate(loaded), evaluate(small))


def test_a_tied_head_is_not_stored(tmp_path: Path):
    config = JanusFlowConfig(**{**FIXTURE.spec["model"], "tie_word_embeddings": True})
    model = JanusFlow(config).eval()
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert set(model.state_dict()) - names == {"language_model.lm_head.weight"}
    loaded = JanusFlow.from_pretrained(tmp_path)
    assert loaded.language_model.lm_head.weight is loaded.language_model.model.embed_tokens.weight
    torch.testing.assert_close(evaluate(loaded), evaluate(model))


def refused(folder: Path, text: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=text):
        JanusFlow.from_pretrained(folder)


def test_missing_parts(tmp_path: Path, state: dict):
    refused(tmp_path / "nowhere", "expected a folder with a JanusFlow checkpoint", FileNotFoundError)
    refused(tmp_path, r"config\.json", FileNotFoundError)
    folder = upstream(tmp_path)
    torch.save(state, folder / "pytorch_model.bin")
    refused(folder, "expected weights: model.safetensors, .*or their", FileNotFoundError)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    refused(folder, "expected the name of a .safetensors file in the folder")


def test_names_and_shapes_are_strict(tmp_path: Path, state: dict):
    folder, path = upstream(tmp_path), tmp_path / "model.safetensors"
    some = "language_model.model.layers.0.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in state.items() if name != some}, path)
    refused(folder, f"missing: {some}")
    save_file({**state, "gen_head.weight": torch.zeros(2)}, path)
    refused(folder, "unexpected: gen_head.weight")
    save_file({**state, "beg_of_und_embed": torch.zeros(2, 32)}, path)
    refused(folder, r"beg_of_und_embed: expected shape \[1, 32\], got \[2, 32\]")
    decoder = [name for name in state if name.startswith("vision_gen_dec_model.mid_block.res_blocks.1.")]
    save_file({name: tensor for name, tensor in state.items() if name not in decoder}, path)
    refused(folder, "blocks: expected 1, as the weights have, got 2")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "llama"}, "expected model_type 'multi_modality' or our own format, got 'llama'"),
        ({"language_config": None}, "language_config: expected an object, got None"),
        ({"language": {**LANGUAGE, "num_attention_heads": 3}}, r"num_attention_heads.*divisor of the width 32, got 3"),
        (
            {"language": {**LANGUAGE, "num_hidden_layers": 3}},
            r"num_hidden_layers.*expected 2, as the weights have, got 3",
        ),
        ({"language": {**LANGUAGE, "attention_bias": True}}, r"attention_bias.*expected False, got True"),
        ({"language": {**LANGUAGE, "rope_scaling": {"type": "linear"}}}, r"rope_scaling.*expected None, got"),
        ({"language": {**LANGUAGE, "model_type": "qwen2"}}, r"model_type.*expected 'llama', got 'qwen2'"),
        ({"language": {**LANGUAGE, "rope_theta": "big"}}, "rope_theta: expected a finite number > 0, got 'big'"),
        ({"language": {**LANGUAGE, "rms_norm_eps": -1}}, "eps: expected a finite number > 0, got -1"),
        ({"format": "flashu_ext.showo2"}, "expected a JSON object with format 'flashu_ext.janusflow'"),
    ],
)
def test_bad_configs(tmp_path: Path, state: dict, changes: dict, text: str):
    folder = upstream(tmp_path, **changes)
    save_file(state, folder / "model.safetensors")
    refused(folder, text)


def test_another_width_of_siglip_is_named(tmp_path: Path, state: dict):
    folder = upstream(tmp_path)
    pos = "vision_und_enc_model.vision_tower.pos_embed"
    save_file({**state, pos: torch.zeros(1, 4, 700)}, folder / "model.safetensors")
    refused(folder, r"expected the width of a published SigLIP tower \(768, 1024, 1152\), got 700")
    save_file({**state, pos: torch.zeros(1, 5, 768)}, folder / "model.safetensors")
    refused(folder, "expected a square number of places, got 5")


def test_the_config_is_written_and_read_strictly():
    assert JanusFlowConfig.from_json(SMALL.to_json()) == SMALL
    assert JanusFlowConfig.from_json(JanusFlowConfig().to_json()) == JanusFlowConfig()
    fields = json.loads(SMALL.to_json())
    for text, message in (
        (json.dumps({**fields, "depth": 3}), "JanusFlowConfig: unknown field 'depth'"),
        (json.dumps({**fields, "layers": 0}), r"layers: expected an integer in \[1, 512\], got 0"),
        ('{"format": "flashu_ext.janusflow", "eps": NaN}', "NaN is not allowed"),
        ("[]", "expected a JSON object with format 'flashu_ext.janusflow'"),
    ):
        with pytest.raises(ValueError, match=message):
            JanusFlowConfig.from_json(text)
