"""Answers whose tokens are captured and replayed: memory, streams, samples."""

import pytest
import torch
from support.answers import ask, batch
from support.conformance import public
from support.generation import CASES
from support.tape import capturing

import flashu_ext as fx
from flashu_ext import FlashUConfig
from flashu_ext.models.showo2 import answer_tokens_batch
from flashu_ext.runtime.readback import Readback

pytestmark = pytest.mark.usefixtures("one_thread", "shared_state")

LIMIT = 1e-4
STEPS = 10
SWITCHES = ("ffn_kernels", "routing_kernels", "norm_kernels", "step_kernels")

ALL = {"exact": {}, "paper": None, **CASES, "no kernels": dict.fromkeys(SWITCHES, False)}
SOME = ("exact", "paper", "tokens in the layers left", "encoder and head cache", "all of it", "all of it, adaptive")


@pytest.mark.parametrize("changes", [{}, {"token_prune_ratio": 0.5}, {"answer_layer_skip_ratio": 0.25}])
def test_replayed_answers_equal_eager_ones(changes):
    model, config = public().model(), FlashUConfig(**changes)
    asked = [[ask(1), ask(2, before=3, after=9)], [ask(3, after=4), ask(1)], [ask(2), ask(4)], [ask(5), ask(6)]]
    with fx.accelerate(model, config):
        expected = [answer_tokens_batch(model, *batch(each), max_new_tokens=8) for each in asked]
    with capturing(fx.accelerate(model, config)) as handle:
        for each, wanted in zip(asked, expected, strict=True):
            got = answer_tokens_batch(model, *batch(each), max_new_tokens=8)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        graphs = handle.runner.understanding.pool.graphs()
        assert len(graphs) == 2 and all(each.captured for each in graphs)
        assert handle.runner.understanding.waits == 0, "without an end token the host reads no token"


@pytest.mark.parametrize("captured", [False, True])
def test_answers_stop_and_stream_row_by_row(captured):
    model, asked = public().model(), [ask(seed, after=5 + seed) for seed in range(4)]
    with fx.accelerate(model) as handle:
        if captured:
            capturing(handle)
        whole = answer_tokens_batch(model, *batch(asked), max_new_tokens=10)
        eos = int(whole[0][4])
        streamed = [[] for _ in asked]
        got = answer_tokens_batch(
            model,
            *batch(asked),
            max_new_tokens=10,
            eos_token=eos,
            on_token=lambda row, token: streamed[row].append(token),
        )
    for tokens, full, stream in zip(got, whole, streamed, strict=True):
        ends = (full == eos).nonzero().flatten().tolist()
        assert tokens.tolist() == full[: ends[0] + 1 if ends else None].tolist() == stream


def test_a_question_from_a_callback_does_not_affect_the_answer():
    model, config = public().model(), FlashUConfig()
    first, second = batch([ask(1)]), batch([ask(2)])
    with capturing(fx.accelerate(model, config)):
        expected = [answer_tokens_batch(model, *each, max_new_tokens=8)[0] for each in (first, second) * 2]
        nested = []

        def other(row, token):
            nested.append(answer_tokens_batch(model, *second, max_new_tokens=8)[0])

        for _ in range(2):
            got = answer_tokens_batch(model, *first, max_new_tokens=8, on_token=other)[0]
            assert torch.equal(got, expected[0])
        assert len(nested) == 16 and all(torch.equal(tokens, expected[1]) for tokens in nested)


def test_memory_for_answers_follows_the_prompts():
    model, short, long = public().model(), batch([ask(1)]), batch([ask(2, before=600)])
    with fx.accelerate(model):
        expected = answer_tokens_batch(model, *short, max_new_tokens=4)[0]
    with capturing(fx.accelerate(model)) as handle:
        held = []
        for each in (short, short, long, short, short, short):
            got = answer_tokens_batch(model, *each, max_new_tokens=4)[0]
            assert each is long or torch.equal(got, expected)
            held.append(handle.summary().memory["answers' keys and values"])
        assert held[2] > held[1] == held[-1], "memory of one long prompt is not kept"


def test_nan_stays_in_its_answer():
    model, clean = public().model(), batch([ask(1), ask(2, before=3)])
    broken = (torch.full_like(clean[0], float("nan")), *batch([ask(3, before=9), ask(4, before=9)])[1:])
    with capturing(fx.accelerate(model)):
        expected = answer_tokens_batch(model, *clean, max_new_tokens=6)
        for _ in range(3):
            for _ in range(2):  # two memories alternate
                answer_tokens_batch(model, *broken, max_new_tokens=6)
            got = answer_tokens_batch(model, *clean, max_new_tokens=6)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_samples_advance_generators_alike():
    model, asked = public().model(), batch([ask(1), ask(2), ask(3)])
    outcomes = []
    for captured in (False, True):
        with fx.accelerate(model) as handle:
            if captured:
                capturing(handle)
            generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
            for _ in range(3):
                settings = {"max_new_tokens": 9, "temperature": 5.0, "generators": generators}
                tokens = answer_tokens_batch(model, *asked, eos_token=172, **settings)
            outcomes.append([*tokens, *(torch.rand(1, generator=generator) for generator in generators)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_numbers_on_their_way_are_those_of_when_they_were_sent():
    sent, readback = torch.tensor([0.5, 2.0]), Readback()
    for values in ([0.5, 2.0], [3.0, 4.0]):
        sent.copy_(torch.tensor(values))
        readback.post(sent)
        sent.zero_()
        assert readback.wait() == values
    assert readback.waits == 2
