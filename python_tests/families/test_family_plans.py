"""Calibration of JanusFlow and BAGEL: sums against the dense model in fp64, resumption, plans on the runtime, refusals."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
from support.calibration import TIMES, run, same
from support.conformance import FIXTURES, public, relative
from support.watched import Measured, Watched
from torch import Tensor

import flashu_ext as fx
from flashu_ext.models import bagel, janusflow
from flashu_ext.models.bagel import conformance as bagel_outputs
from flashu_ext.models.bagel.layers import Context, Experts
from flashu_ext.models.calibration import DensePass
from flashu_ext.models.comparison import Fixture
from flashu_ext.models.janusflow import conformance as janusflow_outputs
from flashu_ext.planning.config import FlashUConfig

TASKS = ("generation", "understanding")
PAD, ANSWER = 7, (21, 22, 23)
SIZE = (48, 64)


def noise_of(task: str, index: int, t: float, shape: Any, seed: int = 0) -> Tensor:
    """The noise that depends on these alone."""
    digest = hashlib.sha256(f"{seed}/{task}/{index}/{t!r}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)


# ---- JanusFlow

JANUS = Fixture.read(FIXTURES / "janusflow")
JANUS_DRAWN, JANUS_ASKED = JANUS.tensors("t2i"), JANUS.tensors("mmu")
JANUS_PROMPTS = (JANUS_DRAWN["tokens.0"], torch.tensor([1, 50, 51, 52, 53, 6]))


def janus_generation(count: int = 2, seed: int = 0) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(seed)
    for n in range(count):
        images = 1 + n % 2
        yield fx.janusflow.GenerationSample(
            torch.randn(images, 4, 12, 12, generator=generator), JANUS_PROMPTS[n % 2], PAD
        )


def janus_questions(count: int = 2) -> Iterator[Any]:
    for n in range(count):
        tokens = torch.cat([JANUS_ASKED[f"tokens.{n % 2}"], torch.tensor([[*ANSWER[:-1], 24 + n]])], dim=1)
        yield fx.janusflow.UnderstandingSample(JANUS_ASKED[f"pixel_values.{n % 2}"][0], tokens, len(ANSWER))


@torch.no_grad()
def janus_measured(model: Any, task: str) -> Measured:
    """Each branch alone, without padding: what is not seen is not there, and positions count it all the same."""
    llm = model.language_model.model
    samples = []
    if task == "understanding":
        for sample in janus_questions():
            start, count = janusflow.images.image_span(model, sample.tokens)
            embeds = llm.embed_tokens(sample.tokens)
            embeds[:, start : start + count] = model.embed_image(sample.pixel_values.double())
            with Watched(llm.layers, "mlp", llm.norm) as watched:
                llm(inputs_embeds=embeds, use_cache=False)
            samples.append([watched])
        return Measured.of(samples, len(ANSWER))
    for index, sample in enumerate(janus_generation()):
        rows = []
        prompt = sample.tokens[..., :-1].reshape(-1, sample.tokens.shape[-1] - 1)
        for t in TIMES:
            noised = t * sample.latents + (1 - t) * noise_of(task, index, t, sample.latents.shape)
            with Watched(llm.layers, "mlp", llm.norm) as watched:
                for image in noised.double().split(1):
                    time = model.vision_gen_enc_model.time_embed(torch.tensor([1000.0 * t]))
                    span = model.span(model.vision_gen_enc_model(image, time), time)
                    for seen in (prompt.shape[1], 1):
                        embeds = torch.cat([llm.embed_tokens(prompt[:1, :seen]), span], dim=1)
                        places = [*range(seen), *range(prompt.shape[1], prompt.shape[1] + span.shape[1])]
                        hidden = torch.ones(len(places), len(places), dtype=torch.bool).triu(1)
                        mask = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill_(hidden, -1e300)
                        # An own mask: transformers takes positions with a gap for two sequences.
                        llm(
                            inputs_embeds=embeds,
                            attention_mask=mask[None, None],
                            position_ids=torch.tensor([places]),
                            use_cache=False,
                        )
            rows.append(watched)
        samples.append(rows)
    return Measured.of(samples, None)


def janus_outputs(model: Any, task: str) -> Tensor:
    if task == "generation":
        noise = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(4))
        drawn: Tensor = fx.janusflow.sample(model, noise, JANUS_PROMPTS[0], 5, 3.0)
        return drawn
    words: Tensor = fx.janusflow.answer_tokens(model, JANUS_ASKED["pixel_values.0"][0], JANUS_ASKED["tokens.0"], 12)
    return words.double()


# ---- BAGEL

BAGEL = Fixture.read(FIXTURES / "bagel")
EDITED, BAGEL_ASKED = BAGEL.tensors("edit"), BAGEL.tensors("mmu")
IDS = bagel.TokenIds(**BAGEL.spec["token_ids"])


def text(*ids: int) -> Any:
    return bagel.Text(torch.tensor(ids))


def seen(i: int) -> Any:
    return bagel.Image(None, BAGEL_ASKED[f"vit_tokens.{i}"], BAGEL_ASKED[f"vit_position_ids.{i}"])


EDIT = (bagel.Image(EDITED["image_latents.0"], EDITED["vit_tokens.0"], EDITED["vit_position_ids.0"]), text(41, 42))


def bagel_generation(count: int = 2, seed: int = 0) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(seed)
    for n in range(count):
        latents = torch.randn(12, 64, generator=generator)
        yield fx.bagel.GenerationSample(latents, EDIT if n % 2 else [text(11, 12, 13 + n)], SIZE, IDS)


def bagel_questions(count: int = 2) -> Iterator[Any]:
    for n in range(count):
        yield fx.bagel.UnderstandingSample([seen(n % 2), text(220, 221 + n)], ANSWER, dict(BAGEL.spec["token_ids"]))


def doubled(item: Any) -> Any:
    """Of a sequence, for a model in fp64."""
    changed = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    return type(item)(**{k: v.double() if v is not None and v.is_floating_point() else v for k, v in changed.items()})


@torch.no_grad()
def bagel_measured(model: Any, task: str) -> Measured:
    """A drawing branch by branch, its patches alone; a question token by token behind its context."""
    stack = model.language_model.model
    samples = []
    if task == "understanding":
        for sample in bagel_questions():
            with Watched(stack.layers, "mlp", stack.norm) as watched:
                context = model.context(list(map(doubled, sample.inputs)), IDS)
                for token in (IDS.bos_token_id, *sample.answer):
                    embeds = stack.embed_tokens(torch.tensor([token]))
                    _, context = stack(embeds, Experts(), context, causal=True, step=1)
            samples.append([watched])
        return Measured.of(samples, len(ANSWER))
    for index, sample in enumerate(bagel_generation()):
        rows = []
        contexts = [model.context(list(map(doubled, each)), IDS) for each in (sample.inputs, sample.inputs[:-1])]
        for t in TIMES:
            noised = t * sample.latents + (1 - t) * noise_of(task, index, t, sample.latents.shape)
            with Watched(stack.layers, "mlp_moe_gen", stack.norm_moe_gen, lambda x: x[1:-1]) as watched:
                for context in contexts:
                    model.hidden(noised.double(), torch.tensor([1 - t]), (3, 4), context, IDS)
            rows.append(watched)
        samples.append(rows)
    return Measured.of(samples, None)


def bagel_outputs_of(model: Any, task: str) -> Tensor:
    if task == "generation":
        noise = torch.randn(12, 64, generator=torch.Generator().manual_seed(4))
        drawn: Tensor = fx.bagel.sample(model, noise, EDIT, SIZE, IDS, num_timesteps=6, cfg_img_scale=1.5)
        return drawn
    question = [seen(0), text(220, 221)]
    logits: Tensor = fx.bagel.answer_tokens(model, question, IDS, 6, stop=False, return_logits=True)[1]
    return logits


# ---- both


@dataclass(frozen=True, eq=False)
class Case:
    model: Callable[[], Any]
    generation: Callable[..., Iterator[Any]]
    questions: Callable[..., Iterator[Any]]
    measured: Callable[[Any, str], Measured]
    outputs: Callable[[Any, str], Tensor]
    ffns: dict[str, str]

    def layers(self, model: Any) -> Any:
        return model.language_model.model.layers


@cache
def plan_of(case: Case) -> fx.TaskPlan:
    return run(case.model(), list(case.generation()), list(case.questions()))


@cache
def oracle(case: Case, task: str) -> Measured:
    return case.measured(case.model().double(), task)


CASES = {
    "janusflow": Case(
        lambda: janusflow_outputs.model_of(JANUS),
        janus_generation,
        janus_questions,
        janus_measured,
        janus_outputs,
        dict.fromkeys(TASKS, "mlp"),
    ),
    "bagel": Case(
        lambda: bagel_outputs.model_of(BAGEL),
        bagel_generation,
        bagel_questions,
        bagel_measured,
        bagel_outputs_of,
        {"generation": "mlp_moe_gen", "understanding": "mlp"},
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def no_hooks(model: Any) -> bool:
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("task", TASKS)
def test_sums_and_scores_are_those_of_the_dense_model(case: Case, task: str) -> None:
    plan, expected, model = plan_of(case), oracle(case, task), case.model().double()
    assert plan.calibration is not None
    sums = plan.calibration.sums[task]
    for layer, activations in enumerate(expected.activations):
        assert sums.tokens == len(activations)
        for got, own in ((sums.total, activations.sum(0)), (sums.squares, activations.square().sum(0))):
            torch.testing.assert_close(got[layer], own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))
        down = getattr(case.layers(model)[layer], case.ffns[task]).down_proj.weight.detach()
        scores = {
            "wanda": down.abs().sum(0) * activations.norm(dim=0),
            "flap": down.square().sum(0) * activations.var(dim=0),
            "reconstruction": down.square().sum(0) * activations.square().sum(0),
        }
        for name, own in scores.items():
            got = plan.with_estimator(name).scores[task][layer].double()
            torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-5 * float(own.max()))


@pytest.mark.parametrize("task", TASKS)
def test_layer_importance_is_that_of_the_dense_model(case: Case, task: str) -> None:
    plan, expected = plan_of(case), oracle(case, task)
    assert plan.calibration is not None
    assert plan.layer_importance[task].shape == (len(TIMES) if task == "generation" else 1, plan.layers)
    torch.testing.assert_close(plan.layer_importance[task].double(), expected.importance, rtol=1e-3, atol=1e-6)
    means = plan.calibration.mean_layer_importance
    assert set(means) == {"understanding"}
    torch.testing.assert_close(
        means["understanding"].double(), oracle(case, "understanding").mean[0], rtol=1e-3, atol=1e-6
    )


def test_a_run_is_repeatable_and_leaves_the_model_alone(case: Case) -> None:
    model = case.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    samples = list(case.generation())
    clean = [sample.latents.clone() for sample in samples]
    assert same(plan_of(case), run(model, samples, case.questions()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(sample.latents, own) for sample, own in zip(samples, clean, strict=True))
    assert no_hooks(model) and fx.handle_of(model) is None


def test_each_task_by_itself_is_as_beside_the_other(case: Case) -> None:
    both = plan_of(case)
    for task, samples in (("generation", case.generation), ("understanding", case.questions)):
        alone = run(case.model(), **{task: samples()})
        assert alone.tasks == (task,) and torch.equal(alone.scores[task], both.scores[task])


def test_a_plan_is_kept_in_a_file(case: Case, tmp_path: Any) -> None:
    plan = plan_of(case)
    plan.save(tmp_path / "plan.safetensors")
    back = fx.TaskPlan.load(tmp_path / "plan.safetensors", model=case.model())
    assert same(plan, back)
    for name in ("wanda", "flap", "reconstruction"):
        one, other = plan.with_estimator(name), back.with_estimator(name)
        assert all(torch.equal(one.scores[task], other.scores[task]) for task in TASKS)
    changed = case.model()
    getattr(case.layers(changed)[1], case.ffns["generation"]).up_proj.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="made for another model"):
        fx.TaskPlan.load(tmp_path / "plan.safetensors", model=changed)


@pytest.mark.parametrize("stopped", TASKS)
def test_an_interrupted_run_is_resumed_to_the_same_bits(case: Case, tmp_path: Any, stopped: str) -> None:
    def interrupted(samples: Iterator[Any]) -> Iterator[Any]:
        yield from islice(samples, 2)
        raise KeyboardInterrupt

    file, model = tmp_path / "state.safetensors", case.model()
    makers = {"generation": case.generation, "understanding": case.questions}
    whole = run(model, case.generation(3), case.questions(3))
    again = {"checkpoint": file, "checkpoint_interval": 1}
    with pytest.raises(KeyboardInterrupt):
        run(
            model,
            **{task: interrupted(make(3)) if task == stopped else make(3) for task, make in makers.items()},
            **again,
        )
    assert file.exists() and no_hooks(model)
    with pytest.raises(ValueError, match=r"checkpoint of other samples: the first [23] of generation differ"):
        run(model, case.generation(3, seed=5), case.questions(3), **again)
    assert same(whole, run(model, case.generation(3), case.questions(3), **again))
    assert not file.exists()


def test_any_part_of_a_sample_tells_checkpoints_apart(tmp_path: Any) -> None:
    """Also tensors within a sequence."""
    model, file = CASES["bagel"].model(), tmp_path / "state.safetensors"
    (question,) = bagel_questions(1)
    image = question.inputs[0]
    keep = {"checkpoint": file, "keep_checkpoint": True}
    run(model, understanding=[question], **keep)
    changed = [
        dataclasses.replace(question, answer=(21, 22, 25)),
        dataclasses.replace(question, inputs=[image, text(220, 222)]),
        dataclasses.replace(question, inputs=[image, text(220), text(221)]),
        dataclasses.replace(
            question, inputs=[dataclasses.replace(image, vit_tokens=image.vit_tokens * 1.0001), text(220, 221)]
        ),
    ]
    for other in changed:
        with pytest.raises(ValueError, match="checkpoint of other samples"):
            run(model, understanding=[other], **keep)
    run(model, understanding=[question], **keep)


@pytest.mark.parametrize("task", TASKS)
def test_an_accelerated_model_runs_without_the_neurons_that_were_pruned(case: Case, task: str) -> None:
    plan = plan_of(case).with_ratio(0.4, 8)
    silenced = case.model()
    for n, layer in enumerate(case.layers(silenced)):
        gone = torch.ones(plan.intermediate, dtype=torch.bool)
        gone[plan.kept(task, n)] = False
        getattr(layer, case.ffns[task]).down_proj.weight.data[:, gone] = 0
    model = case.model()
    with fx.accelerate(model, FlashUConfig(ffn_prune_ratio=0.4, prune_multiple=8), plan):
        got = case.outputs(model, task)
    assert relative(got, case.outputs(silenced, task)) < 1e-5
    assert (
        relative(got, case.outputs(case.model(), task)) > 1e-5
        or not got.is_floating_point()
        or case.ffns[task] == "mlp"
    )


def test_half_precision_finds_nearly_the_same_neurons(case: Case) -> None:
    plan = run(case.model().bfloat16(), case.generation(), case.questions())
    for task in TASKS:
        for layer in range(plan.layers):
            shared = set(plan.kept(task, layer).tolist()) & set(plan_of(case).kept(task, layer).tolist())
            assert len(shared) >= 0.9 * plan.kept_neurons


def test_padding_and_tag_are_not_seen() -> None:
    """JanusFlow: what stands in the padding's places or behind the prompt changes no bit."""
    model = CASES["janusflow"].model()
    (sample,) = janus_generation(1)
    tokens = sample.tokens.clone()
    tokens[..., -1] = 9
    assert same(run(model, [sample]), run(model, [dataclasses.replace(sample, tokens=tokens, pad_token=3)]))


