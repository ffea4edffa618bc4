"""Answers of an accelerated model: pruned tokens, skipped layers, batches, prefix reuse, and state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.answers import ask, batch, decoded, oracle
from support.conformance import public, relative

import flashu_ext as fx
from flashu_ext.models.adapter import Question
from flashu_ext.models.decoding import TokenSampler
from flashu_ext.models.masks import omni_allowed
from flashu_ext.models.showo2 import answer_tokens, answer_tokens_batch
from flashu_ext.models.showo2.adapter import Showo2Adapter
from flashu_ext.runtime import answering
from flashu_ext.runtime.token_pruning import TokenPruner
from flashu_ext.upstream.showo2 import visual_spans

LIMIT = 1e-4
SCORES = ("value_norm", "value_norm_small", "attention", "random")
NEW = 5


def logits_of(handle, asked, new=NEW):
    """Greedy answers through the runtime: (tokens per question, logits per question [new, vocab])."""
    engine = handle.runner.understanding
    with torch.no_grad():
        images = engine.image_embeds([a["image_latents"] for a in asked])
        prompts = [
            engine.question([image], a["tokens_before_image"], a["tokens_after_boi"])
            for image, a in zip(images, asked, strict=True)
        ]
        return decoded(engine, prompts, new)


# ---- pruned tokens


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("layer", [0, 2, 7])
@pytest.mark.parametrize("ratio", [0.3, 0.97])
def test_pruning_equals_masking_the_dropped_tokens(score, layer, ratio):
    model = public().model()
    asked = ask(1)
    tokens, expected, _ = oracle(model, **asked, max_new_tokens=NEW, ratio=ratio, layer=layer, score=score)
    _, dense, _ = oracle(model, **asked, max_new_tokens=1)
    config = fx.FlashUConfig(token_prune_ratio=ratio, token_prune_layer=layer, token_prune_score=score)
    with fx.accelerate(model, config) as handle:
        (got,), (logits,) = logits_of(handle, [asked])
        counts = handle.summary().tokens
    assert got == tokens and relative(logits, expected) < LIMIT
    assert relative(logits[:1], dense) > 10 * LIMIT  # pruning changes the logits
    assert (counts["visual"], counts["visual kept"]) == (36, 36 - int(36 * ratio))


def test_the_scores_choose_different_tokens():
    model, seen = public().model(), []
    for score in SCORES:
        config = fx.FlashUConfig(token_prune_ratio=0.5, token_prune_score=score)
        with fx.accelerate(model, config) as handle:
            seen.append(logits_of(handle, [ask(1)], 1)[1][0])
            assert handle.summary().tokens["visual kept"] == 36 - 18
    assert all(relative(a, b) > LIMIT for i, a in enumerate(seen) for b in seen[:i])


def test_a_ratio_that_drops_no_token_changes_no_bit():
    model, asked = public().model(), [ask(1), ask(2, 3, 9)]
    with fx.accelerate(model) as handle:
        expected = logits_of(handle, asked)
    with fx.accelerate(model, fx.FlashUConfig(token_prune_ratio=0.02)) as handle:  # 0.02 * 36 < 1
        got = logits_of(handle, asked)
        assert handle.summary().tokens["visual kept"] == 72
    assert got[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(got[1], expected[1], strict=True))


def test_pruning_works_without_this_librarys_kernels():
    model, asked = public().model(), ask(3)
    _, expected, _ = oracle(model, **asked, max_new_tokens=NEW, ratio=0.5)
    with fx.accelerate(model, fx.FlashUConfig(token_prune_ratio=0.5, routing_kernels=False)) as handle:
        assert relative(logits_of(handle, [asked])[1][0], expected) < LIMIT
        assert handle.summary().kernels["value_norms"] == "torch"


def test_pruned_caches_are_smaller():
    model, sizes = public().model(), []
    for ratio in (0.0, 0.5):
        with fx.accelerate(model, fx.FlashUConfig(token_prune_ratio=ratio)) as handle:
            answer_tokens(model, **ask(1), max_new_tokens=2)
            sizes.append(handle.summary().memory["answers' keys and values"])
    full, pruned = sizes
    per_token = 2 * 2 * 16 * 4  # key and value, 2 heads of 16 fp32 numbers
    kept = 31 * 8  # the pruned prompt's int64 positions
    assert full - (pruned - kept) == 6 * 18 * per_token, "layers 2 to 7 hold 18 tokens fewer"


def test_mmu_generate_finds_the_image_in_the_mask():
    model, asked = public().model(), ask(1)
    embeds, allowed = fx.showo2.understanding.prompt_embeds(model, *asked.values())
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[None, None]
    tokens, _, _ = oracle(model, **asked, max_new_tokens=NEW, ratio=0.5)
    with fx.accelerate(model, fx.FlashUConfig(token_prune_ratio=0.5)) as handle:
        got = model.mmu_generate(embeds, mask, max_new_tokens=NEW, top_k=1)
        assert [int(t) for t in got] == tokens and handle.summary().tokens["visual kept"] == 18
        model.mmu_generate(embeds, torch.zeros_like(mask), max_new_tokens=1, top_k=1)
        assert handle.summary().tokens["visual"] == 0  # full attention: no image in the mask


@pytest.mark.parametrize("score", SCORES)
def test_hidden_tokens_stay_hidden(score):
    """The same embeddings under another mask are another prompt: no prefix is reused beyond the difference."""
    model, asked = public().model(), ask(1, before=30)
    embeds, allowed = fx.showo2.understanding.prompt_embeds(model, *asked.values())
    config = fx.FlashUConfig(token_prune_ratio=0.5, token_prune_score=score)
    with fx.accelerate(model, config) as handle, torch.no_grad():
        engine = handle.runner.understanding
        for hidden in (None, slice(20, 21), None, slice(1, 29)):
            mask = allowed.clone()
            if hidden is not None:
                mask[:, hidden] = torch.eye(len(mask), dtype=torch.bool)[:, hidden]
            (got,), (logits,) = decoded(engine, [engine.prompt(Question(embeds, mask, visual_spans(mask, True)))], NEW)
            tokens, expected, _ = oracle(model, **asked, max_new_tokens=NEW, ratio=0.5, score=score, hidden=hidden)
            assert got == tokens and relative(logits, expected) < LIMIT


def test_visual_spans_are_read_off_a_mask():
    def allowed(*spans, n=20):
        return omni_allowed(torch.tensor([spans]), n)[0]

    assert visual_spans(allowed((5, 9)), True) == ((5, 8),)  # the last one is eoi
    assert visual_spans(allowed((5, 9)), False) == ((5, 9),)
    assert visual_spans(allowed((3, 4), (9, 6)), True) == ((3, 3), (9, 5))
    assert visual_spans(allowed((5, 1)), True) == visual_spans(allowed((0, 20)), True) == ()
    assert visual_spans(allowed((11, 9)), True) == ((11, 8),) and visual_spans(allowed((11, 9)), False) == ()
    assert visual_spans(torch.ones(4, 4).tril().bool(), True) == ()


def test_a_broken_score_drops_first_and_is_no_error():
    model = public().model()
    with fx.accelerate(model, fx.FlashUConfig(token_prune_ratio=0.5)) as handle:
        pruner: TokenPruner = handle.runner.understanding.pruner
        scores = torch.tensor([float("nan"), 3.0, float("inf"), float("-inf"), 1.0, float("nan")])
        assert pruner.keep(scores, 6, 2).tolist() == [1, 2, 3, 4]
        assert pruner.keep(torch.full((4,), float("nan")), 4, 2).tolist() == [0, 1]
        asked = ask(1)
        expected = answer_tokens(model, **asked, max_new_tokens=3)
        answer_tokens(model, **{**asked, "image_latents": asked["image_latents"] * float("nan")}, max_new_tokens=3)
        assert torch.equal(answer_tokens(model, **asked, max_new_tokens=3), expected)


def test_a_layer_that_is_not_there_is_refused():
    model = public().model()
    with pytest.raises(
        ValueError, match=r"config.token_prune_layer: expected a layer in \[0, 8\) of this model, got 8"
    ):
        fx.accelerate(model, fx.FlashUConfig(token_prune_ratio=0.5, token_prune_layer=8))
    with fx.accelerate(model, fx.FlashUConfig(token_prune_layer=8)):
        pass


# ---- skipped layers


@pytest.mark.parametrize("skip", [0.13, 0.2, 0.4, 0.5, 0.9])
def test_answers_skip_the_layers_that_change_the_question_least(skip):
    model, asked = public().model(), [ask(1), ask(2, 5, 4), ask(3, 6, 5), ask(4, 7, 6)]
    results = [oracle(model, **a, max_new_tokens=NEW, ratio=0.4, skip=skip) for a in asked]
    if skip in (0.4, 0.5):
        assert len({tuple(skipped) for _, _, skipped in results}) > 1, "rows of one batch must skip different layers"
    with fx.accelerate(model, fx.FlashUConfig(token_prune_ratio=0.4, answer_layer_skip_ratio=skip)) as handle:
        tokens, logits = logits_of(handle, asked)
        assert handle.summary().answer_layers_skipped == tuple(tuple(skipped) for _, _, skipped in results)
        assert f"in answers  {results[0][2]}; " in str(handle.summary())
        alone = [logits_of(handle, [a])[0][0] for a in asked]
    for row, (expected, numbers, _) in enumerate(results):
        assert tokens[row] == expected == alone[row] and relative(logits[row], numbers) < LIMIT
    whole = oracle(model, **asked[0], max_new_tokens=NEW, ratio=0.4)[1]
    assert relative(results[0][1][1], whole[1]) > LIMIT and torch.equal(results[0][1][0], whole[0])


# ---- batches


CONFIGS = {
    "exact": {},
    **{score: {"token_prune_ratio": 0.5, "token_prune_score": score} for score in SCORES},
    "skip": {"answer_layer_skip_ratio": 0.3},
    "all": {"token_prune_ratio": 0.3, "token_prune_layer": 0, "answer_layer_skip_ratio": 0.2},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_equals_its_questions_alone(name):
    model = public().model()
    asked = [ask(1), ask(2, 3, 9), ask(3, 11, 1), ask(4, 1, 30)]
    dense = [answer_tokens(model, **a, max_new_tokens=8) for a in asked]
    config = fx.FlashUConfig(**CONFIGS[name])
    alone = []
    for a in asked:
        with fx.accelerate(model, config):
            alone.append(answer_tokens(model, **a, max_new_tokens=8))
    with fx.accelerate(model, config) as handle:
        for order in ([0, 1, 2, 3], [2, 0, 3]):
            got = answer_tokens_batch(model, *batch([asked[i] for i in order]), max_new_tokens=8)
            assert all(torch.equal(row, alone[i]) for row, i in zip(got, order, strict=True))
        # A row ends with its own eos; the others continue.
        for row, position in ((0, 0), (1, 3), (3, 7)):
            eos = int(alone[row][position])
            got = answer_tokens_batch(model, *batch(asked), max_new_tokens=8, eos_token=eos)
            for answer, whole in zip(got, alone, strict=True):
                ends = (whole == eos).nonzero().flatten().tolist()
                assert torch.equal(answer, whole[: ends[0] + 1] if ends else whole)
        assert answer_tokens_batch(model, *batch(asked), max_new_tokens=0)[2].shape == (0,)
        assert answer_tokens_batch(model, torch.empty(0, 16, 12, 12), [], []) == []
        assert not handle.summary().fallbacks
    if name == "exact":
        assert all(torch.equal(a, b) for a, b in zip(alone, dense, strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(answer_tokens_batch(model, *batch(asked), max_new_tokens=8), dense, strict=True)
    )


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=5),
    ratio=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    layer=st.integers(0, 7),
    score=st.sampled_from(SCORES),
)
def test_batches_of_any_lengths_equal_the_oracle(lengths, ratio, layer, score):
    model = public().model()
    asked = [ask(seed, before, after) for before, after, seed in lengths]
    config = fx.FlashUConfig(token_prune_ratio=ratio, token_prune_layer=layer, token_prune_score=score)
    with fx.accelerate(model, config) as handle:
        for _ in range(2):  # the second time with the cached prefix
            tokens, logits = logits_of(handle, asked, 2)
            for a, row, numbers in zip(asked, tokens, logits, strict=True):
                expected, wanted, _ = oracle(model, **a, max_new_tokens=2, ratio=ratio, layer=layer, score=score)
                assert row == expected and relative(numbers, wanted) < LIMIT


def test_images_of_different_sizes_have_budgets_of_their_own():
    config = public().model().config
    vision = {**config.vision, "image_size": 8, "patch_size": 1}  # a table of 8 x 8, resampled to each image's grid
    torch.manual_seed(0)
    model = fx.showo2.Showo2(
        fx.showo2.Showo2Config(
            llm=config.llm, vision=vision, head=config.head, image_latent_height=6, image_latent_width=6
        )
    ).eval()
    asked = [ask(1), ask(2, 3, 9), ask(3, 5, 2)]
    for a, (height, width) in zip(asked, ((6, 6), (4, 8), (2, 2)), strict=True):
        a["image_latents"] = torch.randn(1, 16, 2 * height, 2 * width, generator=torch.Generator().manual_seed(height))
    with fx.accelerate(model, fx.FlashUConfig(token_prune_ratio=0.5, token_prune_layer=1)) as handle:
        tokens, logits = logits_of(handle, asked)
        counts = handle.summary().tokens
        again = answer_tokens_batch(
            model, [a["image_latents"] for a in asked], *batch([{**a, "image_latents": torch.zeros(1)} for a in asked])[1:],
            max_new_tokens=NEW,
        )  # fmt: skip
    assert (counts["visual"], counts["visual kept"]) == (36 + 32 + 4, 18 + 16 + 2)
    for row, a in enumerate(asked):
        expected, numbers, _ = oracle(model, **a, max_new_tokens=NEW, ratio=0.5, layer=1)
        assert tokens[row] == expected == again[row].tolist() and relative(logits[row], numbers) < LIMIT


def test_without_a_time_token_the_span_ends_with_the_image():
    config = public().model().config
    torch.manual_seed(0)
    settings_ = {"image_latent_height": 6, "image_latent_width": 6, "add_time_embeds": False}
    model = fx.showo2.Showo2(
        fx.showo2.Showo2Config(llm=config.llm, vision=config.vision, head=config.head, **settings_)
    ).eval()
    asked = ask(1)
    expected, numbers, _ = oracle(model, **asked, max_new_tokens=NEW, ratio=0.5)
    with fx.accelerate(model, fx.FlashUConfig(token_prune_ratio=0.5)) as handle:
        (tokens,), (logits,) = logits_of(handle, [asked])
        assert handle.summary().tokens["visual kept"] == 18
    assert tokens == expected and relative(logits, numbers) < LIMIT


# ---- prefix reuse


@pytest.mark.parametrize("score", ["none", *SCORES])
def test_questions_share_a_pruned_image(score):
    model = public().model()
    first, other = ask(1), ask(1, after=9)
    other["tokens_after_boi"] = torch.cat([other["tokens_after_boi"][:, :2], other["tokens_after_boi"][:, 4:]], 1)
    ratio = 0.0 if score == "none" else 0.5
    config = fx.FlashUConfig(token_prune_ratio=ratio, **({} if score == "none" else {"token_prune_score": score}))
    expected, numbers, _ = oracle(model, **other, max_new_tokens=NEW, ratio=ratio, score=score)
    until_eoi = 4 + 1 + 1 + 36 + 1
    # Attention scores depend on the question, so each question drops its own tokens; only the text before the image is shared.
    until = 4 + 1 + 1 if score == "attention" else until_eoi
    with fx.accelerate(model, config) as handle:
        answer_tokens(model, **first, max_new_tokens=3)
        (tokens,), (logits,) = logits_of(handle, [other])
        counts = handle.summary().tokens
        assert counts["reused"] == until and counts["visual kept"] == 36 - int(36 * ratio)
        assert tokens == expected and relative(logits, numbers) < LIMIT
        # and from a question with a reused prefix, in an answer longer than the cache
        tokens, _ = logits_of(handle, [other], 12)
        assert tokens[0][:NEW] == expected
    with fx.accelerate(model, config) as handle:  # within one batch
        tokens, logits = logits_of(handle, [first, other])
        assert handle.summary().tokens["reused"] == (0 if score == "attention" else until)
        assert tokens[1] == expected and relative(logits[1], numbers) < LIMIT


def test_an_image_is_shared_whole_or_not_at_all():
    """The image's tokens look at the one behind them too, so another one there makes them others."""
    model, first, other = public().model(), ask(1), ask(1)
    other["tokens_after_boi"][0, 1] -= 1
    expected, numbers, _ = oracle(model, **other, max_new_tokens=NEW)
    with fx.accelerate(model) as handle:
        answer_tokens(model, **first, max_new_tokens=3)
        (tokens,), (logits,) = logits_of(handle, [other])
        assert handle.summary().tokens["reused"] == 4 + 1 + 1  # the text before the image, boi and the time token
    assert tokens == expected and relative(logits, numbers) < LIMIT


