"""Upstream BAGEL's own inferencer on an accelerated model: same pictures and texts, and nothing remains after remove().

`BAGEL_UPSTREAM=DIR make test` runs this, in an interpreter with the versions that upstream pins: BAGEL_PYTHON, or
`.venv-bagel`, which `make upstream-env` prepares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.upstream import BAGEL

LATENT_TOLERANCE = 1e-4  # relative L2 in fp32, as in `flashu-ext bench e2e`
upstream = BAGEL.missing


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    driver = Path(__file__).parent / "bagel_driver.py"
    return BAGEL.run(driver, tmp_path_factory.mktemp("bagel"))


@upstream
def test_the_inferencer_gives_the_same(facts: dict[str, Any]) -> None:
    for name, found in facts["cases"].items():
        assert found and all(difference <= LATENT_TOLERANCE for difference in found), (name, found)
    assert len(facts["cases"]) == 11


@upstream
def test_drawings_are_not_upstreams_code(facts: dict[str, Any]) -> None:
    assert facts["same bits"] == []
    # What plans an edit reads an image as the VAE encodes it, which no answer of this library does.
    assert facts["usual fallbacks"] == {"generate_text: the context has an image as the VAE encodes it": 1}


@upstream
def test_unusual_calls_run_upstreams_code(facts: dict[str, Any]) -> None:
    for name, found in facts["unusual"].items():
        assert found and all(difference <= LATENT_TOLERANCE for difference in found), (name, found)
    assert {reason.partition(":")[0] for reason in facts["all fallbacks"]} == {
        "forward_cache_update_text",
        "generate_image",
        "generate_text",
    }
    assert facts["a context of before"] and facts["a context of then"]


@upstream
def test_remove_gives_the_model_back(facts: dict[str, Any]) -> None:
    assert all(difference == 0 for found in facts["removed"].values() for difference in found)
    assert facts["same modules"] and facts["same parameters"] and facts["copies are dense"]


@upstream
def test_what_is_passed_over_is_refused_by_name(facts: dict[str, Any]) -> None:
    hooked, encoder, method, dense = facts["refusals"]
    assert "layers.1: has a forward hook" in hooked
    assert "vit_model.vision_model.encoder: its forward is replaced" in encoder
    assert "model.generate_image: expected the class's method" in method
    assert "expected a flashu_ext Bagel, or any that is accelerated" in dense


@upstream
def test_a_model_that_accelerate_has_placed(facts: dict[str, Any]) -> None:
    found = facts["placed"]
    assert max(found["difference"]) <= LATENT_TOLERANCE and found["evaluations"] == [7] and not found["fallbacks"]
    assert max(found["after"]) <= LATENT_TOLERANCE
    assert "layers.0: its forward is replaced" in found["refused"][0]


@upstream
def test_own_sampler_and_presets_take_the_instance(facts: dict[str, Any]) -> None:
    assert facts["own sampler"][0] <= LATENT_TOLERANCE
    finite, steps = facts["paper"]
    assert finite == 1 and {"pruned", "full"} <= set(steps)


@upstream
def test_bench_agrees_with_upstream(facts: dict[str, Any]) -> None:
    assert {program for program, *_ in facts["e2e"]} == {"BAGEL", "BAGEL (upstream)"}
    assert all(agrees for *_, agrees in facts["e2e"]), facts["e2e"]
