"""Upstream Show-o2's own inference scripts with the README's line: same outputs, and nothing remains after remove().

`SHOWO2_UPSTREAM=DIR make test` runs this; DIR is a checkout's show-o2 folder. The scripts run in another interpreter, with the
versions that upstream pins: SHOWO2_PYTHON, or `.venv-showo2`, which `make upstream-env` prepares.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.upstream import ROOT, SHOWO2

DRIVER = Path(__file__).parent / "driver.py"
LATENT_TOLERANCE = 1e-4  # relative L2 in fp32 under guidance 5, as in `flashu-ext bench e2e`

upstream = SHOWO2.missing


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the driver found, and the outputs of every run: {'facts': ..., 't2i': {...}, 'mmu': {...}}."""
    out = tmp_path_factory.mktemp("upstream")
    facts = SHOWO2.run(DRIVER, out, str(ROOT / "README.md"))
    return {"facts": facts} | {task: load_file(out / f"{task}.safetensors") for task in ("t2i", "mmu")}


def outputs(ran: dict[str, Any], task: str, run: str) -> list[torch.Tensor]:
    return [value for name, value in sorted(ran[task].items()) if name.split(".")[0] == run]


@upstream
def test_images_stay_the_same(ran: dict[str, Any]) -> None:
    plain, fast = outputs(ran, "t2i", "plain"), outputs(ran, "t2i", "accelerated")
    assert [tuple(value.shape) for value in plain] == [(2, 16, 1, 8, 8), (1, 16, 1, 8, 8)]
    for before, after in zip(plain, fast, strict=True):
        assert float((after - before).norm() / before.norm()) <= LATENT_TOLERANCE
        assert not torch.equal(before, after), "equal bits: upstream's own code ran"


@upstream
def test_answers_stay_the_same(ran: dict[str, Any]) -> None:
    plain, fast = outputs(ran, "mmu", "plain"), outputs(ran, "mmu", "accelerated")
    assert len(plain) == 2 and plain[0].numel() > 1 and not torch.equal(plain[0], plain[1])
    assert all(torch.equal(before, after) for before, after in zip(plain, fast, strict=True))


@upstream
def test_the_line_alone_makes_the_difference(ran: dict[str, Any]) -> None:
    for task in ("t2i", "mmu"):
        facts = ran["facts"][task]
        assert not facts["handle without the line"] and not facts["fallbacks"], facts
    assert ran["facts"]["t2i"]["backbone"] == 7  # of the last image: 8 grid points
    assert ran["facts"]["mmu"]["prefilled"] > 0


@upstream
def test_remove_gives_the_model_back(ran: dict[str, Any]) -> None:
    for task in ("t2i", "mmu"):
        assert not ran["facts"][task]["methods left"]
        for before, after in zip(outputs(ran, task, "plain"), outputs(ran, task, "removed"), strict=True):
            assert torch.equal(before, after)
    assert ran["facts"]["same modules"] and ran["facts"]["same parameters"]


@upstream
def test_other_sizes_and_several_images_are_upstreams(ran: dict[str, Any]) -> None:
    sizes = ran["facts"]["sizes"]
    assert len(sizes) == 2 and all(difference <= LATENT_TOLERANCE for _, difference in sizes), sizes
    assert ran["facts"]["several images"] == [[1, 8], [2, 8], [3, 8]]


@upstream
def test_bench_agrees_with_upstream(ran: dict[str, Any]) -> None:
    rows = ran["facts"]["e2e"]
    assert {program for program, *_ in rows} == {"flashu_ext", "Show-o2 (upstream)"}
    assert all(agrees for *_, agrees in rows), rows


@upstream
def test_bench_for_gpus_runs_upstream(ran: dict[str, Any]) -> None:
    rows = ran["facts"]["e2e_gpu"]
    assert {variant for _, variant, _ in rows} == {"Show-o2 (upstream)", "dense"}
    assert len(rows) == 4 and all(note is None for *_, note in rows), rows


def test_readme_shows_one_line_per_script() -> None:
    sys.path.insert(0, str(DRIVER.parent))
    try:
        from driver import added_lines, with_lines
    finally:
        sys.path.pop(0)
    added = added_lines(ROOT / "README.md")
    assert sorted(added) == ["inference_mmu.py", "inference_t2i.py"]
    assert all(len(lines) == 1 and "fx.accelerate(" in lines[0] for _, lines in added.values())
    assert with_lines("if 1:\n    a()\n    b()\n", "a()", ["c()"]) == "if 1:\n    a()\n    c()\n    b()\n"
    with pytest.raises(ValueError, match="found 2"):
        with_lines("a()\na()\n", "a()", ["c()"])
