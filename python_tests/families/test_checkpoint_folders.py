"""Checkpoint folders of all families: saved ones load, upstream's load, and malformed ones are refused by name."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.checkpoints import FAMILIES, Family, write_weights

from flashu_ext.models import folders


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def same(loaded: Any, model: Any) -> None:
    """Configuration, weights, buffers and what takes gradients are the same, bit by bit."""
    assert not loaded.training and loaded.config == model.config
    for of in (torch.nn.Module.state_dict, lambda each: dict(each.named_buffers())):
        ours, theirs = of(loaded), of(model)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    ours, theirs = dict(loaded.named_parameters()), dict(model.named_parameters())
    assert {name: each.requires_grad for name, each in ours.items()} == {
        name: each.requires_grad for name, each in theirs.items()
    }


def refused(family: Family, folder: Path, text: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=text):
        family.kind.from_pretrained(folder)


def test_round_trip(tmp_path: Path, family: Family):
    model = family.model()
    model.save_pretrained(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]
    same(family.kind.from_pretrained(tmp_path / "new"), model)
    assert family.layout.read_config(tmp_path / "new") == model.config


@pytest.mark.parametrize("sharded", [False, True])
def test_upstreams_layout(tmp_path: Path, family: Family, sharded: bool):
    folder = family.upstream(tmp_path)
    write_weights(family.state(), folder, family.stem, sharded=sharded)
    same(family.kind.from_pretrained(folder), family.model())
    assert family.layout.read_config(folder) == family.model().config


@pytest.mark.parametrize("layout", ["upstream", "own", "weights are missing"])
def test_a_folder_says_of_which_family_it_is(tmp_path: Path, family: Family, layout: str):
    folder = family.upstream(tmp_path) if layout == "upstream" else tmp_path / "own"
    if layout == "upstream":
        write_weights(family.state(), folder, family.stem)
    else:
        family.model().save_pretrained(folder)
    name = next(name for name, each in FAMILIES.items() if each is family)
    if layout == "weights are missing":
        (folder / "model.safetensors").unlink()
        assert folders.family_in(folder) == name
        return
    assert folders.family_in(folder) == name
    with torch.device("meta"):
        shell = folders.shell_of(folder)
    assert type(shell) is family.kind and shell.config == family.model().config


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_saved_over_upstreams_counts(tmp_path: Path, family: Family, sharded: bool):
    folder = family.upstream(tmp_path)
    write_weights(
        {name: torch.zeros_like(x) for name, x in family.state().items()}, folder, family.stem, sharded=sharded
    )
    family.model().save_pretrained(folder)
    same(family.kind.from_pretrained(folder), family.model())
    assert family.layout.read_config(folder) == family.model().config


def test_dtypes(tmp_path: Path, family: Family):
    folder = family.upstream(tmp_path)
    write_weights({name: x.bfloat16() for name, x in family.state().items()}, folder, family.stem)
    for asked, got in ((None, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float16)):
        loaded = family.kind.from_pretrained(folder, asked)
        assert {each.dtype for each in loaded.parameters()} == {got}
        assert all(b.dtype == torch.float32 for name, b in loaded.named_buffers() if "inv_freq" in name)
    for asked in (torch.int64, torch.float8_e4m3fn, "bf16"):
        with pytest.raises(ValueError, match="dtype: expected None or a floating dtype"):
            family.kind.from_pretrained(folder, asked)


def test_a_tied_head_is_not_stored(tmp_path: Path, family: Family):
    model = family.kind(family.tied).eval()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    (head,) = set(model.state_dict()) - names
    assert head == f"{family.layout.language_model}.lm_head.weight"
    loaded = family.kind.from_pretrained(tmp_path)
    same(loaded, model)
    llm = loaded.get_submodule(family.layout.language_model)
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    model.load_state_dict({name: x for name, x in model.state_dict().items() if name != head})


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_stored_as_it_is(tmp_path: Path, family: Family, tied: bool):
    """Whatever the config says: a caller has untied it, or tied it."""
    model = family.model() if tied else family.kind(family.tied).eval()
    llm = model.get_submodule(family.layout.language_model)
    table = llm.model.embed_tokens.weight
    llm.lm_head.weight = table if tied else torch.nn.Parameter(table.detach() + 1)
    model.save_pretrained(tmp_path)
    loaded = family.kind.from_pretrained(tmp_path)
    assert [name for name, each in model.state_dict().items() if not torch.equal(loaded.state_dict()[name], each)] == []
    again = loaded.get_submodule(family.layout.language_model)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == again.config.tie_word_embeddings == tied


def test_another_head_than_the_tied_one_is_refused(tmp_path: Path, family: Family):
    model = family.kind(family.tied).eval()
    head = f"{family.layout.language_model}.lm_head.weight"
    state = {name: each.clone() for name, each in model.state_dict().items()}
    model.load_state_dict(state)  # equal values are no other head
    before = {name: each.clone() for name, each in model.state_dict().items()}
    state = {name: each + 1 for name, each in state.items()}
    state[head] = state[head] + 1
    for assign in (False, True):
        with pytest.raises(ValueError, match=rf"{head}: expected the values of .*the same weight in this model"):
            model.load_state_dict(state, assign=assign)
    assert [name for name, each in model.state_dict().items() if not torch.equal(before[name], each)] == []
    model.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    refused(family, tmp_path, rf"{tmp_path.name}: {head}: expected the values of")


def test_missing_parts(tmp_path: Path, family: Family):
    refused(
        family, tmp_path / "nowhere", f"expected a folder with a {family.layout.name} checkpoint", FileNotFoundError
    )
    refused(family, tmp_path, r"expected config\.json in the checkpoint folder", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match=r"expected config\.json in the checkpoint folder"):
        family.layout.read_config(tmp_path / "nowhere")
    folder = family.upstream(tmp_path)
    refused(family, folder, rf"expected weights: {family.stem}\.safetensors.*or their .index.json", FileNotFoundError)
    for name in family.layout.configs:
        family.upstream(tmp_path)
        (folder / name).unlink()
        refused(family, folder, rf"expected {name} in the checkpoint folder", FileNotFoundError)


def test_a_shard_is_missing(tmp_path: Path, family: Family):
    folder = family.upstream(tmp_path)
    write_weights(family.state(), folder, family.stem, sharded=True)
    (folder / f"{family.stem}-00002-of-00002.safetensors").unlink()
    refused(family, folder, f"its shard {family.stem}-00002-of-00002.safetensors is missing", FileNotFoundError)


@pytest.mark.parametrize("own", [False, True])
def test_names_shapes_and_dtypes_are_strict(tmp_path: Path, family: Family, own: bool):
    family.model().save_pretrained(tmp_path) if own else family.upstream(tmp_path)
    state, path = family.state(), tmp_path / f"{'model' if own else family.stem}.safetensors"
    some, up = family.weight, state[family.weight]
    for change, text in (
        ({some: None}, f"missing: {some}"),
        ({"gen_head.weight": torch.zeros(2)}, "unexpected: gen_head.weight"),
        ({some: torch.zeros(3, 3)}, rf"{some}: expected shape .* got \[3, 3\]"),
        ({some: torch.zeros(up.shape, dtype=torch.int64)}, f"{some}: expected a floating dtype of"),
        ({some: up.to(torch.float8_e4m3fn)}, f"{some}: expected a floating dtype of"),
        ({some.replace(".0.", ".7."): up.clone()}, "expected layers 0 to"),
    ):
        save_file({name: x for name, x in {**state, **change}.items() if x is not None}, path)
        refused(family, tmp_path, text)


def test_a_layer_more_than_the_weights_have(tmp_path: Path, family: Family):
    family.model().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    depth = fields["llm"] if "llm" in fields else fields
    name = "num_hidden_layers" if "llm" in fields else "layers"
    depth[name] += 1
    (tmp_path / "config.json").write_text(json.dumps(fields))
    refused(family, tmp_path, f"{name}.*expected {depth[name] - 1}, as the weights have, got {depth[name]}")


def test_truncated_weights(tmp_path: Path, family: Family):
    folder = family.upstream(tmp_path)
    path = write_weights(family.state(), folder, family.stem)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(family, folder, path.name)
        with pytest.raises(ValueError, match=path.name):
            family.layout.read_config(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a":1,"a":2}', '{"format":NaN}', '{"rms_norm_eps":1e999}'])
def test_malformed_json(tmp_path: Path, family: Family, text: str):
    write_weights(family.state(), tmp_path, family.stem)
    for name in family.layout.configs:
        (family.upstream(tmp_path) / name).write_text(text)
        refused(family, tmp_path, name)
    (tmp_path / "own").mkdir()
    family.model().save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "config.json").write_text(text)
    refused(family, tmp_path / "own", r"config\.json")


@pytest.mark.parametrize("form", ["flashu_ext.other", 3, None, ["flashu_ext"]])
def test_another_format(tmp_path: Path, family: Family, form: Any):
    family.model().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "format": form}))
    refused(family, tmp_path, f"expected a JSON object with format '{family.layout.config.FORMAT}'")


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.txt", ".x.safetensors", 3]
)
def test_an_index_stays_in_its_folder(tmp_path: Path, family: Family, file: Any):
    folder = family.upstream(tmp_path)
    index = folder / f"{family.stem}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    refused(family, folder, "expected the name of a .* file in the folder")


def test_only_regular_files_are_read(tmp_path: Path, family: Family):
    for name in (*family.layout.configs, f"{family.stem}.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        write_weights(family.state(), family.upstream(folder), family.stem)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(family, folder, "expected a regular file, got a FIFO")
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        refused(family, folder, "expected a regular file, got a character device")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch):
    model = family.model()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_configs_are_written_and_read_strictly(family: Family):
    kind, config = family.layout.config, family.model().config
    assert kind.from_json(config.to_json()) == config
    fields, name = json.loads(config.to_json()), kind.__name__
    for text, message in (
        (json.dumps({**fields, "depth": 3}), f"{name}: unknown field 'depth'"),
        (json.dumps({"format": kind.FORMAT, "eps": math.nan}), "NaN is not allowed"),
        ("[]", f"{name}: expected a JSON object with format '{kind.FORMAT}'"),
    ):
        with pytest.raises(ValueError, match=message):
            kind.from_json(text)
