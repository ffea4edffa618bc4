"""BAGEL on the runtime: equal to the dense model, company, approximations, living models, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.conformance import FIXTURES, relative
from support.tape import capturing
from torch import Tensor, nn

import flashu_ext as fx
from flashu_ext.models.bagel.conformance import model_of
from flashu_ext.models.bagel.sampling import SampleInputs, branch_inputs
from flashu_ext.models.comparison import Fixture
from flashu_ext.planning.config import FlashUConfig

FIXTURE = Fixture.read(FIXTURES / "bagel")
EDITED, ASKED = FIXTURE.tensors("edit"), FIXTURE.tensors("mmu")
IDS = fx.bagel.TokenIds(**FIXTURE.spec["token_ids"])
LIMIT = 1e-5
POINTS = 8
SIZE = (48, 64)


def model() -> Any:
    return model_of(FIXTURE)


def text(*ids: int) -> fx.bagel.Text:
    return fx.bagel.Text(torch.tensor(ids))


def image(i: int, latents: bool = True, vit: bool = True) -> fx.bagel.Image:
    read = (EDITED[f"vit_tokens.{i}"], EDITED[f"vit_position_ids.{i}"]) if vit else (None, None)
    return fx.bagel.Image(EDITED[f"image_latents.{i}"] if latents else None, *read)


def seen(i: int) -> fx.bagel.Image:
    return fx.bagel.Image(None, ASKED[f"vit_tokens.{i}"], ASKED[f"vit_position_ids.{i}"])


PROMPT, EDIT = [text(11, 12, 13)], [image(0), text(41, 42)]
QUESTION = [seen(0), text(220, 221), seen(1), text(200, 201, 202)]


def draw(of: Any, inputs: list[Any], seed: int = 2, **changes: Any) -> Any:
    noise = torch.randn(12, 64, generator=torch.Generator().manual_seed(seed))
    return fx.bagel.sample(of, noise, inputs, SIZE, IDS, **{"num_timesteps": POINTS, "cfg_img_scale": 1.5, **changes})


def ask(of: Any, inputs: list[Any] = QUESTION, most: int = 7) -> Any:
    return fx.bagel.answer_tokens(of, inputs, IDS, most, stop=False, return_logits=True)


def plan(of: Any, config: FlashUConfig) -> fx.TaskPlan | None:
    if not config.needs_plan:
        return None
    generator = torch.Generator().manual_seed(3)
    layers, neurons = len(of.language_model.model.layers), of.config.inter
    scores = {task: torch.rand(layers, neurons, generator=generator) for task in ("generation", "understanding")}
    return fx.TaskPlan(scores, 0.25, 8).with_pruning(config.ffn)


CONFIGS: dict[str, FlashUConfig] = {
    "exact": FlashUConfig.exact(),
    "paper": FlashUConfig.paper(steps=POINTS, prune_multiple=8, layer_skip_interval=3, head_cache_interval=2),
    "fast": FlashUConfig.fast(steps=POINTS, prune_multiple=8),
}


@pytest.fixture(params=CONFIGS)
def accelerated(request: pytest.FixtureRequest) -> Iterator[Any]:
    own, config = model(), CONFIGS[request.param]
    with fx.accelerate(own, config, plan(own, config)):
        yield own


# ---- exact is the dense model

ITEMS = st.one_of(
    st.lists(st.integers(5, 300), max_size=5).map(
        lambda ids: text(*ids) if ids else fx.bagel.Text(torch.zeros(0).long())
    ),
    st.tuples(st.integers(0, 2), st.sampled_from([(True, True), (True, False), (False, True)])).map(
        lambda drawn: image(drawn[0], *drawn[1])
    ),
)


@settings(deadline=None, max_examples=25)
@given(
    items=st.lists(ITEMS, max_size=4),
    text_scale=st.sampled_from([0.0, 1.0, 3.0]),
    image_scale=st.sampled_from([1.0, 2.0]),
    interval=st.sampled_from([(0.4, 1.0), [0.0, 1.0], (0.3, 0.8)]),
    renorm=st.sampled_from(["global", "channel", "text_channel"]),
    seer=st.sampled_from([None, None, fx.bagel.TaylorSeer(), fx.bagel.TaylorSeer(2, 2, 3)]),
)
def test_any_sequence_is_drawn_from_as_by_the_dense_model(
    items: list[Any], text_scale: float, image_scale: float, interval: Any, renorm: str, seer: Any
) -> None:
    own = model()
    arguments = {
        "cfg_text_scale": text_scale,
        "cfg_img_scale": image_scale,
        "cfg_interval": interval,
        "cfg_renorm_type": renorm,
        "taylorseer": seer,
        "num_timesteps": 11,
        "return_velocity": True,
    }
    if seer is not None and text_scale > 1 and interval[1] < 1:
        with pytest.raises(ValueError, match="cfg_interval: expected to reach 1"):
            draw(own, items, **arguments)
        return
    expected = draw(own, items, **arguments)
    with fx.accelerate(own):
        got = draw(own, items, **arguments)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and one.is_contiguous()
        assert relative(one, other) < LIMIT


@settings(deadline=None, max_examples=20)
@given(st.lists(st.one_of(st.integers(0, 1).map(seen), st.lists(st.integers(5, 300), max_size=4)), max_size=4))
def test_any_question_is_answered_as_by_the_dense_model(items: list[Any]) -> None:
    own = model()
    sequence = [
        item if isinstance(item, fx.bagel.Image) else fx.bagel.Text(torch.tensor(item).long()) for item in items
    ]
    words, logits = ask(own, sequence)
    with fx.accelerate(own):
        for _ in range(2):  # the second time with what was kept of the first
            got, scores = ask(own, sequence)
            assert torch.equal(got, words) and relative(scores, logits) < LIMIT


def test_branches_that_see_the_same_are_one_row() -> None:
    def rows(inputs: list[Any], **guidance: Any) -> int:
        noise = torch.zeros(12, 64)
        own = fx.bagel.Guidance(**{"text": 4.0, "image": 1.5, **guidance})
        return SampleInputs.build(model().config, noise, branch_inputs(inputs), (3, 4), IDS, POINTS, own, 3.0).branches

    assert rows(PROMPT) == 2 and rows(EDIT) == 3
    assert rows(EDIT, image=1.0) == 2 and rows(EDIT, text=1.0) == 1
    assert rows([]) == 1 and rows([text(1), image(0)]) == 2
    assert [len(each) for each in branch_inputs([text(1), image(0)])] == [2, 2, 1]
    assert [len(each) for each in branch_inputs(EDIT)] == [2, 1, 1]


def test_unguided_evaluations_run_one_row() -> None:
    own = model()
    with fx.accelerate(own) as handle:
        draw(own, EDIT)
        guided = [step.guided for step in handle.runner.last_image.plan.steps]
    times = fx.bagel.sampling.time_grid(POINTS, 3.0)[:-1]
    assert guided == [bool(0.4 < t <= 1) for t in times] and not all(guided)


def test_taylorseer_leaves_nothing_behind() -> None:
    own = model()
    with fx.accelerate(own):
        plain, seen_ = draw(own, PROMPT), draw(own, PROMPT, taylorseer=fx.bagel.TaylorSeer())
        assert torch.equal(draw(own, PROMPT), plain) and not torch.equal(plain, seen_)
        assert torch.equal(draw(own, PROMPT, taylorseer=fx.bagel.TaylorSeer()), seen_)


# ---- the same bits


def test_threads_and_earlier_work_change_no_bit(accelerated: Any) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            accelerated._flashu_handle.runner.reset()
            results.append(
                (draw(accelerated, EDIT), *ask(accelerated), draw(accelerated, PROMPT), draw(accelerated, EDIT))
            )
    finally:
        torch.set_num_threads(before)
    for other in results:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        assert torch.equal(other[0], other[-1])


def stepper(handle: Any, inputs: list[Any], seed: int, points: int, seer: Any = None) -> Any:
    noise = torch.randn(12, 64, generator=torch.Generator().manual_seed(seed))
    guidance = fx.bagel.Guidance(image=1.5)
    built = SampleInputs.build(
        handle.model.config, noise, branch_inputs(inputs), (3, 4), IDS, points, guidance, 3.0, seer
    )
    return handle.stepper(built)


def run_alone(handle: Any, job: tuple[Any, ...]) -> Tensor:
    own = stepper(handle, *job)
    for index in range(own.evaluations):
        own.step(index)
    latents: Tensor = own.latents()
    own.close()
    return latents


JOBS: tuple[tuple[Any, ...], ...] = ((PROMPT, 1, POINTS), (EDIT, 2, POINTS), ([text(3)], 3, 6))
SEEN_AHEAD = (EDIT, 4, POINTS, fx.bagel.TaylorSeer(2, 2, 2))


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_images_that_share_evaluations_and_captured_ones_keep_their_bits(name: str) -> None:
    """Contexts of other lengths, other numbers of steps and branches, extrapolated evaluations; as on a GPU, in graphs."""
    own, config = model(), CONFIGS[name]
    jobs = (*JOBS, SEEN_AHEAD) if name == "exact" else JOBS
    with fx.accelerate(own, config, plan(own, config)) as handle:
        alone = [run_alone(handle, job) for job in jobs]
        together = [stepper(handle, *job) for job in jobs]
        for index in range(max(each.evaluations for each in together)):
            going = [each for each in together if index < each.evaluations]
            assert handle.step_together(going) == [None] * len(going)
        assert all(torch.equal(each.latents(), latents) for each, latents in zip(together, alone, strict=True))
    with capturing(fx.accelerate(own, config, plan(own, config))) as handle:
        other = [text(21, 22, 23)], 1, POINTS  # the same work as the first image's, on other tokens
        for _ in range(4):
            assert not torch.equal(run_alone(handle, other), alone[0])
            assert torch.equal(run_alone(handle, jobs[0]), alone[0])
        assert all(torch.equal(run_alone(handle, job), latents) for job, latents in zip(jobs, alone, strict=True))
        assert handle.summary().graphs["replays"] > 0


@pytest.mark.parametrize("faster", [False, True])
def test_no_words_have_no_logits(faster: bool) -> None:
    own = model()
    if faster:
        fx.accelerate(own)
    words, logits = ask(own, most=0)
    assert words.shape == (0,) and logits.shape == (0, own.config.vocab)


# ---- what the approximations compute


def test_each_expert_has_the_neurons_of_its_task() -> None:
    """Drawing prunes the drawing expert and leaves the text expert whole; answering prunes the text expert."""
    own, config = model(), FlashUConfig(ffn_prune_ratio=0.25, prune_multiple=8)
    chosen = plan(own, config)
    assert chosen is not None
    with fx.accelerate(own, config, chosen):
        got = draw(own, EDIT), ask(own)[1]
    cut = [model(), model()]
    for of, task, name in zip(cut, ("generation", "understanding"), ("mlp_moe_gen", "mlp"), strict=True):
        for layer, layout in zip(of.language_model.model.layers, chosen.layouts(), strict=True):
            gone = torch.ones(of.config.inter, dtype=torch.bool)
            gone[layout.kept(task)] = False
            getattr(layer, name).down_proj.weight.data[:, gone] = 0
    assert relative(got[0], draw(cut[0], EDIT)) < LIMIT
    assert relative(got[1], ask(cut[1])[1]) < LIMIT


@pytest.mark.parametrize("tied", ["modules", "weights", "gates"])
def test_experts_that_share_weights_stay_in_their_order(tied: str) -> None:
    """A layer's neurons must not be moved where an expert reads them too."""
    config = FlashUConfig(ffn_prune_ratio=0.25, prune_multiple=8)
    alike, own = model(), model()
    for one, other in zip(alike.language_model.model.layers, own.language_model.model.layers, strict=True):
        names = ("gate_proj",) if tied == "gates" else ("gate_proj", "up_proj", "down_proj")
        for name in names:
            getattr(one.mlp_moe_gen, name).weight.data.copy_(getattr(one.mlp, name).weight)
            getattr(other.mlp_moe_gen, name).weight = getattr(other.mlp, name).weight
        if tied == "modules":
            other.mlp_moe_gen = other.mlp
    chosen = plan(alike, config)
    assert chosen is not None
    chosen = fx.TaskPlan(chosen.scores, chosen.ratio, chosen.multiple)
    with fx.accelerate(alike, config, chosen):
        expected = draw(alike, EDIT), ask(alike)[1]
    with fx.accelerate(own, config, chosen) as handle:
        got = draw(own, EDIT), ask(own)[1]
        assert "its weights are shared within the model" in str(handle.summary())
    assert relative(got[0], expected[0]) < LIMIT and relative(got[1], expected[1]) < LIMIT