def test_one_image_serves_a_batch_and_is_encoded_once(monkeypatch):
    model, encoded = public().model(), []
    real = Showo2Adapter.embed_image
    monkeypatch.setattr(Showo2Adapter, "embed_image", lambda *a: encoded.append(a[1].shape[0]) or real(*a))
    asked = [ask(1), ask(1, after=9), ask(2), ask(1, after=3)]
    expected = [answer_tokens(model, **a, max_new_tokens=3) for a in asked]
    encoded.clear()
    with fx.accelerate(model):
        got = answer_tokens_batch(model, *batch(asked), max_new_tokens=3)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)) and encoded == [2]
        answer_tokens(model, **asked[2], max_new_tokens=1)
        assert encoded == [2]
        _, befores, afters = batch(asked[:2])
        got = answer_tokens_batch(model, asked[0]["image_latents"], befores, afters, max_new_tokens=3)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=False)) and encoded == [2, 1]


# ---- state


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_answers_that_outgrow_their_memory_are_the_same(monkeypatch, ratio):
    model = public().model()
    asked = batch([ask(1), ask(2, after=9), ask(3, after=4)])
    with fx.accelerate(model, fx.FlashUConfig(token_prune_ratio=ratio)) as handle:
        expected = answer_tokens_batch(model, *asked, max_new_tokens=12)
        handle.runner.reset()
        monkeypatch.setattr(answering, "ANSWER_STEP", 2)
        for _ in range(2):  # the second time the prompts are reused
            tokens = answer_tokens_batch(model, *asked, max_new_tokens=12)
            assert all(torch.equal(a, b) for a, b in zip(tokens, expected, strict=True))


