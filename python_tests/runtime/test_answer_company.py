"""An answer's bits do not depend on company: on its batch, its order, threads, what was asked before, and when others begin."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from support.answers import ask
from support.conformance import public
from support.tape import TapeCapture
from torch import Tensor

import flashu_ext as fx
from flashu_ext.models.adapter import Question
from flashu_ext.models.decoding import TokenSampler
from flashu_ext.models.showo2.understanding import prompt_embeds
from flashu_ext.upstream.showo2 import visual_spans

NEW = 6
CONFIGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "value norm": {"token_prune_ratio": 0.5},
    "attention": {"token_prune_ratio": 0.5, "token_prune_score": "attention"},
    "skip": {"token_prune_ratio": 0.3, "answer_layer_skip_ratio": 0.3},
}
Bits = tuple[list[int], list[Tensor]]
"""An answer's tokens, and the logits of each."""


def questions() -> list[dict[str, Any]]:
    """One is about another's image, one about two images, one is long, one has tokens that its answer does not see."""
    two = ask(5, 2, 7)
    two["image_latents"] = [two["image_latents"], ask(1)["image_latents"]]
    two["tokens_after_boi"] = torch.cat([two["tokens_after_boi"][:, :2], two["tokens_after_boi"]], 1)
    return [ask(1), ask(2, 3, 30), {**ask(1, 4, 12), "hidden": slice(1, 3)}, ask(1, 4, 11), ask(3, 300, 2), two]


def prompt_of(engine: Any, asked: dict[str, Any]) -> Any:
    images = asked["image_latents"]
    before, after = asked["tokens_before_image"], asked["tokens_after_boi"]
    if "hidden" in asked:
        if "prompt" not in asked:  # the dense model's own embeddings depend on threads
            asked["prompt"] = prompt_embeds(engine.network.source.model, images, before, after)
        embeds, allowed = asked["prompt"]
        allowed[4:, asked["hidden"]] = False
        return engine.prompt(Question(embeds, allowed, visual_spans(allowed, True)))
    return engine.question(engine.image_embeds(images if isinstance(images, list) else [images]), before, after)


class Picks:
    """Chooses tokens of questions, greedily or by draws, and keeps the logits."""

    def __init__(self, count: int, sampled: Sequence[int] = ()):
        """sampled: the seed of each question's draws; greedy where there are none."""
        self.logits: list[list[Tensor]] = [[] for _ in range(count)]
        generators = [torch.Generator().manual_seed(seed) for seed in sampled]
        self.sampler = TokenSampler(1.5, 40, 0.95, generators) if sampled else TokenSampler()

    def __call__(self, logits: Tensor, numbers: Sequence[int]) -> Tensor:
        for row, number in zip(logits, numbers, strict=True):
            self.logits[number].append(row.clone())
        return self.sampler(logits, numbers)


@torch.no_grad()
def answered(engine: Any, asked: Sequence[dict[str, Any]], sampled: Sequence[int] = (), **more: Any) -> list[Bits]:
    picks = Picks(len(asked), sampled)
    tokens = engine.decode([prompt_of(engine, each) for each in asked], NEW, picks, None, **more)
    return [([int(token) for token in own], logits) for own, logits in zip(tokens, picks.logits, strict=True)]


def same(one: Bits, other: Bits) -> bool:
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_answer_in_any_company_is_the_answer_alone(name: str, sampled: bool, threads: Any) -> None:
    model, pool, chance = public().model(), questions(), random.Random(0)
    alone = []
    with fx.accelerate(model, fx.FlashUConfig(**CONFIGS[name])) as handle:
        engine = handle.runner.understanding
        threads(1)
        for number, each in enumerate(pool):
            engine.reset()
            alone += answered(engine, [each], [number] if sampled else ())
        engine.reset()
        for case in range(9):
            threads((1, 2, 4)[case % 3])
            chosen = chance.choices(range(len(pool)), k=chance.randint(1, 8))
            if case == 5:
                engine.reset()
            for _ in range(2):  # the second time from the keys and values of the first
                got = answered(engine, [pool[i] for i in chosen], chosen if sampled else ())
                for number, bits in zip(chosen, got, strict=True):
                    assert same(bits, alone[number]), f"question {number} among {chosen}"
        assert engine.reused > 0


def test_rows_that_end_leave_the_others_and_their_own_prompts(threads: Any) -> None:
    model, pool = public().model(), questions()
    threads(1)
    with fx.accelerate(model) as handle, torch.no_grad():
        engine = handle.runner.understanding
        alone = [answered(engine, [each])[0] for each in pool]
        for ends in range(NEW):
            eos = alone[1][0][ends]
            prompts = [prompt_of(engine, each) for each in pool]
            tokens = engine.decode(prompts, NEW, TokenSampler(), eos)
            for own, (whole, _) in zip(tokens, alone, strict=True):
                until = whole.index(eos) + 1 if eos in whole else NEW
                assert [int(token) for token in own] == whole[:until]
            reused = engine.reused
            assert all(same(*pair) for pair in zip(answered(engine, pool), alone, strict=True))
            images = sum(sum(prompt.spans[-1]) for prompt in prompts)
            assert engine.reused - reused >= images, "every prompt was complete"