def test_skipped_layers_are_skipped_by_both_experts() -> None:
    own = model()
    config = FlashUConfig(layer_skip_ratio=0.34, layer_skip_interval=100, steps=POINTS)
    with fx.accelerate(own, config) as handle:
        got = draw(own, EDIT, num_timesteps=None, return_velocity=True)[1]
        ((first, skipped),) = handle.summary().layers_skipped
    assert first == 1 and skipped
    exact = draw(own, EDIT, return_velocity=True)[1]
    assert relative(got[0], exact[0]) < LIMIT and relative(got[1], exact[1]) > 1e-4
    cut = model()
    layers = cut.language_model.model.layers
    cut.language_model.model.layers = nn.ModuleList(layer for i, layer in enumerate(layers) if i not in skipped)
    # From the same latents on: the first evaluation measures and skips nothing.
    times = fx.bagel.sampling.time_grid(POINTS, 3.0)
    noise = torch.randn(12, 64, generator=torch.Generator().manual_seed(2))
    x = noise - got[0] * (times[0] - times[1])
    with torch.no_grad():
        contexts = fx.bagel.sampling.branch_contexts(cut, EDIT, IDS)
        rows = [cut.velocity(cut.hidden(x, times[1:2], (3, 4), each, IDS)) for each in contexts]
    assert relative(got[1], fx.bagel.sampling.guided(*rows, fx.bagel.Guidance(image=1.5))) < LIMIT


