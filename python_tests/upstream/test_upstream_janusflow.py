"""Upstream JanusFlow's own demo loop and answers on an accelerated model: same latents and words, and nothing remains after
remove().

`JANUS_UPSTREAM=DIR make test` runs this, in an interpreter with the oldest versions that upstream takes: JANUS_PYTHON, or
`.venv-janus`, which `make upstream-env` prepares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.upstream import JANUS

LATENT_TOLERANCE = 1e-4  # relative L2 in fp32, as in `flashu-ext bench e2e`
upstream = JANUS.missing


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    driver = Path(__file__).parent / "janusflow_driver.py"
    return JANUS.run(driver, tmp_path_factory.mktemp("janusflow"))


@upstream
def test_the_demo_gives_the_same(facts: dict[str, Any]) -> None:
    assert len(facts["cases"]) == 10
    assert all(difference <= LATENT_TOLERANCE for difference in facts["cases"].values()), facts["cases"]
    assert not facts["usual fallbacks"] and facts["prefilled"] > 0
    words = {"an answer", "an answer that ends", "as the demo samples", "sampled from all words", "two answers"}
    assert set(facts["same bits"]) == words, "equal bits of latents: upstream's own code ran"


@upstream
def test_unusual_calls_run_upstreams_code(facts: dict[str, Any]) -> None:
    assert facts["unusual"] and not any(facts["unusual"].values()), facts["unusual"]
    assert sum(facts["all fallbacks"].values()) == len(facts["unusual"])


@upstream
def test_remove_gives_the_model_back(facts: dict[str, Any]) -> None:
    assert not any(facts["removed"].values()) and not facts["methods left"]
    assert facts["same modules"] and facts["same parameters"] and facts["copies are dense"]


@upstream
def test_what_is_passed_over_is_refused_by_name(facts: dict[str, Any]) -> None:
    hooked, rotary, method, dense, read, passed = facts["messages"]
    assert "vision_gen_dec_model.mid_block: has a forward hook" in hooked
    assert "layers.1.self_attn.rotary_emb: has frequencies of its own" in rotary
    assert "model.language_model.generate: expected the class's method" in method
    assert "expected a flashu_ext JanusFlow, or any that is accelerated" in dense
    assert read == passed and read.startswith("past_key_values: ")


@upstream
def test_own_functions_take_the_instance(facts: dict[str, Any]) -> None:
    assert facts["own"]["sample"] <= LATENT_TOLERANCE and facts["own"]["answer"] == 0


@upstream
def test_presets_count_where_steps_are_known(facts: dict[str, Any]) -> None:
    found = facts["presets"]
    assert found["under the loop"] <= LATENT_TOLERANCE < found["by sample"] < 0.5
    assert any("all layers and neurons" in reason for reason in found["reasons"])
    assert any("no image tokens are dropped" in reason for reason in found["reasons"])
    assert {"pruned", "full"} <= set(found["steps"]) and found["kept"] < 0.6 and found["words"] == 4


@upstream
def test_weights_may_change(facts: dict[str, Any]) -> None:
    assert facts["changed weights"] <= LATENT_TOLERANCE


@upstream
def test_bench_agrees_with_upstream(facts: dict[str, Any]) -> None:
    assert {program for program, *_ in facts["e2e"]} == {"JanusFlow", "JanusFlow (upstream)"}
    assert all(agrees for *_, agrees in facts["e2e"]), facts["e2e"]
