"""Questions about several images: each has a span of its own, in the order of the list, before the question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.answers import decoded, oracle
from support.conformance import relative
from support.models import GRID, VOCABULARY, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flashu_ext as fx
from flashu_ext.models.masks import omni_allowed
from flashu_ext.models.showo2 import answer_tokens, answer_tokens_batch
from flashu_ext.models.showo2.adapter import Showo2Adapter, adapter
from flashu_ext.models.showo2.understanding import prompt_embeds
from flashu_ext.upstream.showo2 import visual_spans

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 1e-4
NEW = 5


def picture(number: int, height: int = GRID, width: int = GRID) -> Tensor:
    return torch.randn(1, 16, 2 * height, 2 * width, generator=torch.Generator().manual_seed(number))


def ask(numbers: list[int], seed: int = 1, before: int = 3, after: int = 4) -> dict[str, Any]:
    """A question about the pictures with these numbers, as arguments of `answer_tokens`."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, VOCABULARY - 2, (1, after), generator=generator)
    return {
        "image_latents": [picture(number) for number in numbers],
        "tokens_before_image": torch.arange(before)[None],
        "tokens_after_boi": torch.cat([torch.tensor([[VOCABULARY - 2, VOCABULARY - 1]]), words], dim=1),
    }


def batch(asked: list[dict[str, Any]]) -> tuple[list[Any], list[Tensor], list[Tensor]]:
    """Questions as the first arguments of `answer_tokens_batch`."""
    return tuple([each[name] for each in asked] for name in asked[0])  # type: ignore[return-value]


