"""The analysis: its statistics against simulation, removals, a small run on the embedded model, and worlds of other families."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conformance import FIXTURES
from torch import Tensor

import flashu_ext as fx
from flashu_ext.models import bagel
from flashu_ext.models.bagel import conformance as bagel_outputs
from flashu_ext.models.comparison import Fixture
from flashu_ext.models.janusflow import conformance as janusflow_outputs
from flashu_ext.nano.evaluate import Proportion
from flashu_ext.nano.model import load_model
from flashu_ext.nano.subject import subject
from flashu_ext.planning.plan import TaskPlan
from flashu_ext.report.render import render_analysis
from flashu_ext.studies import analysis, specialisation
from flashu_ext.studies.worlds import STEPS, Advance, EmbeddedWorld


@pytest.mark.parametrize(("total", "size"), [(12, 3), (40, 20), (9, 9), (5, 1)])
def test_expected_jaccard_is_that_of_random_sets(total: int, size: int):
    rng = random.Random(0)
    overlaps = []
    for _ in range(4000):
        a, b = (torch.tensor(rng.sample(range(total), size)) for _ in range(2))
        overlaps.append(specialisation.jaccard(a, b))
    assert specialisation.expected_jaccard(total, size) == pytest.approx(sum(overlaps) / len(overlaps), abs=0.015)
    with pytest.raises(ValueError, match="size: expected 1 to"):
        specialisation.expected_jaccard(total, total + 1)


def test_overlap_knows_equal_and_disjoint_sets():
    up, down = torch.arange(20.0).repeat(2, 1), torch.arange(20.0).flip(0).repeat(2, 1)
    same, different = (
        TaskPlan({"generation": up, "understanding": up}, 0.2, 1),
        TaskPlan({"generation": up, "understanding": down}, 0.2, 1),
    )
    assert specialisation.overlaps(same, [same, same], [0.2])[0].tasks == (1.0, 1.0)
    found = specialisation.overlaps(different, [different, different], [0.2])[0]
    assert found.tasks == (0.0, 0.0) and found.mean_half("generation") == 1.0 and 0 < found.expected < 0.2
    pair = ("understanding", "understanding")
    assert specialisation.overlaps(different, [different, different], [0.2], pair)[0].tasks == (1.0, 1.0)


def test_the_sets_that_are_removed():
    generator = torch.Generator().manual_seed(0)
    plan = TaskPlan({task: torch.rand(2, 40, generator=generator) for task in ("generation", "understanding")}, 0.2, 1)
    for of, best in (("generation:most", 1.0), ("understanding:least", -1.0)):
        scores = best * plan.scores[of.split(":")[0]]
        for layer, neurons in enumerate(analysis.chosen(plan, of, 0.25, 0)):
            assert set(neurons.tolist()) == set(torch.topk(scores[layer], 10).indices.tolist())
    assert torch.equal(analysis.chosen(plan, "random", 0.5, 1), analysis.chosen(plan, "random", 0.5, 1))
    assert not torch.equal(analysis.chosen(plan, "random", 0.5, 1), analysis.chosen(plan, "random", 0.5, 2))


def test_a_small_run_becomes_a_page(tmp_path: Path):
    result = analysis.run(load_model(), EmbeddedWorld("showo2", 2, 3), count=4, removed=(0.2,), progress=False)
    assert tuple(r.of for r in result.removals) == analysis.removed_sets(("generation", "understanding"))
    assert isinstance(result.intact.adherence, Proportion) and result.intact.accuracy.n == 3
    assert len(result.importance["generation"][0]) == result.layers == 6
    assert result.drift is not None
    assert all(0 <= c for c in result.drift.relative_l2) and len(result.drift.cosine) == STEPS - 2
    assert json.loads(result.to_json())["verdicts"] == result.verdicts
    page = render_analysis(result)
    assert page.count("<img") >= 4 and result.verdicts[0].split(";")[0][:20] in page
    assert "http" not in page.replace("http://www.w3.org", "")


# ---- other families

JANUS, BAGEL = (Fixture.read(FIXTURES / name) for name in ("janusflow", "bagel"))
IDS = bagel.TokenIds(**BAGEL.spec["token_ids"])


class Small:
    """A world that draws one image and asks one question; right is what the intact model does."""

    drawings, questions = 1, 1

    def __init__(self, model: Any):
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.first = (self._draw(model), self._answer(model))

    def draw(self, model: Any, advance: Advance) -> Proportion:
        advance(1)
        self.drawn = self._draw(model)
        return Proportion(int((self.drawn - self.first[0]).norm() < 1e-4 * self.first[0].norm()), 1)

    def answer(self, model: Any, advance: Advance) -> Proportion:
        advance(1)
        answered = self._answer(model)
        self.seen.append((self.drawn, answered))
        close = answered.shape == self.first[1].shape and torch.allclose(answered, self.first[1], rtol=1e-3, atol=1e-4)
        return Proportion(int(close), 1)

    def states(self, model: Any, count: int) -> Sequence[Sequence[Tensor]]:
        return ()


class JanusFlowWorld(Small):
    def samples(self, count: int, seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
        drawn, asked = JANUS.tensors("t2i"), JANUS.tensors("mmu")
        generator = torch.Generator().manual_seed(seed)
        words = [torch.cat([asked["tokens.0"], torch.tensor([[9, 20 + n]])], dim=1) for n in range(count)]
        return (
            [
                fx.janusflow.GenerationSample(torch.randn(1, 4, 12, 12, generator=generator), drawn["tokens.0"])
                for _ in words
            ],
            [fx.janusflow.UnderstandingSample(asked["pixel_values.0"][0], tokens, 2) for tokens in words],
        )

    def _draw(self, model: Any) -> Tensor:
        noise = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(1))
        return fx.janusflow.sample(model, noise, JANUS.tensors("t2i")["tokens.0"], 4)

    def _answer(self, model: Any) -> Tensor:
        asked = JANUS.tensors("mmu")
        return fx.janusflow.answer_tokens(model, asked["pixel_values.0"][0], asked["tokens.0"], 6).float()


class BagelWorld(Small):
    def samples(self, count: int, seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
        generator = torch.Generator().manual_seed(seed)
        texts = [bagel.Text(torch.tensor([11, 12, 13 + n])) for n in range(count)]
        return (
            [
                fx.bagel.GenerationSample(torch.randn(12, 64, generator=generator), [each], (48, 64), IDS)
                for each in texts
            ],
            [fx.bagel.UnderstandingSample([self._image(), each], (21, 22), IDS) for each in texts],
        )

    def _image(self) -> Any:
        asked = BAGEL.tensors("mmu")
        return bagel.Image(None, asked["vit_tokens.0"], asked["vit_position_ids.0"])

    def _draw(self, model: Any) -> Tensor:
        noise = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
        return fx.bagel.sample(model, noise, [bagel.Text(torch.tensor([7, 8]))], (48, 64), IDS, num_timesteps=5)

    def _answer(self, model: Any) -> Tensor:
        inputs = [self._image(), bagel.Text(torch.tensor([220, 221]))]
        return fx.bagel.answer_tokens(model, inputs, IDS, 4, stop=False, return_logits=True)[1]


WORLDS = {
    "janusflow": (lambda: janusflow_outputs.model_of(JANUS), JanusFlowWorld),
    "bagel": (lambda: bagel_outputs.model_of(BAGEL), BagelWorld),
}


@pytest.mark.parametrize("family", WORLDS)
def test_any_family_is_analysed_in_a_world_of_its_own(family: str):
    model = WORLDS[family][0]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    world = WORLDS[family][1](model)
    result = analysis.run(model, world, count=4, removed=(0.25,), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert fx.handle_of(model) is None and result.drift is None
    assert (result.intact.adherence.value, result.intact.accuracy.value) == (1, 1)
    experts = family == "bagel"
    assert result.pair == ("prompts" if experts else "generation", "understanding")
    assert {task for overlap in result.overlaps for task in overlap.halves} == set(result.pair)
    assert set(result.importance) == {"generation", "understanding"}
    removed = {r.of: r for r in result.removals}
    assert tuple(removed) == analysis.removed_sets(result.pair)
    # What is removed from the experts of drawings is missed there alone; from all that both use, in both.
    assert removed["generation:most"].adherence.value == 0
    assert removed["understanding:most"].adherence.value == 0
    if experts:
        assert removed["generation:most"].accuracy.value == removed["generation:least"].accuracy.value == 1
        assert "no answer uses the drawing experts" in " ".join(result.verdicts)
        assert "the text expert's critical sets of prompts and understanding" in result.verdicts[0]
        assert removed["prompts:most"].adherence.value == 0
    page = render_analysis(result)
    assert ("Drawing has experts of its own" in page) == experts and "Drift of" not in page


@pytest.mark.parametrize("family", ["janusflow", "bagel"])
def test_embedded_models_share_their_world(family: str):
    """Also before they are trained."""
    torch.manual_seed(0)
    model = subject(family).build().eval()
    result = analysis.run(model, EmbeddedWorld(family, 1, 2), count=2, removed=(0.2,), progress=False)
    assert (result.intact.adherence.n, result.intact.accuracy.n) == (1, 2) and result.drift is None
    assert len(result.removals) == len(analysis.removed_sets(result.pair)) and render_analysis(result)


@pytest.mark.parametrize("of", ["generation:most", "understanding:least", "random"])
def test_neurons_are_gone_and_come_back(of: str):
    """Those of the drawing experts for a drawing's set, of the text's for any other; also after an error."""
    model = bagel_outputs.model_of(BAGEL)
    world = BagelWorld(model)
    plan = specialisation.measure(model, *world.samples(2, 0), progress=False).plan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError, match="over"), analysis.without(model, plan, of, 0.25, 3):
        for n, (layer, neurons) in enumerate(
            zip(model.language_model.model.layers, analysis.chosen(plan, of, 0.25, 3), strict=True)
        ):
            own, other = ("mlp_moe_gen", "mlp") if of.startswith("generation") else ("mlp", "mlp_moe_gen")
            weight = getattr(layer, own).down_proj.weight
            gone = (weight == 0).all(0).nonzero().flatten()
            assert set(gone.tolist()) == set(neurons.tolist()) and len(neurons) == int(0.25 * plan.intermediate)
            name = f"language_model.model.layers.{n}.{other}.down_proj.weight"
            assert torch.equal(getattr(layer, other).down_proj.weight, before[name])
        raise KeyError("over")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_halves_are_disjoint():
    """Two halves of equal samples agree, of others they need not."""
    model = janusflow_outputs.model_of(JANUS)
    generation, understanding = JanusFlowWorld(model).samples(4, 0)
    apart = [understanding[0]] * 2 + [
        fx.janusflow.UnderstandingSample(-each.pixel_values, each.tokens, 2) for each in understanding[2:]
    ]
    for asked, equal in (([understanding[0]] * 4, True), (apart, False)):
        found = specialisation.measure(model, generation, asked, progress=False)
        assert all((set(overlap.halves["understanding"]) == {1.0}) == equal for overlap in found.overlaps)


def test_halves_need_two_samples():
    model = janusflow_outputs.model_of(JANUS)
    generation, understanding = JanusFlowWorld(model).samples(2, 0)
    found = specialisation.measure(model, generation, understanding, progress=False)
    assert found.pair == ("generation", "understanding") and not found.experts and len(found.verdicts()) == 2
    with pytest.raises(ValueError, match="understanding: expected at least 2 samples, a half each, got 1"):
        specialisation.measure(model, generation, understanding[:1])