def test_one_prompt_serves_all_images_of_a_sample() -> None:
    model = CASES["janusflow"].model()
    (sample,) = janus_generation(1)
    flat = sample.tokens.reshape(-1)
    latents = torch.cat([sample.latents] * 2)
    one, each = (
        run(model, [dataclasses.replace(sample, latents=latents, tokens=tokens)])
        for tokens in (flat, flat.expand(2, -1))
    )
    assert same(one, each)


def test_a_drawing_from_nothing_has_one_branch() -> None:
    """BAGEL: without a text at the end there is nothing to leave out."""
    model = CASES["bagel"].model()
    (sample,) = bagel_generation(1)
    for inputs, branches in (([], 1), ([text(3)], 2), ([text(3), EDIT[0]], 1), (EDIT, 2)):
        plan = run(model, [dataclasses.replace(sample, inputs=inputs)])
        assert plan.calibration is not None
        assert plan.calibration.sums["generation"].tokens == branches * 12 * len(TIMES)


def test_texts_score_the_experts_of_texts() -> None:
    model = CASES["bagel"].model()
    tokens = torch.tensor([[IDS.bos_token_id, 30, 31, 32]])
    plan = run(model, understanding=[fx.TokenSample(tokens, 1)])
    stack = model.language_model.model
    with torch.no_grad(), Watched(stack.layers, "mlp", stack.norm) as watched:
        stack(stack.embed_tokens(tokens[0]), Experts(), Context(), causal=True, step=1)
    assert plan.calibration is not None
    for layer, ((activations,), (distances,)) in enumerate(zip(watched.activations, watched.distances, strict=True)):
        torch.testing.assert_close(
            plan.calibration.sums["understanding"].squares[layer].float(),
            activations.square().sum(0),
            rtol=1e-4,
            atol=1e-6,
        )
        assert abs(float(plan.layer_importance["understanding"][0, layer] - distances[-2])) < 1e-5


