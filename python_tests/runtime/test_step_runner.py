"""The step runner: work captured and replayed for several images and prompts, no host syncs, launches, memory."""

import gc
import weakref

import pytest
import torch
from support.answers import ask, batch
from support.conformance import public, relative
from support.generation import CASES, sample, sample_as_upstream
from support.tape import READ_METHODS, TapeCapture, capturing, no_reads

import flashu_ext as fx
from flashu_ext import FlashUConfig
from flashu_ext.models.showo2 import answer_tokens_batch
from flashu_ext.runtime import answering
from flashu_ext.runtime.counting import DispatchCounter
from flashu_ext.runtime.graphs import MAX_GRAPHS, RARE_USES, GraphCache
from flashu_ext.runtime.work import PrefixWork, Variant
from flashu_ext.upstream import showo2 as upstream

pytestmark = pytest.mark.usefixtures("one_thread", "shared_state")

LIMIT = 1e-4
STEPS = 10
SWITCHES = ("ffn_kernels", "routing_kernels", "norm_kernels", "step_kernels")

ALL = {"exact": {}, "paper": None, **CASES, "no kernels": dict.fromkeys(SWITCHES, False)}
SOME = ("exact", "paper", "tokens in the layers left", "encoder and head cache", "all of it", "all of it, adaptive")


def accelerate(model, fixture, name):
    if name == "paper":
        return fx.accelerate(model, fixture.flashu_config(), fixture.flashu_plan())
    return fx.accelerate(model, FlashUConfig(steps=STEPS, **ALL[name]))


def prompts(fixture):
    """Inputs of three images: the fixture's, other noise, and prompts of other lengths and words."""
    base = fixture.sample_inputs
    other = {**base, "noise": base["noise"].flip(0)}
    shorter = dict(base)
    for key in ("text_tokens", "text_tokens_null"):
        shorter[key] = base[key].roll(-1, dims=1)
    for key in ("modality_positions", "modality_positions_null"):
        moved = base[key].clone()
        moved[..., 0] -= 1
        shorter[key] = moved
    return [base, other, shorter, base, base, shorter, other]


# ---- captured work


@pytest.mark.parametrize("name", ALL)
def test_replays_give_the_images_of_eager_work(name):
    fixture, model = public(), public().model()
    with accelerate(model, fixture, name) as handle:
        expected = [fx.showo2.sample(model, **inputs) for inputs in prompts(fixture)]
        assert handle.summary().step_runner.startswith("eager: ")
    with accelerate(model, fixture, name) as handle:
        capturing(handle)
        captured = []
        for inputs, latents in zip(prompts(fixture), expected, strict=True):
            assert relative(fx.showo2.sample(model, **inputs), latents) < LIMIT
            graphs = handle.summary().graphs
            captured.append(graphs["captured"])
        assert graphs["captured"] and graphs["replays"] > graphs["run eagerly"]
        # The fixture's images all choose the same layers, so work with skipped layers is captured too.
        assert captured[-1] == captured[-2] and graphs["replays"] > captured[-1], (
            "captured work is replayed for the next prompts"
        )
        assert not [reason for reason in handle.summary().fallbacks if "step graphs" in reason]


@pytest.mark.parametrize("name", ["exact", "paper", "all of it"])
def test_replays_serve_calls_of_upstreams_sampler(name):
    fixture, model = public(), public().model()
    steps = fixture.spec["flashu"]["steps"] if name == "paper" else STEPS
    with accelerate(model, fixture, name) as handle:
        expected = sample_as_upstream(model, fixture, steps)
    with accelerate(model, fixture, name) as handle:
        capturing(handle)
        for _ in range(3):
            assert relative(sample_as_upstream(model, fixture, steps), expected) < LIMIT
        assert handle.summary().graphs["replays"] > 0
        assert relative(sample(model, fixture, steps=steps), expected) < LIMIT, "and for whole images after them"


def test_images_in_progress_have_memory_of_their_own():
    fixture, model = public(), public().model()
    first, second = prompts(fixture)[:2]
    with capturing(fx.accelerate(model, FlashUConfig(steps=6))) as handle:
        alone = [fx.showo2.sample(model, **inputs) for inputs in (first, second)]
        nested = []

        def other(step, latents):
            if step in (2, 4):
                nested.append(fx.showo2.sample(model, **second))

        for _ in range(2):
            assert torch.equal(fx.showo2.sample(model, **first, callback=other), alone[0])
        assert all(torch.equal(latents, alone[1]) for latents in nested)
        assert handle.summary().graphs["memories"] == 2, "memory is reused, not allocated again"


