"""`--adapter`, and the folders that adapters are loaded from: what is right is served, what is wrong is named before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import flashu_ext as fx
from flashu_ext.cli.main import cli
from flashu_ext.models.folders import load_pipeline
from flashu_ext.models.lora import adapter_names
from flashu_ext.models.many import ImageRequest
from flashu_ext.planning.safe_files import load_safetensors, save_safetensors

peft = pytest.importorskip("peft")
from support.adapters import ATTENTION, FFN, adapted, fill  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "showo.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder of peft, and what the dense model draws with its adapter active."""
    pipe, folder = load_pipeline("nano"), tmp_path_factory.mktemp("adapter")
    wrapped = adapted(pipe.model, [*ATTENTION, *FFN, "fc1"], seed=1, use_rslora=True, rank_pattern={"q_proj": 6})
    fill(wrapped, "default", seed=1, std=0.3)
    wrapped.save_pretrained(folder)
    (result,) = pipe.generate_many([image(None)])
    return folder, result.latents


def image(adapter: str | None) -> ImageRequest:
    return ImageRequest("a red circle", 0, steps=3, adapter=adapter)


def drawn(pipe: Any, *adapters: str | None) -> list[Tensor]:
    return [each.latents for each in pipe.generate_many([image(adapter) for adapter in adapters])]