@pytest.mark.parametrize("inputs", [[text(3, 4)], EDIT, [text(3), *EDIT[:1]], []])
def test_the_rest_of_a_drawing_scores_the_experts_of_texts(inputs: Any) -> None:
    """At every time the tokens that the drawing experts do not compute: what both branches see, and the image's markers."""
    model = CASES["bagel"].model()
    (sample,) = bagel_generation(1)
    sample = dataclasses.replace(sample, inputs=inputs)
    plan = run(model, tasks={"prompts": [sample.prompt()]})
    stack = model.language_model.model
    whole, before = list(inputs), list(inputs[:-1]) if inputs and isinstance(inputs[-1], bagel.Text) else list(inputs)
    with torch.no_grad(), Watched(stack.layers, "mlp", stack.norm) as watched:
        for t in TIMES:
            noised = t * sample.latents + (1 - t) * noise_of("prompts", 0, t, sample.latents.shape)
            context = model.context(before, IDS)
            branches = [context] if len(whole) == len(before) else [model.append(context, whole[-1], IDS), context]
            for branch in branches:
                model.hidden(noised, torch.tensor([1 - t]), (3, 4), branch, IDS)
    assert plan.calibration is not None
    sums = plan.calibration.sums["prompts"]
    for layer, activations in enumerate(map(torch.cat, watched.activations)):
        assert sums.tokens == len(activations)
        torch.testing.assert_close(sums.squares[layer].float(), activations.square().sum(0), rtol=1e-4, atol=1e-5)