@pytest.mark.parametrize("limit", [10**12, 2**63, 2**70])
def test_any_number_of_new_tokens_may_be_allowed(limit):
    model, asked = public().model(), batch([ask(1), ask(2, after=9)])
    first = int(answer_tokens_batch(model, *asked, max_new_tokens=1)[0])
    expected = answer_tokens_batch(model, *asked, max_new_tokens=3)

    def stop(question: int, token: int) -> None:
        tokens[question].append(token)
        if len(tokens[1]) == 3:
            raise KeyboardInterrupt

    with fx.accelerate(model):
        tokens: list[list[int]] = [[], []]
        with pytest.raises(KeyboardInterrupt):
            answer_tokens_batch(model, *asked, max_new_tokens=limit, on_token=stop)
        assert tokens == [each.tolist() for each in expected]
        assert answer_tokens(model, **ask(1), max_new_tokens=limit, eos_token=first).tolist() == [first]


def test_no_memory_is_reserved_for_tokens_that_do_not_come():
    model, asked = public().model(), ask(1)
    with fx.accelerate(model) as handle:
        first = int(answer_tokens(model, **asked, max_new_tokens=1))
        handle.runner.reset()
        assert answer_tokens(model, **asked, max_new_tokens=10**9, eos_token=first).tolist() == [first]
        reserved = handle.summary().memory["answers' keys and values"]
        answer_tokens(model, **asked, max_new_tokens=1000, eos_token=first)
        assert reserved == handle.summary().memory["answers' keys and values"]