@pytest.mark.parametrize("accelerated", [False, True], ids=["before", "while accelerated"])
def test_a_loaded_adapter_is_peft_s_and_nothing_else_changes(saved: tuple[Path, Tensor], accelerated: bool) -> None:
    folder, expected = saved
    pipe = load_pipeline("nano")
    wants = [weight.requires_grad for weight in pipe.model.parameters()]
    with pipe.accelerate(*pipe.preset("exact")):
        (plain,) = drawn(pipe, None)
    weights = [*pipe.model.parameters()]
    handle = pipe.accelerate(*pipe.preset("exact")) if accelerated else None
    state = torch.get_rng_state()
    pipe.load_adapter("mine", folder)
    pipe.load_adapter("again", folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert [weight.requires_grad for weight in weights] == wants
    with handle or pipe.accelerate(*pipe.preset("exact")):
        mine, active, none, again = drawn(pipe, "mine", None, "__base__", "again")
    assert (mine - expected).norm() < 1e-4 * expected.norm() and torch.equal(mine, again)
    assert torch.equal(active, none) and (active - plain).norm() < 1e-4 * plain.norm()
    assert (mine - plain).norm() > 1e-2 * plain.norm()


def test_what_is_active_stays_active(saved: tuple[Path, Tensor]) -> None:
    pipe = load_pipeline("nano")
    wrapped = adapted(pipe.model, ["q_proj"], seed=5)
    wanted = [name for name, weight in pipe.model.named_parameters() if weight.requires_grad]
    before = drawn(pipe, None)
    pipe.load_adapter("mine", saved[0])
    assert torch.equal(drawn(pipe, None)[0], before[0]) and wrapped.active_adapters == ["default"]
    assert [name for name, weight in pipe.model.named_parameters() if weight.requires_grad] == wanted


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return change


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        found, _ = load_safetensors(folder / WEIGHTS)
        change(found)
        save_safetensors(folder / WEIGHTS, found)

    return changed


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")


def renamed(found: dict[str, Tensor]) -> None:
    for part in "AB":
        key = f"base_model.model.{Q}.lora_{part}.weight"
        found[key.replace("q_proj", "z_proj")] = found.pop(key)


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "expected a folder with adapter_config.json and adapter_model.safetensors"),
    "a pickle": (pickled, "adapter_model.bin: expected adapter_model.safetensors, got a pickle, which is never read"),
    "no config": (lambda f: (f / CONFIG).unlink(), "No such file or directory: .*adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "No such file or directory: .*adapter_model.safetensors"),
    "broken JSON": (lambda f: (f / CONFIG).write_text("{"), "adapter_config.json: "),
    "another kind": (settings(peft_type="LOHA"), "adapter_config.json: peft_type: expected 'LORA', got 'LOHA'"),
    "DoRA": (settings(use_dora=True), "adapter_config.json: use_dora: expected none, as of a plain LoRA adapter, got True"),
    "biases": (settings(bias="all"), "bias: expected 'none', got 'all'"),
    "trained parts": (settings(modules_to_save=["lm_head"]), "modules_to_save: expected none"),
    "PiSSA": (settings(init_lora_weights="pissa"), "init_lora_weights: expected one that leaves .* got 'pissa'"),
    "what is not known": (settings(use_new_kind={"a": 1}), "use_new_kind: expected none"),
    "rank": (settings(r="4"), "r: expected a int >= 1, got '4'"),
    "another rank": (settings(rank_pattern={}), r"q_proj: rank 4 in adapter_config.json, \[6, \d+\] in adapter_model"),
    "target": (settings(target_modules=["q_proj", "z_proj"]), "target_modules: the model has no module 'z_proj'"),
    "layer": (tensors(renamed), r"z_proj: expected a linear layer of the model there, got none"),
    "A alone": (tensors(lambda t: t.pop(f"base_model.model.{Q}.lora_B.weight")), "expected lora_A and lora_B, got lora_A alone"),
    "magnitudes": (
        tensors(lambda t: t.update({f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(3)})),
        "lora_magnitude_vector: expected lora_A.weight or lora_B.weight",
    ),
    "shape": (tensors(lambda t: t.update({f"base_model.model.{Q}.lora_A.weight": torch.ones(6, 5)})), "expected A and B of"),
    "two dtypes": (
        tensors(lambda t: t.update({(k := f"base_model.model.{Q}.lora_A.weight"): t[k].bfloat16()})),
        "would not run beside the model's layer: its adapter 'mine' has an A and a B of two dtypes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_folder_is_named_and_changes_nothing(saved: tuple[Path, Tensor], kind: str, tmp_path: Path) -> None:
    change, message = WRONG[kind]
    folder = tmp_path / "adapter"
    shutil.copytree(saved[0], folder)
    change(folder)
    pipe = load_pipeline("nano")
    for loaded in ([], ["first"]):  # beside none, and beside another
        for name in loaded:
            pipe.load_adapter(name, saved[0])
        modules = {path: type(module) for path, module in pipe.model.named_modules()}
        with pytest.raises((ValueError, OSError), match=message):
            pipe.load_adapter("mine", folder)
        assert adapter_names(pipe.model) == loaded
        assert {path: type(module) for path, module in pipe.model.named_modules()} == modules
        assert "peft_config" not in vars(pipe.model) or [*pipe.model.peft_config] == loaded
        assert not any(each.active_adapters for each in pipe.model.modules() if hasattr(each, "lora_A"))


@pytest.mark.parametrize("name", ["", "a.b", "__base__", 3, "first"])
def test_a_wrong_name_is_refused(saved: tuple[Path, Tensor], name: Any) -> None:
    pipe = load_pipeline("nano")
    pipe.load_adapter("first", saved[0])
    with pytest.raises((TypeError, ValueError), match="name: expected"):
        pipe.load_adapter(name, saved[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a"], "--adapter a: expected NAME=FOLDER"),
        (["nano=FOLDER"], "--adapter nano=.*: name: expected each once, and none that is the model's, got 'nano'"),
        (["a=FOLDER", "a=FOLDER"], "name: expected each once"),
        (["__base__=FOLDER"], "name: expected one without dots and other than '__base__'"),
        (["a=WRONG"], "'WRONG': expected a folder with"),
    ],
)
def test_the_server_refuses_before_it_listens(saved: Any, options: list[str], message: str, monkeypatch: Any) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from flashu_ext.server import run

    monkeypatch.setattr(run, "listen", lambda *_: pytest.fail("it listens"))
    told = [word for each in options for word in ("--adapter", each.replace("FOLDER", str(saved[0])))]
    result = CliRunner().invoke(cli, ["serve", "--port", "0", *told])
    assert result.exit_code != 0
    with pytest.raises(ValueError, match=message):
        raise ValueError(" ".join(result.output.split()))
    result = CliRunner().invoke(cli, ["serve", "--port", "0", "--preset", "dense", "--adapter", f"a={saved[0]}"])
    assert "--adapter: expected none with --preset dense" in result.output


def test_the_server_has_the_adapters_that_it_was_told_of(saved: Any, monkeypatch: Any) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from flashu_ext.server import run

    seen: dict[str, Any] = {}

    def serve_on(self: Any, listener: Any) -> None:
        service = self.config.app.state.service
        seen["models"] = service.models
        seen["drawn"] = drawn(service.pipe, "mine", None)
        assert fx.handle_of(service.pipe.model) is not None

    monkeypatch.setattr(run.Server, "serve_on", serve_on)
    told = ["--adapter", f"mine={saved[0]}", "--adapter", f"other={saved[0]}"]
    result = CliRunner().invoke(cli, ["serve", "--port", "0", "--device", "cpu", *told])
    assert result.exit_code == 0, result.output
    assert seen["models"] == ["nano", "mine", "other"]
    mine, plain = seen["drawn"]
    assert (mine - saved[1]).norm() < 1e-4 * mine.norm() < (mine - plain).norm()