# ---- refusals


def changed(samples: Iterator[Any], **fields: Any) -> list[Any]:
    first, second = islice(samples, 2)
    return [first, dataclasses.replace(second, **fields)]


REFUSED: list[tuple[str, str, dict[str, Any], type[Exception], str]] = [
    ("janusflow", "generation", {"latents": torch.zeros(1, 4, 12, 10)}, ValueError, r"latents: expected \[images"),
    ("janusflow", "generation", {"latents": torch.zeros(1, 4, 12, 12).long()}, TypeError, "latents: expected a floating-point"),
    ("janusflow", "generation", {"tokens": torch.tensor([1])}, ValueError, "tokens: expected bos, a prompt and the tag"),
    ("janusflow", "generation", {"tokens": torch.tensor([1, 10**6, 3])}, IndexError, r"tokens: expected token ids in \[0, "),
    ("janusflow", "generation", {"pad_token": -1}, IndexError, r"pad_token: expected a token id in \[0, "),
    ("janusflow", "understanding", {"pixel_values": torch.zeros(1, 3, 4, 4)}, ValueError, "pixel_values: expected"),
    ("janusflow", "understanding", {"tokens": torch.tensor([[1, 2, 3]])}, ValueError, "tokens: expected one image"),
    ("janusflow", "understanding", {"answer_length": 10**4}, ValueError, r"answer_length: expected an integer in \[0, "),
    ("janusflow", "understanding", {"answer_length": True}, ValueError, r"answer_length: expected an integer in \[0, "),
    ("bagel", "generation", {"latents": torch.zeros(11, 64)}, ValueError, r"latents: expected \[12, 64\], got \(11, 64\)"),
    ("bagel", "generation", {"size": (48, 50)}, ValueError, r"size: expected \(height, width\)"),
    ("bagel", "generation", {"inputs": [3]}, TypeError, r"inputs\[0\]: expected a Text or an Image, got int"),
    ("bagel", "generation", {"token_ids": None}, TypeError, "token_ids: expected TokenIds"),
    ("bagel", "understanding", {"inputs": [text(10**6)]}, IndexError, r"inputs\[0\].ids: expected token ids"),
    ("bagel", "understanding", {"inputs": EDIT}, ValueError, r"inputs\[0\].latents: expected None, answers read images by vit"),
    ("bagel", "understanding", {"answer": (1, 10**6)}, IndexError, r"answer\[1\]: expected a token id in \[0, "),
    ("bagel", "understanding", {"answer": 3}, TypeError, "answer: expected a tuple of token ids, got int"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "task", "fields", "error", "message"), REFUSED)
