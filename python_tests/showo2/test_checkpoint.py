"""Checkpoint folders: saved ones load, upstream's layouts load, and malformed ones are refused by name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.conformance import public

import flashu_ext as fx


@pytest.fixture(scope="module")
def model() -> Any:
    return public().model()


@pytest.fixture(scope="module")
def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def upstream_dir(folder: Path, **changes: Any) -> Path:
    """A folder as upstream's save_pretrained writes it, without weights."""
    m = public().spec["model"]
    for name, fields in {
        "llm": {"num_attention_heads": m["heads"], "rope_theta": m["rope_theta"], "rms_norm_eps": m["rms_norm_eps"]}
        | {"tie_word_embeddings": m["tie_word_embeddings"]},
        "clip": {"vision_config": {"num_attention_heads": 4}},
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(fields))
    config = {
        "_class_name": "Showo2Qwen2_5",
        "_diffusers_version": "0.31.0",
        "llm_vocab_size": m["vocab"],
        "llm_model_path": "llm",
        "clip_pretrained_model_path": "clip",
        "hidden_size": m["hidden"],
        "clip_latent_dim": m["clip"],
        "image_latent_dim": m["image_latent_dim"],
        "image_latent_height": m["grid"],
        "image_latent_width": m["grid"],
        "patch_size": m["patch_size"],
        "add_time_embeds": True,
        "add_qk_norm": True,
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def evaluate(model: Any) -> torch.Tensor:
    i = public().sample_inputs
    return model.t2i_generate(
        image_latents=i["noise"],
        t=torch.full((len(i["noise"]),), 0.3),
        text_tokens=i["text_tokens"],
        modality_positions=i["modality_positions"],
    )


def test_round_trip_is_bitwise(tmp_path: Path, model: Any):
    model.save_pretrained(tmp_path / "new")
    loaded = fx.showo2.Showo2.from_pretrained(tmp_path / "new")
    assert not loaded.training and loaded.config == model.config
    ours, theirs = dict(loaded.named_buffers()), dict(model.named_buffers())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(evaluate(loaded), evaluate(model))
    assert [p for p in (tmp_path / "new").iterdir() if p.name.startswith(".")] == []


def test_dtype(tmp_path: Path, model: Any):
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in fx.showo2.Showo2.from_pretrained(tmp_path, torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "pytorch_model"])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
def test_upstream_layouts(tmp_path: Path, model: Any, state: dict, kind: str, stem: str):
    folder = upstream_dir(tmp_path)
    suffix = kind.split()[-1]

    def write(tensors: dict, name: str) -> None:
        (save_file if suffix == "safetensors" else torch.save)(tensors, folder / name)

    if kind.startswith("sharded"):
        names = sorted(state)
        shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
        for file, held in shards.items():
            write({name: state[name] for name in held}, file)
        weight_map = {name: file for file, held in shards.items() for name in held}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        write(state, f"{stem}.{suffix}")
    loaded = fx.showo2.Showo2.from_pretrained(folder)
    assert torch.equal(evaluate(loaded), evaluate(model))


def refused(folder: Path, text: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=text):
        fx.showo2.Showo2.from_pretrained(folder)


def test_missing_parts(tmp_path: Path, state: dict):
    refused(tmp_path / "nowhere", "expected a folder", FileNotFoundError)
    refused(tmp_path, r"config\.json", FileNotFoundError)
    folder = upstream_dir(tmp_path)
    refused(folder, "expected weights", FileNotFoundError)


def test_names_and_shapes_are_strict(tmp_path: Path, state: dict):
    folder = upstream_dir(tmp_path)
    path = folder / "model.safetensors"
    some = "showo.model.layers.0.mlp.up_proj.weight"
    save_file({name: t for name, t in state.items() if name != some}, path)
    refused(folder, f"missing: {some}")
    save_file({**state, "extra": torch.zeros(1)}, path)
    refused(folder, "unexpected: extra")
    save_file({**state, some: torch.zeros(3, 3)}, path)
    refused(folder, rf"{some}: expected shape .* got \[3, 3\]")
    save_file({**state, some: torch.zeros(state[some].shape, dtype=torch.int64)}, path)
    refused(folder, "floating dtype")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"_class_name": "Other"}, "_class_name"),
        ({"hidden_size": 12}, "hidden_size"),
        ({"llm_model_path": "gone"}, "llm_model_path"),
        ({"patch_size": -1}, "patch_size"),
        ({"clip_pretrained_model_path": "somewhere"}, "clip_pretrained_model_path"),
    ],
)
def test_bad_configs(tmp_path: Path, state: dict, changes: dict, text: str):
    folder = upstream_dir(tmp_path, **changes)
    save_file(state, folder / "model.safetensors")
    refused(folder, text)


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"a":1,"a":2}', '{"format":NaN}', '{"format":"flashu_ext.models.showo2"}']
)
def test_malformed_json(tmp_path: Path, state: dict, text: str):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, r"config\.json")


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("flashu_was_here"),))


def test_pickles_are_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = upstream_dir(tmp_path)
    for content in (pickle.dumps({"a": Hostile()}), b"", b"PK\x03\x04 not a zip"):
        (folder / "pytorch_model.bin").write_bytes(content)
        refused(folder, "not a file of plain tensors")
    torch.save([1, 2], folder / "pytorch_model.bin")
    refused(folder, "expected a dict")
    assert not Path("flashu_was_here").exists()


def test_truncated_weights(tmp_path: Path, model: Any):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(tmp_path, "model.safetensors")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.bin", "x.txt", 3])
def test_index_stays_in_its_folder(tmp_path: Path, file: Any):
    folder = upstream_dir(tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    refused(folder, "expected the name of a")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch):
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
