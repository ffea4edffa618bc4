"""JanusFlow on the runtime: company, living models, approximations, and arguments."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.conformance import FIXTURES, relative
from torch import Tensor, nn

import flashu_ext as fx
from flashu_ext.models.comparison import Fixture
from flashu_ext.models.janusflow.conformance import model_of
from flashu_ext.models.velocity import guide
from flashu_ext.runtime.prompt_cache import Prompt, common_prefix

FIXTURE = Fixture.read(FIXTURES / "janusflow")
DRAWN, ASKED = FIXTURE.tensors("t2i"), FIXTURE.tensors("mmu")
STEPS = 7
LIMIT = 1e-5


def model() -> Any:
    return model_of(FIXTURE)


def noise(count: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, 12, 12, generator=torch.Generator().manual_seed(seed))


PROMPTS = (DRAWN["tokens.0"], DRAWN["tokens.1"], torch.tensor([1, 50, 51, 52, 53, 6]))


def draw(of: Any, prompt: int = 0, seed: int = 0, **arguments: Any) -> Tensor:
    arguments = {"steps": STEPS, "guidance_scale": 3.0, **arguments}
    return fx.janusflow.sample(of, noise(1, seed), PROMPTS[prompt], **arguments)


def ask(of: Any, numbers: list[int], most: int = 9) -> list[Tensor]:
    pixels = torch.cat([ASKED[f"pixel_values.{n}"][0] for n in numbers])
    return fx.janusflow.answer_tokens_batch(of, pixels, [ASKED[f"tokens.{n}"] for n in numbers], most)


def plan(of: Any, config: fx.FlashUConfig) -> fx.TaskPlan | None:
    if not config.needs_plan:
        return None
    generator = torch.Generator().manual_seed(3)
    scores = {task: torch.rand(6, 256, generator=generator) for task in ("generation", "understanding")}
    return fx.TaskPlan(scores, 0.25, 8).with_pruning(config.ffn)


CONFIGS: dict[str, fx.FlashUConfig] = {
    "exact": fx.FlashUConfig.exact(),
    "paper": fx.FlashUConfig.paper(steps=STEPS + 1, prune_multiple=8, layer_skip_interval=3, head_cache_interval=2),
    "fast": fx.FlashUConfig.fast(steps=STEPS + 1, prune_multiple=8),
    "tokens": fx.FlashUConfig(token_skip=True, token_skip_ratio=0.3, token_skip_interval=3, steps=STEPS + 1),
}


@pytest.fixture(params=CONFIGS)
def accelerated(request: pytest.FixtureRequest) -> Iterator[Any]:
    own, config = model(), CONFIGS[request.param]
    with fx.accelerate(own, config, plan(own, config)):
        yield own


# ---- the same bits in any company


def test_an_image_has_its_bits_in_any_batch(accelerated: Any) -> None:
    alone = [draw(accelerated, 0, seed) for seed in range(3)]
    together = fx.janusflow.sample(
        accelerated, torch.cat([noise(1, seed) for seed in (2, 0, 1)]), PROMPTS[0], STEPS, [3.0, 3.0, 3.0]
    )
    assert torch.equal(together, torch.cat([alone[2], alone[0], alone[1]]))
    assert torch.equal(draw(accelerated, 0, 1), alone[1])


def test_threads_change_no_bit(accelerated: Any) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            accelerated._flashu_handle.runner.reset()
            results.append((draw(accelerated), *ask(accelerated, [0, 1])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_questions_have_their_words_in_any_batch(accelerated: Any) -> None:
    alone = [ask(accelerated, [n])[0] for n in (0, 1)]
    for numbers in ([1, 0], [0, 0, 1], [1]):
        assert all(torch.equal(a, alone[n]) for a, n in zip(ask(accelerated, numbers), numbers, strict=True))


# ---- what the approximations compute


def by_hand(of: Any, seen: Callable[[int], bool], prompt: int = 0, scale: float = 3.0) -> Tensor:
    """The dense loop; where `seen(step)` is False the language model's output is that of the step before."""
    stepper = fx.janusflow.sampling.DenseStepper
    inputs = fx.janusflow.sampling.SampleInputs.build(of, noise(), PROMPTS[prompt], STEPS, scale, 0)
    hidden: list[Tensor] = []
    real = type(of).backbone

    def backbone(*arguments: Tensor) -> Tensor:
        if seen(len(hidden)) or not hidden:
            hidden.append(real(of, *arguments))
        else:
            hidden.append(hidden[-1])
        return hidden[-1]

    own = copy.copy(of)
    object.__setattr__(own, "backbone", backbone)
    run = stepper(own, inputs)
    with torch.no_grad():
        for step in range(run.evaluations):
            run.step(step)
    return run.latents()