def test_an_error_releases_the_memory():
    fixture, model = public(), public().model()
    with capturing(fx.accelerate(model, FlashUConfig(steps=6))) as handle:
        expected = sample(model, fixture)

        def stop(step, latents):
            if step == 3:
                raise KeyboardInterrupt

        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                sample(model, fixture, callback=stop)
        assert torch.equal(sample(model, fixture), expected)
        assert handle.summary().graphs["memories"] == 1


def test_a_failed_capture_falls_back_and_says_why():
    fixture, model = public(), public().model()
    calls = []

    class Fails:
        def __call__(self, work):
            calls.append(work)
            raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")

    with fx.accelerate(model, FlashUConfig(steps=6)) as handle:
        expected = sample(model, fixture)
        capturing(handle, Fails)
        assert relative(sample(model, fixture), expected) < LIMIT
        assert handle.summary().fallbacks == {"step graphs: capturing failed: CUDA error: operation not permitted": 1}
    assert len(calls) == 1, "capture is not tried again"


def test_two_images_in_turn_keep_their_states_apart():
    """Two images of one prompt through upstream's interface: their tensors tell the states apart."""
    fixture, model = public(), public().model()
    i = fixture.sample_inputs
    times = [torch.full((4,), value) for value in (0.1, 0.3, 0.5, 0.7)]

    def conditioning():
        return {
            "text_tokens": torch.cat([i["text_tokens"], i["text_tokens_null"]]),
            "modality_positions": torch.cat([i["modality_positions"], i["modality_positions_null"]]),
            "guidance_scale": 4.0,
        }

    noises = [i["noise"].repeat(2, 1, 1, 1), i["noise"].flip(0).repeat(2, 1, 1, 1)]
    config = FlashUConfig(steps=6, head_cache_interval=2, encoder_cache=True)
    for capture in (False, True):
        with fx.accelerate(model, config) as handle:
            if capture:
                capturing(handle)
            alone = []
            for noise in noises:
                given = conditioning()
                alone.append([model.t2i_generate(image_latents=noise, t=t, **given) for t in times])
                handle.runner.reset()
            both = [conditioning(), conditioning()]
            for step, t in enumerate(times):
                for image, given in enumerate(both):
                    got = model.t2i_generate(image_latents=noises[image], t=t, **given)
                    assert relative(got, alone[image][step]) < LIMIT
            handle.runner.reset()
            for _ in range(2):  # an abandoned image, and new conditioning tensors for every call
                for t in times[:3]:
                    got = model.t2i_generate(image_latents=noises[0], t=t, **conditioning())
                assert relative(got, alone[0][2]) < LIMIT


@pytest.mark.parametrize("captured", [False, True])
def test_removing_in_the_middle_is_an_error(captured):
    fixture, model = public(), public().model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with fx.accelerate(model, fixture.flashu_config(), fixture.flashu_plan()) as handle:
        if captured:
            capturing(handle)
            sample(model, fixture)
        with pytest.raises(RuntimeError, match="removed or reset while this image"):
            sample(model, fixture, callback=lambda step, latents: handle.remove() if step == 3 else None)
    with fx.accelerate(model) as handle:
        if captured:
            capturing(handle)
        images, befores, afters = batch([ask(1)])
        with pytest.raises(RuntimeError, match="removed or reset while this question"):
            answer_tokens_batch(model, images, befores, afters, 6, on_token=lambda row, token: handle.remove())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_graphs_are_bounded_whatever_is_skipped():
    x, ran = torch.zeros(1), []
    graphs = GraphCache(x, TapeCapture(), {})
    for number in range(3 * MAX_GRAPHS):
        for _ in range(2):
            graphs.run(lambda x, work: x.add_(1), PrefixWork(number, Variant(None), adapter=None))
    assert graphs.captured == MAX_GRAPHS and x.item() == 6 * MAX_GRAPHS
    for _ in range(RARE_USES + 1):
        graphs.run(lambda x, work: ran.append(x.add_(1)), PrefixWork(0, Variant(None, skipped=(1,)), adapter=None))
    assert graphs.replayed == 3 * MAX_GRAPHS + 1 and len(ran) == RARE_USES + 1, "captured in the end"


