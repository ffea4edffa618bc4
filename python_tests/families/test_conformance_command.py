"""Every family against the outputs of its unmodified upstream program, and the command that compares them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.conformance import FIXTURES, released_shapes

from flashu_ext.bench.conformance import compare, main
from flashu_ext.models.comparison import Comparison, Fixture, compared, same

FOLDERS = ("conformance", "janusflow", "bagel")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_comparison_holds(folder: str) -> None:
    found = list(compare(FIXTURES / folder))
    assert [f"{how} {one.name}: {one.error}" for how, one in found if not one.holds] == []
    names = [one.name for how, one in found if how == "dense"]
    assert len(set(names)) == len(names) >= 5
    for how in {how for how, _ in found}:
        kinds = {one.name.split()[0].rstrip(":").replace("drawing", "draw") for own, one in found if own == how}
        assert {"draw", "question"} <= kinds


def changed(folder: Path, to: Path, change: Any) -> Path:
    shutil.copytree(folder, to)
    change(to)
    return to


def with_weight(name: str, change: Any) -> Any:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights[name])
        save_file(weights, folder / "model.safetensors")

    return apply


SMALL_FAULTS = (
    ("janusflow", "vision_gen_dec_aligner_norm.weight"),
    ("janusflow", "beg_of_und_embed"),
    ("bagel", "latent_pos_embed.pos_embed"),
    ("bagel", "language_model.model.layers.2.self_attn.q_norm_moe_gen.weight"),
    ("bagel", "vit_pos_embed.pos_embed"),
)


@pytest.mark.parametrize(("family", "name"), SMALL_FAULTS)
def test_a_changed_weight_is_a_miss(family: str, name: str, tmp_path: Path) -> None:
    folder = changed(FIXTURES / family, tmp_path / "copy", with_weight(name, lambda weight: weight.mul_(1.01)))
    result = CliRunner().invoke(main, [str(folder)])
    assert result.exit_code == 1 and "MISSED" in result.output and "comparisons missed" in result.output


def test_the_command_prints_every_comparison() -> None:
    result = CliRunner().invoke(main, [str(FIXTURES / "janusflow"), str(FIXTURES / "bagel")])
    assert result.exit_code == 0, result.output
    for text in ("draw 1: latents", "TaylorSeer again: latents", "edit 2: velocity", "exact  question 1: words"):
        assert text in result.output
    assert result.output.rstrip().endswith("every comparison holds")


def write(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "fixture.json").unlink(), "expected a folder of upstream's outputs"),
        (write("fixture.json", "{"), "fixture.json"),
        (write("fixture.json", '{"model": {}, "family": "chameleon"}'), "expected outputs of a known family"),
        (write("fixture.json", '{"model": {}, "family": "../showo2"}'), "expected outputs of a known family"),
        (lambda folder: (folder / "model.safetensors").unlink(), "Missing key"),
    ],
)
def test_what_cannot_be_read_is_named(change: Any, message: str, tmp_path: Path) -> None:
    folder = changed(FIXTURES / "janusflow", tmp_path / "copy", change)
    result = CliRunner().invoke(main, [str(folder)])
    assert result.exit_code == 2 and message in result.output, result.output


def test_a_comparison_with_nan_never_holds() -> None:
    one = torch.ones(3)
    assert not compared("", one * float("nan"), one).holds and compared("", one, one).holds
    assert same("", one.long(), one.long()).holds and not same("", one.long(), torch.tensor([1, 1, 2])).holds
    assert not Comparison("", 2e-4).holds
    with pytest.raises(ValueError, match="expected shape"):
        compared("", one, one[:2])


@pytest.mark.parametrize("family", ["janusflow", "bagel"])
def test_the_released_sizes(family: str) -> None:
    """Names and shapes of the released checkpoints, as lists of them say."""
    from importlib import import_module

    fx_family: Any = import_module(f"flashu_ext.models.{family}")
    config, model = {"janusflow": ("JanusFlowConfig", "JanusFlow"), "bagel": ("BagelConfig", "Bagel")}[family]
    with torch.device("meta"):
        built = getattr(fx_family, model)(getattr(fx_family, config)())
    assert {name: list(value.shape) for name, value in built.state_dict().items()} == released_shapes(family)


def test_a_fixture_names_its_family() -> None:
    assert [Fixture.read(FIXTURES / folder).family for folder in FOLDERS] == ["showo2", "janusflow", "bagel"]