def drive(scheduler: Any, runner: Any, chance: random.Random, pool: Sequence[Any], events: int) -> dict[Any, Any]:
    """Random admissions, cancellations and errors: answer -> (question, picks, tokens told, how it ended)."""
    record: dict[Any, list[Any]] = {}
    step = 0
    while step < events or scheduler.under_way:
        step += 1
        with runner.working():
            while step < events and scheduler.room and chance.random() < 0.4:
                number, new = chance.randrange(len(pool)), chance.randint(1, NEW)
                asked = pool[number]
                told: list[int] = []
                fails = chance.randint(1, new) if chance.random() < 0.2 else None

                def on_token(token: int, told: list[int] = told, fails: int | None = fails) -> None:
                    told.append(token)
                    if len(told) == fails:
                        raise ValueError("of the listener")

                images = (
                    asked["image_latents"] if isinstance(asked["image_latents"], list) else [asked["image_latents"]]
                )
                picks = Picks(1, [number] if number % 2 else [])
                if chance.random() < 0.1:
                    with pytest.raises(RuntimeError):
                        scheduler.admit([images[0][:, :3]], *list(asked.values())[1:3], new, picks)
                    continue
                answer = scheduler.admit(images, *list(asked.values())[1:3], new, picks, None, on_token)
                record[answer] = [number, picks, told, new, fails, False]
            if scheduler.under_way and chance.random() < 0.1:
                cancelled = chance.choice(scheduler.under_way)
                scheduler.cancel(cancelled)
                record[cancelled][5] = True
            for ended in scheduler.step():
                assert (ended.error is not None) == (record[ended][4] is not None)
    return record


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", ["exact", "attention", "skip"])
def test_answers_that_begin_and_end_at_any_time_are_those_alone(name: str, captured: bool, threads: Any) -> None:
    model, pool = public().model(), [each for each in questions() if "hidden" not in each]
    threads(1)
    with fx.accelerate(model, fx.FlashUConfig(**CONFIGS[name])) as handle:
        runner = handle.runner
        alone = [answered(runner.understanding, [each], [i] if i % 2 else [])[0] for i, each in enumerate(pool)]
        runner.reset()
        if captured:
            runner.capture.make = TapeCapture
        for seed in range(3):
            threads((1, 2, 4)[seed])
            scheduler = runner.answering(1 + 3 * seed)
            record = drive(scheduler, runner, random.Random(seed), pool, 20)
            assert record
            for answer, (number, picks, told, new, fails, cancelled) in record.items():
                tokens, logits = alone[number]
                count = fails or new
                assert told == tokens[: len(told)] and (cancelled or len(told) == count)
                assert [int(token) for token in answer.tokens] == told
                for a, b in zip(picks.logits[0], logits, strict=False):  # captured, masks hide what lengths do else
                    assert torch.allclose(a, b, rtol=0, atol=1e-5) if captured else torch.equal(a, b)
            with runner.working():
                scheduler.close()
        threads(1)
        if not captured:
            assert all(same(answered(runner.understanding, [pool[i]])[0], alone[i]) for i in (0, 2, 4))


def test_a_question_about_a_known_image_computes_only_its_text(threads: Any) -> None:
    threads(1)
    model, first, other = public().model(), ask(1), ask(1, 4, 9)
    with fx.accelerate(model) as handle, handle.runner.working():
        engine, scheduler = handle.runner.understanding, handle.runner.answering()
        arguments = [
            [each["image_latents"], each["tokens_before_image"], each["tokens_after_boi"]] for each in (first, other)
        ]
        until_eoi = 4 + 1 + 1 + 36 + 1
        scheduler.admit([arguments[0][0]], *arguments[0][1:], 3, TokenSampler())
        scheduler.step()
        scheduler.admit([arguments[1][0]], *arguments[1][1:], 3, TokenSampler())
        assert engine.reused >= until_eoi, "of one under way"
        while scheduler.under_way:
            scheduler.step()
        reused = engine.reused
        scheduler.admit([arguments[0][0]], *arguments[0][1:], 3, TokenSampler())
        assert engine.reused - reused >= until_eoi, "of one that has ended"
        scheduler.close()


def test_answers_of_a_model_that_changes_end_by_a_named_error() -> None:
    model, asked = public().model(), list(ask(1).values())
    with fx.accelerate(model) as handle:
        runner = handle.runner
        scheduler = runner.answering(2)
        with runner.working():
            lost = scheduler.admit([asked[0]], *asked[1:], 9, TokenSampler())
            scheduler.step()
            with torch.no_grad():
                model.showo.model.layers[0].self_attn.q_proj.weight.mul_(1.01)
            assert scheduler.step() == [lost]
            assert "changed while this question was being answered" in str(lost.error)
            with torch.no_grad():
                again = scheduler.admit([asked[0]], *asked[1:], 2, TokenSampler())
            runner.reset()
            assert scheduler.step() == [again] and "reset" in str(again.error)
            third = scheduler.admit([asked[0]], *asked[1:], 2, TokenSampler())
            with pytest.raises(RuntimeError, match="expected at most 2 at once"):
                for _ in range(2):
                    scheduler.admit([asked[0]], *asked[1:], 2, TokenSampler())
            while scheduler.under_way:
                ended = scheduler.step()
            assert third.error is None and ended
            scheduler.close()
            assert scheduler.step() == []