def test_a_finished_image_holds_no_memory():
    fixture, model = public(), public().model()
    with fx.accelerate(model, FlashUConfig(steps=4)) as handle:
        engine, seen = handle.runner.generation, []
        original = engine.step

        def step(states):
            seen.append(weakref.ref(states[0].memory.llm))
            original(states)

        engine.step = step
        sample(model, fixture)
        gc.collect()
        assert seen[0]() is None and handle.summary().tokens["tail"] > 0


def test_latents_given_to_a_callback_are_its_own():
    fixture, model, kept = public(), public().model(), []
    with fx.accelerate(model, FlashUConfig(steps=4)):
        generated = sample(model, fixture, callback=lambda step, latents: kept.append(latents))
    assert torch.equal(kept[-1], generated) and not torch.equal(kept[0], kept[1])
    kept[-1].zero_()
    assert generated.abs().sum() > 0


def test_work_runs_then_is_captured_then_replayed():
    x, log = torch.zeros(3), []

    def add(memory, work):
        log.append(work)
        memory.add_(1)

    graphs = GraphCache(x, TapeCapture(), {})
    for count in range(1, 5):
        assert graphs.run(add, "add").launches == {"add_": 1}
        assert x.tolist() == [count] * 3
    assert log == ["add"] * 2 and (graphs.eager, graphs.captured, graphs.replayed) == (1, 1, 3)
    assert graphs.run(lambda memory, work: memory.sub_(memory), "other").launched == 1


