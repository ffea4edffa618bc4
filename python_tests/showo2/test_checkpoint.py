"""Show-o2's checkpoint folders: names and kinds of weight files, pickles, and what upstream's config.json may say. What all
families have in common is in families/test_checkpoint_folders.py."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import FAMILIES, write_weights

FAMILY = FAMILIES["showo2"]


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "pytorch_model"])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
def test_upstream_layouts(tmp_path: Path, kind: str, stem: str):
    folder, state = FAMILY.upstream(tmp_path), FAMILY.state()
    write_weights(state, folder, stem, sharded=kind.startswith("sharded"), suffix=kind.split()[-1])
    loaded = FAMILY.kind.from_pretrained(folder)
    assert loaded.config == FAMILY.config == FAMILY.layout.read_config(folder)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def refused(folder: Path, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FAMILY.kind.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"_class_name": "Other"}, "_class_name"),
        ({"hidden_size": 12}, "hidden_size: expected 32, as the weights have, got 12"),
        ({"llm_model_path": "gone"}, "llm_model_path"),
        ({"patch_size": -1}, "patch_size"),
        ({"clip_pretrained_model_path": "somewhere"}, "clip_pretrained_model_path"),
    ],
)
def test_bad_configs(tmp_path: Path, changes: dict[str, Any], text: str):
    write_weights(FAMILY.state(), FAMILY.upstream(tmp_path, config=changes), "model")
    refused(tmp_path, text)


def test_scaled_frequencies_are_refused(tmp_path: Path):
    scaled = {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    write_weights(FAMILY.state(), FAMILY.upstream(tmp_path, **{"llm/config": scaled}), "model")
    refused(tmp_path, "the language model's rope_scaling: expected None, got")


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("flashu_was_here"),))


def test_pickles_are_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = FAMILY.upstream(tmp_path)
    for content in (pickle.dumps({"a": Hostile()}), b"", b"PK\x03\x04 not a zip"):
        (folder / "pytorch_model.bin").write_bytes(content)
        refused(folder, "not a file of plain tensors")
    torch.save([1, 2], folder / "pytorch_model.bin")
    refused(folder, "expected a dict")
    assert not Path("flashu_was_here").exists()