def logits_of(handle: Any, asked: list[dict[str, Any]]) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy answers through the runtime: (tokens per question, logits per question [NEW, vocab])."""
    engine = handle.runner.understanding
    with torch.no_grad():
        encoded = [engine.image_embeds(a["image_latents"]) for a in asked]
        prompts = [
            engine.question(images, a["tokens_before_image"], a["tokens_after_boi"])
            for images, a in zip(encoded, asked, strict=True)
        ]
        return decoded(engine, prompts, NEW)


@pytest.mark.parametrize("time_token", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_prompt_is_what_is_made_by_hand(count: int, time_token: bool) -> None:
    model = small_model(time_token=time_token)
    asked = ask(list(range(count)))
    asked["image_latents"][-1] = picture(7, 2, 5)  # of another size
    with torch.no_grad():
        embeds, allowed = prompt_embeds(model, **asked)
        own, embed = adapter(model), model.showo.model.embed_tokens
        token = model.time_embed(torch.ones(1), embeds.dtype)
        token = model.time_embed_proj(token)
        rows, inside = [embed(row) for row in asked["tokens_before_image"][0]], []
        boi, eoi, *words = (embed(row) for row in asked["tokens_after_boi"][0])
        for latents in asked["image_latents"]:
            rows += [boi, *(token if time_token else []), *own.embed_image(latents)[0], eoi]
            patches = latents.shape[2] * latents.shape[3] // 4
            # With a time token upstream's span begins and ends one token late.
            first = len(rows) - 1 - patches
            inside.append(range(first, len(rows) if time_token else len(rows) - 1))
        rows += words
    torch.testing.assert_close(embeds[0], torch.stack(rows), rtol=1e-5, atol=1e-6)
    for row in range(len(rows)):
        for column in range(len(rows)):
            wanted = column <= row or any(row in span and column in span for span in inside)
            assert bool(allowed[row, column]) == wanted, (row, column)
    assert [span for span, _ in visual_spans(allowed, time_token)] == [span[0] for span in inside]
    if count == 1:
        one = prompt_embeds(model, asked["image_latents"][0], asked["tokens_before_image"], asked["tokens_after_boi"])
        assert torch.equal(one[0], embeds) and torch.equal(one[1], allowed)


@settings(max_examples=12, deadline=None)
@given(
    questions=st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(0, 2), st.integers(0, 6)),
        min_size=1,
        max_size=4,
    ),
    time_token=st.booleans(),
)
def test_mixed_batches_equal_the_dense_model(questions: list[Any], time_token: bool) -> None:
    model = small_model(time_token=time_token)
    asked = [ask(numbers, seed, after=after) for numbers, seed, after in questions]
    expected = [answer_tokens(model, **a, max_new_tokens=NEW) for a in asked]
    dense = answer_tokens_batch(model, *batch(asked), max_new_tokens=NEW)
    assert all(torch.equal(a, b) for a, b in zip(dense, expected, strict=True))
    with fx.accelerate(model) as handle:
        for _ in range(2):  # the second time with the cached prefixes
            got = answer_tokens_batch(model, *batch(asked), max_new_tokens=NEW)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        _, logits = logits_of(handle, asked)
        assert not handle.summary().fallbacks
    for a, numbers in zip(asked, logits, strict=True):
        assert relative(numbers, oracle(model, **a, max_new_tokens=NEW)[1]) < LIMIT


def test_the_images_and_their_order_count() -> None:
    model = small_model()
    with fx.accelerate(model) as handle:
        logits = logits_of(handle, [ask(numbers) for numbers in ([0], [0, 1], [1, 0], [0, 1, 1], [0, 0])])[1]
    assert all(relative(a, b) > 10 * LIMIT for i, a in enumerate(logits) for b in logits[:i])


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("score", ["value_norm", "attention", "random"])
def test_tokens_are_dropped_in_each_image(score: str, layer: int) -> None:
    model = small_model()
    asked = [ask([0, 1], 1), ask([2], 2), ask([0, 3, 1], 3)]
    config = fx.FlashUConfig(token_prune_ratio=0.4, token_prune_layer=layer, token_prune_score=score)
    with fx.accelerate(model, config) as handle:
        for _ in range(2):
            tokens, logits = logits_of(handle, asked)
            counts = handle.summary().tokens
            assert (counts["visual"], counts["visual kept"]) == (6 * 16, 6 * (16 - 6))
            for a, row, numbers in zip(asked, tokens, logits, strict=True):
                expected, wanted, _ = oracle(model, **a, max_new_tokens=NEW, ratio=0.4, layer=layer, score=score)
                assert row == expected and relative(numbers, wanted) < LIMIT


def test_the_prefix_is_reused_up_to_the_first_other_image() -> None:
    model = small_model()
    text, span = 3, 1 + 1 + GRID * GRID + 1  # the tokens before the images; boi, time token, image, eoi
    cases = [
        ([0, 1], text + 2 * span),  # the same images: only the question is new
        ([0, 1, 2], text + 2 * span),  # a third one, where the question was
        ([0, 2], text + span),
        ([1, 0], text),
        ([0], text + span),
    ]
    for numbers, least in cases:
        with fx.accelerate(model) as handle:
            answer_tokens(model, **ask([0, 1], 1), max_new_tokens=NEW)
            engine = handle.runner.understanding
            before = engine.reused
            got = answer_tokens(model, **ask(numbers, 2), max_new_tokens=NEW)
            assert least <= engine.reused - before <= least + 2, numbers
        assert torch.equal(got, answer_tokens(model, **ask(numbers, 2), max_new_tokens=NEW))


def test_an_image_is_encoded_once_for_all_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    seen: list[int] = []
    encode = Showo2Adapter.embed_image
    monkeypatch.setattr(Showo2Adapter, "embed_image", lambda *a: (seen.append(len(a[1])), encode(*a))[1])
    with fx.accelerate(model) as handle:
        engine = handle.runner.understanding
        with torch.no_grad():
            engine.image_embeds([picture(n) for n in (0, 1, 0, 2, 1)])
            engine.image_embeds([picture(n) for n in (2, 1, 3)])
    assert seen == [3, 1]


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "image_latents: expected at least one image, got an empty list"),
        ([picture(0), "b"], TypeError, r"image_latents\[1\]: expected a tensor, got str"),
        ([picture(0), torch.cat([picture(1)] * 2)], ValueError, r"image_latents\[1\]: expected one image, got 2"),
        (torch.cat([picture(1)] * 2), ValueError, "image_latents: expected one image, got 2; several images of one question are"),
        ([picture(0), picture(1)[:, :8]], ValueError, r"image_latents\[1\]: expected \[batch, 16, H, W\]"),
        ([picture(0).double(), picture(1).long()], TypeError, r"image_latents\[1\]: expected a floating-point tensor"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("accelerated", [False, True])
def test_wrong_images_are_named(images: Any, error: type, message: str, accelerated: bool) -> None:
    model, good = small_model(), ask([0, 1])
    if accelerated:
        fx.accelerate(model)
    expected = answer_tokens(model, **good, max_new_tokens=2)
    with pytest.raises(error, match=message):
        answer_tokens(model, **{**good, "image_latents": images}, max_new_tokens=2)
    assert torch.equal(answer_tokens(model, **good, max_new_tokens=2), expected)


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_question_longer_than_the_models_positions_is_named(accelerated: bool) -> None:
    model, asked = small_model(), ask([0, 1])
    length = prompt_embeds(model, **asked)[0].shape[1]
    if accelerated:
        fx.accelerate(model)
    model.showo.config.max_position_embeddings = length
    expected = answer_tokens(model, **asked, max_new_tokens=2)
    model.showo.config.max_position_embeddings = length - 1
    with pytest.raises(ValueError, match=f"at most {length - 1} tokens.*got {length} of 2 images"):
        answer_tokens(model, **asked, max_new_tokens=2)
    model.showo.config.max_position_embeddings = length
    assert torch.equal(answer_tokens(model, **asked, max_new_tokens=2), expected)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=4), st.integers(1, 12))
def test_the_mask_is_that_of_its_spans(spans: list[tuple[int, int]], length: int) -> None:
    """Also of spans that overlap, are empty or end outside."""
    allowed = omni_allowed(torch.tensor([spans]), length)[0]
    for i in range(length):
        for j in range(length):
            together = any(start <= i < start + count and start <= j < start + count for start, count in spans)
            assert bool(allowed[i, j]) == (j <= i or together)


def test_the_mask_of_many_images_needs_no_cube() -> None:
    spans = torch.arange(0, 3000, 10)[:, None] + torch.tensor([0, 9])
    spans[:, 1] = 9
    with Largest() as largest:
        omni_allowed(spans[None], 3000)
    assert largest.elements <= 3000 * 3000


class Largest(TorchDispatchMode):
    """The most elements of a tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_a_wrong_image_of_a_batch_is_named() -> None:
    model, asked = small_model(), [ask([0, 1]), ask([2])]
    for images, message in (
        ([[picture(0)], []], r"image_latents\[1\]: expected at least one image, got an empty list"),
        ([[picture(0)], [picture(1), picture(2)[0]]], r"image_latents\[1\]\[1\]: expected 4 dimensions"),
        (
            [picture(0), picture(1), picture(2)],
            "expected one image, or one for each of 2 questions, got 3; several images",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            answer_tokens_batch(model, images, *batch(asked)[1:])
    shared = answer_tokens_batch(model, [[picture(0), picture(1)]], *batch(asked)[1:], max_new_tokens=3)
    assert torch.equal(shared[0], answer_tokens(model, **asked[0], max_new_tokens=3))


def test_a_pipeline_is_asked_about_lists_of_images(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from flashu_ext.cli.main import cli

    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    first, second = pipe.generate_batch(["a red circle in the center", "a blue square"], steps=12)
    question = "describe the image"
    expected = [pipe.answer(images, question, 8) for images in (first, [first, second], (second, first))]
    assert pipe.answer([first], question, 8) == expected[0]
    assert expected[1] != expected[0] or expected[2] != expected[0], "a second image changes the answer"
    questions = [question] * 3
    with pipe.accelerate():
        assert pipe.answer_batch([first, [first, second], [second, first]], questions, 8) == expected
        assert pipe.answer_batch([[first, second]], questions, 8) == [expected[1]] * 3
        pieces: list[str] = []
        assert pipe.answer([first, second], question, 8, on_text=pieces.append) == "".join(pieces) == expected[1]
        with pytest.raises(ValueError, match="image: expected at least one image, got an empty list"):
            pipe.answer([], question)
        with pytest.raises(TypeError, match=r"image\[1\]: expected a PIL image, got str"):
            pipe.answer([first, "b.png"], question)  # type: ignore[list-item]
    for name, image in (("a", first), ("b", second)):
        image.save(tmp_path / f"{name}.png")
    files = [str(tmp_path / "a.png"), "--image", str(tmp_path / "b.png")]
    result = CliRunner().invoke(cli, ["answer", *files, question, "--max-new-tokens", "8"])
    assert result.exit_code == 0 and result.output.strip() == expected[1]
    assert CliRunner().invoke(cli, ["answer", files[0], "--image", str(tmp_path / "none.png"), question]).exit_code == 2