def test_a_cached_evaluation_is_the_last_output_again() -> None:
    own, config = model(), FlashUConfig(head_cache_interval=3, steps=POINTS)
    with fx.accelerate(own, config) as handle:
        _, got = draw(own, PROMPT, cfg_text_scale=1.0, num_timesteps=None, return_velocity=True)
        ran = [step.head for step in handle.runner.last_image.ran]
    assert not all(ran)
    for index in range(1, len(ran)):
        assert torch.equal(got[index], got[index - 1]) == (not ran[index])


def test_visual_tokens_leave_the_prefill() -> None:
    own = model()
    with fx.accelerate(own, FlashUConfig(token_prune_ratio=0.5)) as handle:
        first = ask(own)
        tokens = handle.summary().tokens
        assert tokens["visual kept"] < tokens["visual"]
        assert all(torch.equal(a, b) for a, b in zip(ask(own), first, strict=True))


# ---- a model that changes

CHANGES: dict[str, Callable[[Any], Any]] = {
    "drawing expert": lambda own: own.language_model.model.layers[1].mlp_moe_gen.up_proj.weight.data.mul_(1.5),
    "drawing norm": lambda own: own.language_model.model.norm_moe_gen.weight.data.mul_(2),
    "head norm": lambda own: own.language_model.model.layers[0].self_attn.q_norm_moe_gen.weight.data.mul_(3),
    "head norm of text": lambda own: own.language_model.model.layers[0].self_attn.k_norm.weight.data.mul_(3),
    "hook on an expert": lambda own: own.language_model.model.layers[2].mlp_moe_gen.register_forward_hook(
        lambda m, i, o: o * 2
    ),
    "hook on a projection": lambda own: own.language_model.model.layers[
        1
    ].self_attn.v_proj_moe_gen.register_forward_hook(lambda m, i, o: o * 2),
    "an expert's projection": lambda own: setattr(
        own.language_model.model.layers[1].self_attn, "o_proj_moe_gen", nn.Linear(own.config.hidden, own.config.hidden)
    ),
    "places": lambda own: own.latent_pos_embed.pos_embed.data.mul_(2),
    "time": lambda own: own.time_embedder.mlp[0].bias.data.add_(1),
    "latents in": lambda own: own.vae2llm.register_forward_hook(lambda m, i, o: o + 1),
    "latents out": lambda own: own.llm2vae.bias.data.add_(1),
    "rotary": lambda own: own.language_model.model.rotary_emb.inv_freq.mul_(2),
    "image encoder": lambda own: own.vit_model.vision_model.post_layernorm.weight.data.mul_(2),
    "hook on the image encoder's places": lambda own: (
        own.vit_model.vision_model.embeddings.position_embedding.register_forward_hook(lambda m, i, o: o * 2)
    ),
    "connector": lambda own: own.connector.fc1.weight.data.mul_(2),
    "markers": lambda own: own.language_model.model.embed_tokens.weight.data[IDS.start_of_image].mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["between", "before"])
