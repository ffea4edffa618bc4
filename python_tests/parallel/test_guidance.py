"""Guidance on two gloo ranks: equal on both, as accurate as one process, refused where branches are decided on together."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from support import guided_cases
from support.conformance import relative
from support.ranks import DYING, run_ranks
from torch import Tensor

import flashu_ext as fx
from flashu_ext.batch import check_guidance_parallel
from flashu_ext.cli.main import cli
from flashu_ext.models.showo2 import sample

PROGRAM = "import runpy, sys; sys.argv[0] = sys.argv.pop(1); runpy.run_path(sys.argv[0], run_name='__main__')"


LIMIT = 1e-4


@pytest.fixture(scope="module")
def ranks_outputs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Tensor], dict[str, str]]]:
    """Tensors and refusals of both ranks."""
    out = tmp_path_factory.mktemp("guided")
    for code, said in run_ranks(PROGRAM, guided_cases.__file__, str(out)):
        assert code == 0, said
    return [(load_file(out / f"{rank}.safetensors"), json.loads((out / f"{rank}.json").read_text())) for rank in (0, 1)]


@functools.cache
def true_image(name: str) -> tuple[Tensor, Tensor]:
    """Latents and velocities in fp64 on one process; exact settings give the image of the dense model."""
    config = guided_cases.CONFIGS[name]
    exact = config is None or not config.approximates
    return guided_cases.generate(sample, "dense" if exact else name, torch.float64)


@pytest.mark.parametrize(("name", "dtype"), guided_cases.CASES)
def test_two_ranks_are_as_accurate_as_one_process(ranks_outputs: Any, name: str, dtype: str) -> None:
    both = [[tensors[f"{name} {dtype} {what}"] for what in ("latents", "velocities")] for tensors, _ in ranks_outputs]
    single = guided_cases.generate(sample, name, guided_cases.DTYPES[dtype])
    truth = true_image(name)
    for ours, others, one, exact in zip(*both, single, truth, strict=True):
        assert torch.equal(ours, others), "both ranks hold the same bits"
        assert ours.dtype == one.dtype
        # Rounding grows from step to step of an image, so the tolerance of an operator does not apply.
        assert relative(ours, exact) <= max(2 * relative(one, exact), LIMIT)
    config = guided_cases.CONFIGS[name]
    if config is not None and config.approximates:
        assert (truth[0] - true_image("dense")[0]).abs().max() > 1e-3, "the setting changes the image"


def test_steps_of_an_exact_model_are_the_callers(ranks_outputs: Any) -> None:
    (ours, _), (others, _) = ranks_outputs
    arguments = ("exact", torch.float32), ("exact", torch.float64)
    one, truth = (guided_cases.generate(sample, *of, steps=3)[0] for of in arguments)
    assert torch.equal(ours["exact, 3 steps"], others["exact, 3 steps"])
    assert relative(ours["exact, 3 steps"], truth) <= max(2 * relative(one, truth), LIMIT)


def test_refusals_are_the_same_on_both_ranks(ranks_outputs: Any) -> None:
    (_, first), (_, second) = ranks_outputs
    assert first == second
    for what, message in (
        ("no group", "group: expected an initialised process group, got none"),
        ("one branch", "guidance_scale: expected a number above 0"),
        ("one step", "steps: expected an integer in [2, 10000] (grid points), got 1"),
        ("other arguments", "group: expected the same noise, tokens, spans"),
        ("other steps", "steps: expected None or 6, which the model was accelerated for"),
    ):
        assert message in first[what]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (fx.FlashUConfig(skip_unit_guidance=True), "FlashUConfig.skip_unit_guidance: expected False"),
        (fx.FlashUConfig.paper(), "FlashUConfig.layer_skip_ratio: expected 0 under guidance-parallel"),
    ],
)
def test_settings_decided_by_both_branches_are_refused(config: fx.FlashUConfig, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_guidance_parallel(config, None, 28, 729)


def test_settings_that_round_down_to_nothing_are_accepted() -> None:
    check_guidance_parallel(fx.FlashUConfig.paper(), None, 4, 36)
    check_guidance_parallel(fx.FlashUConfig.exact(), 7, 28, 729)
    check_guidance_parallel(fx.FlashUConfig(head_cache_interval=2), 50, 28, 729)
    check_guidance_parallel(fx.FlashUConfig.fast(), None, 28, 729)


HANGING = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from functools import partial
from support.guided_cases import generate
from flashu_ext.batch import Heartbeat, Ranks, guidance, guidance_group, sample_guided
guidance.STOP_SECONDS = 0.5
ranks = Ranks.from_environment()
with Heartbeat.join(ranks) as heartbeat, guidance_group(heartbeat, torch.device("cpu"), timeout=120) as group:
    def hang(step, latents):
        time.sleep(8 * ranks.rank)
    try:
        generate(partial(sample_guided, group=group, stop=lambda: ranks.rank == 0), "exact", torch.float32, callback=hang)
        print("finished")
    except RuntimeError as error:
        print(error)
"""


def test_a_rank_that_hangs_is_waited_for_until_the_caller_stops() -> None:
    (code, said), _ = run_ranks(HANGING, str(Path(guided_cases.__file__).parents[1]))
    assert code == 0 and "rank 1 is gone" in said and "stopped while waiting for it" in said


def test_a_rank_that_dies_costs_no_finished_image(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    command = ["generate", "--prompts", str(prompts), "--steps", "4", "--preset", "paper"]
    out, alone = tmp_path / "apart", tmp_path / "together"
    arguments = (*command, "--out", str(out), "--parallel", "guidance", "--patience", "3")
    (code, said), (killed, _) = run_ranks(DYING, *arguments, VICTIM="1", FATAL="1", AWAIT=str(out))
    assert (code, killed) == (1, -9) and said.startswith("Error: rank 1 is gone, it does not answer"), said
    assert f"{out}: 1 of 2 images are missing (0001-a-blue-square.png); the same command generates them" in said
    assert CliRunner().invoke(cli, [*command, "--out", str(alone)]).exit_code == 0
    ours, one = (np.asarray(Image.open(folder / "0000-a-red-circle.png")).astype(int) for folder in (out, alone))
    assert np.abs(ours - one).max() <= 1, "at most one grey level, by rounding"
    # One process generates the same images, so the manifest of the folder still applies.
    other = CliRunner().invoke(cli, [*command, "--out", str(out)])
    assert other.exit_code == 1 and "branches: was 'apart', now 'together'" in other.output, other.output