def test_an_error_does_not_affect_the_next_answer(monkeypatch):
    import flashu_ext.runtime.decoding as decoding

    model, asked = public().model(), [ask(1), ask(1, after=9), ask(2)]
    config = fx.FlashUConfig(token_prune_ratio=0.5)
    expected = [oracle(model, **a, max_new_tokens=NEW, ratio=0.5)[0] for a in asked]
    import flashu_ext.runtime.understanding as engine

    real = engine.decoder_layer
    with fx.accelerate(model, config) as handle:
        answer_tokens(model, **asked[0], max_new_tokens=2)
        for fail_at in (0, 1, 5, 7, 12, 20):
            calls = []

            def failing(*arguments, calls=calls, fail_at=fail_at):
                calls.append(0)
                if len(calls) > fail_at:
                    raise MemoryError("no room")
                return real(*arguments)

            for place in (engine, decoding):
                monkeypatch.setattr(place, "decoder_layer", failing)
            with pytest.raises(MemoryError, match="no room"):
                answer_tokens_batch(model, *batch(asked[1:]), max_new_tokens=9)
            for place in (engine, decoding):
                monkeypatch.setattr(place, "decoder_layer", real)
            assert logits_of(handle, asked)[0] == expected
            assert answer_tokens(model, **asked[1], max_new_tokens=NEW).tolist() == expected[1]