def test_a_change_counts_in_the_next_image(change: str, when: str) -> None:
    own = model()
    torch.manual_seed(5)
    if when == "before":
        CHANGES[change](own)
    with fx.accelerate(own):
        before = draw(own, EDIT)
        if when == "between":
            CHANGES[change](own)
        got = draw(own, EDIT)
    assert torch.equal(got, before) == (when == "before")
    assert relative(got, draw(own, EDIT)) < LIMIT


def test_a_change_counts_in_the_next_answer() -> None:
    own = model()
    with fx.accelerate(own):
        ask(own)
        own.connector.fc2.bias.data.add_(1)
        got = ask(own)
    expected = ask(own)
    assert torch.equal(got[0], expected[0]) and relative(got[1], expected[1]) < LIMIT


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("", "hook"),
        ("language_model", "hook"),
        ("language_model.model", "hook"),
        ("language_model.model.layers.1", "hook"),
        ("language_model.model.layers.1", "class"),
        ("language_model.model.layers.1.self_attn", "hook"),
        ("language_model.model.layers.1.self_attn", "class"),
        ("vit_model.vision_model", "hook"),
        ("vit_model.vision_model.embeddings", "hook"),
        ("connector", "class"),
        ("language_model.model.layers.0.self_attn.q_norm_moe_gen", "hook"),
        ("language_model.model.layers.0.self_attn.k_norm_moe_gen", "class"),
        ("language_model.model.layers.0.self_attn.k_norm", "hook"),
    ],
)
def test_what_would_be_passed_over_is_refused(path: str, what: str) -> None:
    own = model()
    module = own.get_submodule(path)
    if what == "hook":
        module.register_forward_hook(lambda m, i, o: o)
    else:
        module.__class__ = type("Mine", (type(module),), {})
    with pytest.raises(TypeError, match=r"^model"):
        fx.accelerate(own)
    assert fx.handle_of(own) is None