def moved_alone(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()


@pytest.mark.parametrize("move", [lambda model: model.bfloat16().float(), moved_alone], ids=["with buffers", "alone"])
def test_weights_that_moved_are_captured_anew(move):
    fixture, model = public(), public().model()
    asked = batch([ask(1), ask(2)])
    with fx.accelerate(model, FlashUConfig(steps=6)) as handle:
        capturing(handle)
        for _ in range(3):
            before = sample(model, fixture)
            answer_tokens_batch(model, *asked, max_new_tokens=6)
        move(model)
        latents, tokens = sample(model, fixture), answer_tokens_batch(model, *asked, max_new_tokens=6)
        assert relative(latents, before) > LIMIT
    with fx.accelerate(model, FlashUConfig(steps=6)):
        assert relative(latents, sample(model, fixture)) < LIMIT
        expected = answer_tokens_batch(model, *asked, max_new_tokens=6)
        assert all(torch.equal(a, b) for a, b in zip(tokens, expected, strict=True))


def test_an_answer_too_long_for_fixed_memory_is_the_same(monkeypatch):
    model, asked = public().model(), batch([ask(1), ask(2)])
    with capturing(fx.accelerate(model)):
        expected = answer_tokens_batch(model, *asked, max_new_tokens=6)
        monkeypatch.setattr(answering, "FIXED_TOKENS", 2)
        for _ in range(2):
            tokens = answer_tokens_batch(model, *asked, max_new_tokens=6)
            assert all(torch.equal(a, b) for a, b in zip(tokens, expected, strict=True))
        short = answer_tokens_batch(model, *asked, max_new_tokens=3)
        assert all(torch.equal(a[:3], b) for a, b in zip(expected, short, strict=True))


@pytest.mark.parametrize("name", ["exact", "all of it, adaptive"])
def test_calls_inside_and_outside_inference_mode(name):
    fixture, model = public(), public().model()
    asked = batch([ask(1), ask(2)])
    with capturing(accelerate(model, fixture, name)) as handle:
        expected, answers = sample(model, fixture), answer_tokens_batch(model, *asked, max_new_tokens=6)
        handle.runner.reset()
        for mode in (True, False, True, False):
            with torch.inference_mode(mode):
                assert relative(sample(model, fixture), expected) < LIMIT
                got = answer_tokens_batch(model, *asked, max_new_tokens=6)
                assert all(torch.equal(a, b) for a, b in zip(got, answers, strict=True))


# ---- no host syncs in the loop


ASKED = [name for name in READ_METHODS if name != "numpy"]
"""Ways to ask for a tensor's value. Not numpy, which looks at memory of the host, where what was sent arrives."""


@pytest.mark.parametrize("name", SOME)
def test_the_loop_reads_no_value_on_the_host(name, monkeypatch):
    fixture, model = public(), public().model()
    with accelerate(model, fixture, name) as handle:
        engine, seen = handle.runner.generation, []
        original = engine.step

        def step(state):
            with no_reads(ASKED), DispatchCounter() as counter:
                original(state)
            seen.append(counter.counts)

        monkeypatch.setattr(engine, "step", step)
        fx.showo2.sample(model, **fixture.sample_inputs)
        summary = handle.summary()
    assert len(seen) == sum(summary.steps.values())
    assert sum(counts.synced for counts in seen) == summary.syncs == 0
    choices = len(summary.layers_skipped)
    assert summary.host_waits >= choices
    if not handle.config.adaptive_cache:
        assert summary.host_waits == choices, "the host waits only for a choice of layers"
    if name == "exact":
        assert summary.host_waits == 0


def test_a_call_of_upstreams_sampler_reads_once(monkeypatch):
    fixture, model = public(), public().model()
    with fx.accelerate(model, FlashUConfig(steps=6)) as handle:
        expected, seen = sample_as_upstream(model, fixture, 6), []
        original = model.t2i_generate

        def call(**arguments):
            # The first call reads its conditioning.
            with no_reads(ASKED if seen else ()), DispatchCounter() as counter:
                result = original(**arguments)
            seen.append(counter.counts.synced)
            return result

        monkeypatch.setitem(model.__dict__, "t2i_generate", call)
        assert handle.active
        assert relative(sample_as_upstream(model, fixture, 6), expected) < LIMIT
        monkeypatch.setitem(model.__dict__, "t2i_generate", original)
    assert seen[0] > 0 and seen[1:] == [0] * 4


def test_conditioning_written_to_in_place_is_noticed():
    fixture, model = public(), public().model()
    i = fixture.sample_inputs
    tokens = torch.cat([i["text_tokens"], i["text_tokens_null"]])
    call = {
        "image_latents": i["noise"].repeat(2, 1, 1, 1),
        "text_tokens": tokens,
        "modality_positions": torch.cat([i["modality_positions"], i["modality_positions_null"]]),
        "guidance_scale": 4.0,
    }
    times = [torch.full((4,), value) for value in (0.1, 0.2, 0.3)]
    with fx.accelerate(model, FlashUConfig(steps=6)) as handle:
        model.t2i_generate(t=times[0], **call)
        model.t2i_generate(t=times[1], **call)
        assert sum(handle.summary().steps.values()) == 2
        tokens[:, 3] = 7
        got = model.t2i_generate(t=times[2], **call)
        assert sum(handle.summary().steps.values()) == 1, "another image"
        assert relative(got, model.t2i_generate(t=times[2], **{**call, "text_tokens": tokens.clone()})) < LIMIT
        again = model.t2i_generate(t=times[0], **call)
        assert sum(handle.summary().steps.values()) == 1 and again.isfinite().all(), "time went back"
        assert torch.equal(model.t2i_generate(t=times[0], **call), again)
        assert sum(handle.summary().steps.values()) == 1, "time stood still"


def test_the_oldest_image_in_progress_makes_room(monkeypatch):
    fixture, model = public(), public().model()
    i = fixture.sample_inputs
    monkeypatch.setattr(upstream, "MAX_IN_PROGRESS", 2)

    def call(image, t):
        tokens = torch.cat([i["text_tokens"], i["text_tokens_null"]])
        tokens[:, 3] = image  # each image has a prompt of its own
        return model.t2i_generate(
            image_latents=i["noise"].repeat(2, 1, 1, 1), t=torch.full((4,), t), text_tokens=tokens,
            modality_positions=torch.cat([i["modality_positions"], i["modality_positions_null"]]), guidance_scale=4.0,
        )  # fmt: skip

    with fx.accelerate(model, FlashUConfig(steps=6, head_cache_interval=2)) as handle:
        for image in (1, 2, 3):
            call(image, 0.1)
        assert handle.summary().evicted == 1
        call(2, 0.2)
        assert sum(handle.summary().steps.values()) == 2, "the second one goes on"
        with pytest.raises(RuntimeError, match=r"t: a call at 0.2 .* evicted for a newer one, as 2 were in progress"):
            call(1, 0.2)
        assert handle.summary().evicted == 1


def test_the_counter_counts_reads_and_launches_not_views():
    x = torch.arange(6.0)
    with DispatchCounter() as counter:
        y = x.view(2, 3).t()[0].contiguous() + 1
        torch.equal(y, y)
        float(y.sum())
        torch.empty(3)
        fx.ops.gathered_ffn(torch.ones(1, 4), *(torch.ones(*s) for s in ((8, 4), (8, 4), (4, 8))))
    assert counter.counts.syncs == {"equal": 1, "_local_scalar_dense": 1}
    launches = dict(counter.counts.launches)
    assert launches.pop("gathered_ffn") == 2 and launches.pop("ones") == 4
    assert launches == {"clone": 1, "add": 1, "sum": 1}


def test_launches_of_an_evaluation_are_reported_by_kind():
    fixture, model = public(), public().model()
    with accelerate(model, fixture, "paper") as handle:
        fx.showo2.sample(model, **fixture.sample_inputs)
        first = handle.summary()
        fx.showo2.sample(model, **fixture.sample_inputs)
        assert handle.summary().launches == first.launches
    assert set(first.launches) == set(first.steps)
    assert first.launches["head cached"] < 12 < first.launches["pruned"] < first.launches["full"]
    assert "an evaluation" in str(first)


# ---- memory


def test_memory_is_reported_by_purpose_and_released():
    fixture, model = public(), public().model()
    with fx.accelerate(model, FlashUConfig(steps=6, head_cache_interval=2, encoder_cache=True)) as handle:
        sample(model, fixture)
        summary = handle.summary()
        assert summary.cache_bytes == 0 == sum(summary.memory.values()), "without captured work no memory is kept"
        last = summary.last_image_memory
        assert {"keys and values", "time tables", "activations", "encoder cache", "head cache"} <= set(last)
        capturing(handle)
        for _ in range(3):
            sample(model, fixture)
            held = handle.summary().memory
        assert held == handle.summary().memory and held["keys and values"] > last["keys and values"]
        before = dict(held)
        sample(model, fixture)
        assert handle.summary().memory == before, "bounded"
        assert handle.summary().cache_bytes == sum(held.values())
    assert handle.summary().cache_bytes == 0


# ---- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["exact", "paper", "tokens forecast", "all of it"])
def test_graphs_on_a_gpu_give_the_images_of_eager_work_without_syncs(name):
    fixture = public()
    model = fixture.model().cuda()
    inputs = [{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in each.items()} for each in prompts(fixture)]
    config = fixture.flashu_config() if name == "paper" else FlashUConfig(steps=STEPS, **ALL[name])
    plan = fixture.flashu_plan() if name == "paper" else None
    with fx.accelerate(model, config.replace(step_graphs=False), plan):
        expected = [fx.showo2.sample(model, **each) for each in inputs]
    with fx.accelerate(model, config, plan) as handle:
        engine, original = handle.runner.generation, handle.runner.generation.step

        def step(state):
            torch.cuda.set_sync_debug_mode("error")
            try:
                original(state)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        engine.step = step
        for each, latents in zip(inputs, expected, strict=True):
            assert relative(fx.showo2.sample(model, **each).cpu(), latents.cpu()) < LIMIT
        assert handle.summary().graphs["replays"] > 0 and not handle.summary().fallbacks


@pytest.mark.gpu
@needs_gpu
def test_graphs_on_a_gpu_give_the_answers_of_eager_work():
    model, asked = public().model().cuda(), [ask(1), ask(2, before=3, after=9)]
    images, befores, afters = batch(asked)
    inputs = (images.cuda(), [b.cuda() for b in befores], [a.cuda() for a in afters])
    with fx.accelerate(model, FlashUConfig(step_graphs=False)):
        expected = answer_tokens_batch(model, *inputs, max_new_tokens=8)
    with fx.accelerate(model) as handle:
        for _ in range(4):
            got = answer_tokens_batch(model, *inputs, max_new_tokens=8)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert handle.runner.understanding.pool.graphs()[0].captured