def test_an_image_between_answers_changes_neither():
    fixture, model = public(), public().model()
    config = fixture.flashu_config(token_prune_ratio=0.5, answer_layer_skip_ratio=0.25)
    asked = [ask(1), ask(2)]
    with fx.accelerate(model, config, fixture.flashu_plan()):
        alone = answer_tokens_batch(model, *batch(asked), max_new_tokens=4)
        latents = fx.showo2.sample(model, **fixture.sample_inputs)
        seen = []

        def between(step, _):
            seen.append(answer_tokens_batch(model, *batch(asked[:: 1 if step % 2 else -1]), max_new_tokens=4))

        assert torch.equal(fx.showo2.sample(model, **fixture.sample_inputs, callback=between), latents)
        for step, got in enumerate(seen, 1):
            wanted = alone if step % 2 else alone[::-1]
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert relative(latents, fixture.flashu["latents"]) < LIMIT


def test_a_model_moved_to_another_dtype_reuses_nothing():
    model, asked = public().model(), ask(1)
    with fx.accelerate(model, fx.FlashUConfig(token_prune_ratio=0.5)) as handle:
        answer_tokens(model, **asked, max_new_tokens=2)
        single = handle.summary().memory["answers' keys and values"]
    model.to(torch.bfloat16)
    with fx.accelerate(model, fx.FlashUConfig(token_prune_ratio=0.5)) as handle:
        assert answer_tokens(model, **asked, max_new_tokens=2).shape == (2,)
        half = handle.summary().memory["answers' keys and values"]
        assert half < 0.6 * single, f"{half} bytes in bf16, {single} in fp32"
        model.to(torch.float32)
        answer_tokens(model, **asked, max_new_tokens=2)
        assert handle.summary().tokens["reused"] == 0