def test_a_cached_step_reads_new_latents_and_old_hidden_states() -> None:
    """The cached feature is the language model's output; encoder and decoder run in every step."""
    own, config = model(), fx.FlashUConfig(head_cache_interval=2, steps=STEPS + 1)
    with fx.accelerate(own, config) as handle:
        got = draw(own, steps=None)
        kinds = [step.head for step in handle.runner.last_image.ran]
    assert 0 < kinds.count(False) < STEPS
    assert relative(got, by_hand(model(), lambda step: kinds[step])) < LIMIT


def test_pruned_neurons_are_those_of_each_task() -> None:
    own, config = model(), fx.FlashUConfig(ffn_prune_ratio=0.25, prune_multiple=8)
    chosen = plan(own, config)
    assert chosen is not None
    with fx.accelerate(own, config, chosen):
        got = draw(own), ask(own, [0])[0]
    for task, index in (("generation", 0), ("understanding", 1)):
        cut = model()
        for layer, layout in zip(cut.language_model.model.layers, chosen.layouts(), strict=True):
            gone = torch.ones(256, dtype=torch.bool)
            gone[layout.kept(task)] = False
            layer.mlp.down_proj.weight.data[:, gone] = 0
        if index == 0:
            assert relative(got[0], draw(cut)) < LIMIT
        else:
            assert torch.equal(got[1], ask(cut, [0])[0])


def test_skipped_layers_are_skipped() -> None:
    own = model()
    with fx.accelerate(own, fx.FlashUConfig(layer_skip_ratio=0.34, layer_skip_interval=100, steps=STEPS + 1)) as handle:
        got = draw(own, steps=None)
        ((first, skipped),) = handle.summary().layers_skipped
    assert first == 1 and len(skipped) == 2
    cut = model()
    real = [layer.forward for layer in cut.language_model.model.layers]
    measured = []

    def skipping(index: int) -> Any:
        def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Any:
            if index == 0:
                measured.append(None)
            return x if index in skipped and len(measured) > 1 else real[index](x, *arguments, **keywords)

        return forward

    for index, layer in enumerate(cut.language_model.model.layers):
        layer.forward = skipping(index)
    assert relative(got, draw(cut)) < LIMIT


def test_half_of_the_visual_tokens_leave_the_prefill() -> None:
    own = model()
    with fx.accelerate(own, fx.FlashUConfig(token_prune_ratio=0.5)) as handle:
        ask(own, [0])
        assert handle.summary().tokens["visual kept"] == 18
        fewer = ask(own, [0, 1])
        assert all(torch.equal(a, b) for a, b in zip(fewer, [*ask(own, [0]), *ask(own, [1])], strict=True))


def test_a_causal_image_is_reused_whole_or_not_at_all() -> None:
    """Pruning may have dropped some of its tokens."""
    embeds = torch.randn(1, 12, 4)
    other = embeds.clone()
    other[:, 6:] += 1
    spans = ((3, 6),)
    allowed = torch.ones(12, 12).tril().bool()
    places = torch.arange(12)
    one, two = (Prompt(each, allowed, spans, (0,), places) for each in (embeds, other))
    assert common_prefix(one, two, 11) == 3
    assert common_prefix(one, Prompt(embeds.clone(), allowed, spans, (0,), places), 11) == 11
    plain = (Prompt(each, allowed, (), (), places) for each in (embeds, other))
    assert common_prefix(*plain, 11) == 6
    # Equal tokens at other positions have other keys.
    moved = Prompt(embeds, allowed, (), (), places.clamp(max=4))
    assert common_prefix(moved, Prompt(embeds, allowed, (), (), places), 11) == 5


def test_guidance_one_runs_one_branch() -> None:
    own = model()
    expected = draw(own, guidance_scale=1.0)
    with fx.accelerate(own) as handle:
        assert relative(draw(own, guidance_scale=1.0), expected) < LIMIT
        assert all(not step.guided for step in handle.runner.last_image.plan.steps)
        assert relative(draw(own, guidance_scale=0), expected) < LIMIT


def test_velocities_are_guided() -> None:
    own = model()
    with fx.accelerate(own):
        inputs = {"steps": 3, "return_velocity": True}
        _, two = fx.janusflow.sample(own, noise(2), PROMPTS[0], guidance_scale=[2.0, 5.0], **inputs)
        for row, scale in enumerate((2.0, 5.0)):
            _, one = fx.janusflow.sample(own, noise(2)[row : row + 1], PROMPTS[0], guidance_scale=scale, **inputs)
            assert torch.equal(two[:, row : row + 1], one)
    branches = torch.tensor([[3.0], [1.0]])[:, :, None, None]
    assert float(guide(branches, 5.0)) == 11.0