def test_removed_it_is_as_before() -> None:
    own = model()
    state = copy.deepcopy(own.state_dict())
    expected: Tensor = draw(own, EDIT)
    config = CONFIGS["paper"]
    with fx.accelerate(own, config, plan(own, config)):
        draw(own, EDIT, num_timesteps=None)
        ask(own)
    assert torch.equal(draw(own, EDIT), expected)
    assert all(torch.equal(own.state_dict()[name], value) for name, value in state.items())


# ---- arguments


def test_what_the_family_cannot_do_is_refused() -> None:
    own = model()
    with pytest.raises(ValueError, match=r"token_skip_ratio: expected 0 for a bagel model, got 0\.3"):
        fx.accelerate(own, FlashUConfig(token_skip=True, token_skip_ratio=0.3, token_skip_interval=3))
    assert fx.handle_of(own) is None
    with fx.accelerate(own), pytest.raises(ValueError, match=r"inputs\[0\].latents: expected None"):
        ask(own, [image(0), text(3)])
    for config, what in (
        (FlashUConfig(head_cache_interval=3), "caches"),
        (FlashUConfig(layer_skip_ratio=0.3), "skips"),
    ):
        with (
            fx.accelerate(own, config),
            pytest.raises(ValueError, match=f"taylorseer: expected None with a config that {what}"),
        ):
            draw(own, PROMPT, taylorseer=fx.bagel.TaylorSeer())
    with pytest.raises(ValueError, match="max_order: expected an integer >= 0 and <= 8, got 9"):
        fx.bagel.TaylorSeer(9)


def test_callbacks_see_packed_tokens() -> None:
    own = model()
    told: list[tuple[int, Tensor]] = []
    with fx.accelerate(own):
        tokens = draw(own, PROMPT, callback=lambda step, x: told.append((step, x.clone())))
    assert [step for step, _ in told] == list(range(1, POINTS)) and torch.equal(told[-1][1], tokens)