# ---- sampling tokens


def test_a_sampler_keeps_what_top_k_and_top_p_allow():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0, -1.0], [0.0, 5.0, 0.0, 0.0, 0.0]])
    finite = lambda **s: torch.isfinite(TokenSampler(1.0, **s).filtered(logits)).tolist()  # noqa: E731
    assert finite(top_k=2)[0] == [True, True, True, False, False]  # values equal to the k-th stay, as upstream
    assert finite(top_k=99) == finite(top_p=1.0) == [[True] * 5] * 2
    # probabilities .53 .195 .195 .07 .03: the token that crosses p stays
    assert finite(top_p=0.5) == [[True, False, False, False, False], [False, True, False, False, False]]
    assert finite(top_p=0.6)[0] == [True, True, False, False, False]
    assert finite(top_p=1e-6) == [[True, False, False, False, False], [False, True, False, False, False]]
    assert finite(top_k=1, top_p=0.9)[0] == [True, False, False, False, False]
    torch.testing.assert_close(TokenSampler(0.5).filtered(logits), logits * 2)
    assert TokenSampler()(logits, [0, 1]).tolist() == [[0], [1]]


def test_tokens_are_sampled_with_the_models_probabilities():
    logits = torch.tensor([[1.0, 0.5, 0.0, -3.0]])
    expected = torch.softmax(torch.tensor([1.0, 0.5, 0.0]) / 0.7, 0)
    sampler = TokenSampler(0.7, top_k=3, generators=[torch.Generator().manual_seed(0)])
    sampled = torch.cat([sampler(logits, [0])[0] for _ in range(4000)])
    shares = torch.bincount(sampled, minlength=4) / 4000
    assert shares[3] == 0 and float((shares[:3] - expected).abs().max()) < 4 * (0.25 / 4000) ** 0.5