# ---- a model that changes


@pytest.mark.parametrize(
    "change",
    [
        lambda own: own.vision_gen_enc_model.mid_block.res_blocks[0].depthwise.weight.data.mul_(2),
        lambda own: own.vision_gen_dec_model.out_convs[0].unpatch_conv.weight.data.add_(0.01),
        lambda own: setattr(own.vision_gen_enc_model.mid_block.res_blocks[1].channelwise_norm, "eps", 0.5),
        lambda own: own.vision_gen_dec_aligner.register_forward_hook(lambda m, i, o: o * 2),
        lambda own: own.vision_gen_dec_model.mid_block.res_blocks[0].norm.register_forward_hook(lambda m, i, o: -o),
        lambda own: setattr(own.language_model.model.layers[2].mlp, "up_proj", nn.Linear(96, 256, bias=False)),
        lambda own: own.vision_gen_enc_model.time_embed.linear_1.bias.data.add_(1),
        lambda own: setattr(own.vision_gen_enc_model, "in_conv", nn.Conv2d(4, 48, 2, stride=2)),
    ],
)
def test_a_change_counts_in_the_next_image(change: Callable[[Any], Any]) -> None:
    own = model()
    with fx.accelerate(own):
        before = draw(own)
        torch.manual_seed(5)
        change(own)
        got = draw(own)
    assert not torch.equal(got, before)
    assert relative(got, draw(own)) < LIMIT


@pytest.mark.parametrize(
    "change",
    [
        lambda own: own.vision_und_enc_model.vision_tower.pos_embed.data.mul_(3),
        lambda own: own.beg_of_und_embed.data.mul_(3),
        lambda own: own.vision_und_enc_model.vision_tower.blocks[1].norm2.register_forward_hook(lambda m, i, o: o * 2),
        lambda own: own.vision_und_enc_model.vision_tower.blocks[0].attn.qkv.bias.data.add_(1),
    ],
)
def test_a_change_counts_in_the_next_answer(change: Callable[[Any], Any]) -> None:
    own = model()
    with fx.accelerate(own):
        ask(own, [0, 1])
        change(own)
        got = ask(own, [0, 1])
    assert all(torch.equal(a, b) for a, b in zip(got, ask(own, [0, 1]), strict=True))


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("vision_gen_enc_model", "hook"),
        ("vision_gen_dec_model.mid_block.res_blocks.1", "hook"),
        ("vision_gen_dec_model.out_convs.0", "class"),
        ("vision_und_enc_model.vision_tower", "hook"),
        ("vision_und_enc_model.vision_tower.blocks.2.attn", "forward"),
        ("vision_und_enc_model.vision_tower.blocks.0.mlp.act", "activation"),
        ("language_model.model.layers.3", "hook"),
        ("language_model.model.layers.3.self_attn", "class"),
        ("", "hook"),
    ],
)
def test_what_would_be_passed_over_is_refused(path: str, what: str) -> None:
    own = model()
    module = own.get_submodule(path)
    if what == "hook":
        module.register_forward_hook(lambda m, i, o: o)
    elif what == "class":
        module.__class__ = type("Mine", (type(module),), {})
    elif what == "activation":
        own.get_submodule(path.rpartition(".")[0]).act = nn.ReLU()
    else:
        module.forward = lambda x: x
    with pytest.raises(TypeError, match=rf"^model\.?{path}: "):
        fx.accelerate(own)
    assert fx.handle_of(own) is None


def test_removed_it_is_as_before() -> None:
    own = model()
    state = copy.deepcopy(own.state_dict())
    expected = draw(own)
    config = CONFIGS["paper"]
    with fx.accelerate(own, config, plan(own, config)):
        draw(own, steps=None)
    assert torch.equal(draw(own), expected)
    assert all(torch.equal(own.state_dict()[name], value) for name, value in state.items())