def test_wrong_samples_are_refused_by_name_and_place(
    family: str,
    task: str,
    fields: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flashu_ext.calibration import calibrate

    case, passes = CASES[family], []
    real = calibrate._Observer.run

    def counting(self: Any, each: DensePass) -> None:
        passes.append(each)
        real(self, each)

    monkeypatch.setattr(calibrate._Observer, "run", counting)
    model = case.model()
    samples = {"generation": case.generation, "understanding": case.questions}[task]
    with pytest.raises(error, match=rf"^{task}\[1\]: {message}"):
        run(model, **{task: changed(samples(), **fields)})
    assert len(passes) == (len(TIMES) if task == "generation" else 1), "nothing of the wrong one is added"
    assert no_hooks(model)


def test_samples_of_another_kind_or_family_are_refused(case: Case) -> None:
    model = case.model()
    with pytest.raises(TypeError, match=r"^generation\[0\]: expected a GenerationSample, got UnderstandingSample"):
        run(model, case.questions())
    with pytest.raises(
        TypeError, match=r"^understanding\[0\]: expected a UnderstandingSample or TokenSample.*, got Gen"
    ):
        run(model, understanding=case.generation())
    (other,) = (each for each in CASES.values() if each is not case)
    for samples, name in ((other.generation(), type(other.model()).__name__), (_showo2(), "Show-o2")):
        with pytest.raises(TypeError, match=rf"(?i)^x\[0\]: model: expected a {name} model, as the sample is, got"):
            run(model, tasks={"x": samples})
    with pytest.raises(TypeError, match="as the sample is, got Showo2"):
        run(public().model(), case.generation())


def _showo2() -> Iterator[Any]:
    from support.calibration import generation_samples

    return generation_samples()


def test_numbers_that_are_not_finite_are_refused(case: Case) -> None:
    model = case.model()
    (sample,) = case.generation(1)
    spoilt = dataclasses.replace(sample, latents=sample.latents * float("nan"))
    with pytest.raises(
        ValueError, match=r"generation: activations: total: expected finite numbers, got nan at \[0, 0\]"
    ):
        run(model, [spoilt])
    assert no_hooks(model)


def test_an_error_in_the_model_leaves_nothing_on_it(case: Case) -> None:
    model = case.model()

    def failing(*_: object) -> None:
        raise RuntimeError("broken")

    hook = case.layers(model)[2].register_forward_pre_hook(failing)
    for task, samples in (("generation", case.generation()), ("understanding", case.questions())):
        with pytest.raises(RuntimeError, match="broken"):
            run(model, **{task: samples})
    hook.remove()
    assert no_hooks(model)
    assert same(plan_of(case), run(model, case.generation(), case.questions()))


def test_an_accelerated_model_is_refused(case: Case) -> None:
    model = case.model()
    with fx.accelerate(model), pytest.raises(RuntimeError, match="expected a model that is not accelerated"):
        run(model, case.generation())