@pytest.mark.parametrize(
    "way", [{"temperature": 0.8, "top_k": 5}, {"temperature": 1.5}, {"temperature": 1.0, "top_p": 0.7}]
)
def test_sampled_answers_equal_the_dense_models(way):
    model, asked = public().model(), [ask(1), ask(2, 3, 9), ask(3, 7, 2)]
    seeds = lambda: [torch.Generator().manual_seed(s) for s in (5, 6, 7)]  # noqa: E731
    expected = answer_tokens_batch(model, *batch(asked), max_new_tokens=8, **way, generators=seeds())
    greedy = answer_tokens_batch(model, *batch(asked), max_new_tokens=8)
    assert any(not torch.equal(a, b) for a, b in zip(expected, greedy, strict=True))
    eos = int(expected[0][2])
    with fx.accelerate(model):
        got = answer_tokens_batch(model, *batch(asked), max_new_tokens=8, **way, generators=seeds())
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        for a, generator, wanted in zip(asked, seeds(), expected, strict=True):
            one = answer_tokens(model, **a, max_new_tokens=8, eos_token=eos, **way, generator=generator)
            ends = (wanted == eos).nonzero().flatten().tolist()
            assert torch.equal(one, wanted[: ends[0] + 1] if ends else wanted)
        torch.manual_seed(3)
        first = answer_tokens(model, **asked[0], max_new_tokens=8, **way)
    torch.manual_seed(3)
    assert torch.equal(answer_tokens(model, **asked[0], max_new_tokens=8, **way), first)


# ---- refusals


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"befores": torch.zeros(2, 3)}, TypeError, "befores: expected a list, got Tensor"),
        ({"afters": []}, ValueError, "afters: expected one for each of 2 questions, got 0"),
        ({"image_latents": torch.zeros(3, 16, 12, 12)}, ValueError, "image_latents: expected one image, or .* 2 .*, got 3"),
        ({"image_latents": "image"}, TypeError, "image_latents: expected a tensor or a list, got str"),
        ({"image_latents": torch.zeros(2, 3, 12, 12)}, ValueError, r"image_latents\[0\]: expected \[batch, 16"),
        ({"befores": [torch.zeros(1, 2).long(), torch.zeros(1, 2)]}, TypeError, r"tokens_before_image\[1\]: expected int64"),
        ({"afters": [torch.ones(1, 5).long(), torch.ones(1, 1).long()]}, ValueError, r"tokens_after_boi\[1\]: expected boi"),
        ({"afters": [torch.full((1, 5), 999), torch.ones(1, 1).long()]}, IndexError, r"tokens_after_boi\[0\].* got 999"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: expected an integer >= 0, got -1"),
        ({"temperature": -0.5}, ValueError, "temperature: expected a finite number >= 0, got -0.5"),
        ({"top_k": 0}, ValueError, "top_k: expected None or an integer >= 1, got 0"),
        ({"top_p": 1.5}, ValueError, r"top_p: expected None or a number in \(0, 1\], got 1.5"),
        ({"generators": [torch.Generator()]}, ValueError, "generators: expected one for each of 2 questions, got 1"),
        ({"generators": [torch.Generator(), 3]}, TypeError, r"generators\[1\]: expected a torch.Generator, got int"),
        ({"eos_token": 1.5}, TypeError, "eos_token: expected None or a token id, got 1.5"),
    ],
)  # fmt: skip
def test_a_wrong_batch_is_refused_and_disturbs_nothing(accelerated, change, error, message):
    model, asked = public().model(), [ask(1), ask(2, 3, 9)]
    images, befores, afters = batch(asked)
    handle = fx.accelerate(model, fx.FlashUConfig(token_prune_ratio=0.5)) if accelerated else None
    good = {"image_latents": images, "befores": befores, "afters": afters, "max_new_tokens": 2}
    expected = answer_tokens_batch(model, **good)
    with pytest.raises(error, match=message):
        answer_tokens_batch(model, **{**good, **change})
    assert all(torch.equal(a, b) for a, b in zip(answer_tokens_batch(model, **good), expected, strict=True))
    if handle is not None:
        handle.remove()