# ---- arguments


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"noise": torch.zeros(0, 4, 12, 12)}, ValueError, r"noise: expected \[images >= 1, 4, 12, 12\]"),
        ({"noise": torch.zeros(1, 4, 12, 10)}, ValueError, "noise: expected"),
        ({"noise": torch.zeros(1, 4, 12, 12).long()}, TypeError, "noise: expected a floating-point tensor"),
        ({"tokens": torch.tensor([[1, 2, 3]] * 2)}, ValueError, "tokens: expected 1 rows, got 2"),
        ({"tokens": torch.tensor([1])}, ValueError, "tokens: expected bos, a prompt and the tag"),
        ({"tokens": torch.tensor([1, 320, 6])}, IndexError, r"tokens: expected token ids in \[0, 320\), got 320"),
        ({"steps": 0}, ValueError, "steps: expected an integer in .1, 9999."),
        ({"steps": True}, ValueError, "steps: expected an integer in .1, 9999."),
        ({"guidance_scale": -1.0}, ValueError, "guidance_scale: expected a finite number"),
        ({"guidance_scale": [1.0, 2.0]}, ValueError, "guidance_scale: expected 1 finite numbers"),
        ({"pad_token": 320}, IndexError, "pad_token: expected a token id"),
        ({"callback": 5}, TypeError, "callback: expected None or a function"),
    ],
)
@pytest.mark.parametrize("fast", [False, True])
def test_wrong_arguments_of_a_drawing(changes: dict[str, Any], error: Any, message: str, fast: bool) -> None:
    own = model()
    if fast:
        fx.accelerate(own)
    arguments = {"noise": noise(), "tokens": PROMPTS[0], "steps": 2, **changes}
    with pytest.raises(error, match=message):
        fx.janusflow.sample(own, **arguments)
    assert draw(own).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pixel_values": torch.zeros(1, 3, 48, 40)}, ValueError, r"pixel_values: expected \[1, 3, 48, 48\]"),
        ({"tokens": torch.tensor([[1, 3, 5, 5, 4]])}, ValueError, "tokens: expected one image, begin_of_image and 36"),
        ({"tokens": ASKED["tokens.0"][:, :42]}, ValueError, "tokens: expected"),
        ({"tokens": ASKED["tokens.0"].float()}, TypeError, "tokens: expected int64"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: expected an integer >= 0"),
        ({"eos_token": 1.0}, TypeError, "eos_token: expected None or a token id"),
        ({"temperature": -1.0}, ValueError, "temperature"),
    ],
)
@pytest.mark.parametrize("fast", [False, True])
def test_wrong_arguments_of_a_question(changes: dict[str, Any], error: Any, message: str, fast: bool) -> None:
    own = model()
    if fast:
        fx.accelerate(own)
    arguments = {"pixel_values": ASKED["pixel_values.0"][0], "tokens": ASKED["tokens.0"], **changes}
    with pytest.raises(error, match=message):
        fx.janusflow.answer_tokens(own, **arguments)
    assert len(ask(own, [0], 2)[0]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 0}, "hidden: expected an integer"),
        ({"heads": 7}, "heads: expected a divisor of 96, got 7"),
        ({"kv": 3}, "kv: expected a divisor of 4"),
        ({"channels": 47}, "channels: expected an even integer"),
        ({"latent_size": 10}, "latent_size: expected twice the grid, 12"),
        ({"eps": float("nan")}, "eps: expected a finite number > 0"),
        ({"layers": 1000}, "layers: expected an integer in"),
    ],
)
def test_wrong_sizes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fx.janusflow.JanusFlowConfig(**{**FIXTURE.spec["model"], **change})


def test_words_end_and_are_told() -> None:
    own = model()
    words = ask(own, [0])[0].tolist()
    end, told = words[3], []
    for fast in (False, True):
        if fast:
            fx.accelerate(own)
        told.clear()
        got = fx.janusflow.answer_tokens(
            own,
            ASKED["pixel_values.0"][0],
            ASKED["tokens.0"],
            9,
            eos_token=end,
            on_token=lambda row, token: told.append((row, token)),
        )
        assert got.tolist() == words[: words.index(end) + 1] == [token for _, token in told]


def test_pictures_become_pixels() -> None:
    config = fx.janusflow.JanusFlowConfig(**FIXTURE.spec["model"])
    for i in range(2):
        got = fx.janusflow.pixel_values(ASKED[f"image_rgb.{i}"].numpy(), config)
        torch.testing.assert_close(got, ASKED[f"pixel_values.{i}"][0])
    wide = Image.fromarray(np.full((10, 40, 3), 255, np.uint8))
    got = fx.janusflow.pixel_values(wide, config)
    assert got.shape == (1, 3, 48, 48) and got[0, 0, 24, 24] == 1 and abs(float(got[0, 0, 0, 0])) < 0.01
    with pytest.raises(TypeError, match="image: expected a PIL image"):
        fx.janusflow.pixel_values("a.png", config)
    with pytest.raises(ValueError, match="image: expected uint8"):
        fx.janusflow.pixel_values(np.zeros((4, 4)), config)


def test_a_model_is_pickled_and_copied() -> None:
    own = model()
    expected = draw(own)
    with fx.accelerate(own):
        for other in (pickle.loads(pickle.dumps(own)), copy.deepcopy(own)):
            assert fx.handle_of(other) is None and relative(draw(other), expected) < LIMIT
