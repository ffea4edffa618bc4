"""BAGEL: contexts, interleaved sequences against one pass over the whole sequence, guidance, TaylorSeer, arguments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from support.conformance import FIXTURES, relative
from torch import Tensor

import flashu_ext as fx
from flashu_ext.models.bagel.conformance import model_of
from flashu_ext.models.bagel.layers import Context
from flashu_ext.models.bagel.sampling import guided, taylor_prediction, time_grid
from flashu_ext.models.comparison import Fixture

FIXTURE = Fixture.read(FIXTURES / "bagel")
EDITED, ASKED = FIXTURE.tensors("edit"), FIXTURE.tensors("mmu")
IDS = fx.bagel.TokenIds(**FIXTURE.spec["token_ids"])
LIMIT = 1e-5
MODEL = model_of(FIXTURE)


def text(*ids: int) -> fx.bagel.Text:
    return fx.bagel.Text(torch.tensor(ids))


def image(i: int, latents: bool = True, vit: bool = True) -> fx.bagel.Image:
    of = EDITED if latents else ASKED
    read = (of[f"vit_tokens.{i}"], of[f"vit_position_ids.{i}"]) if vit else (None, None)
    return fx.bagel.Image(EDITED[f"image_latents.{i}"] if latents else None, *read)


SEQUENCES: dict[str, list[Any]] = {
    "a text": [text(11, 12, 13)],
    "an image to edit": [image(0), text(41, 42)],
    "two images and texts": [text(9, 8), image(1), text(7), image(2, vit=False), image(0, latents=False), text(5, 6)],
    "an image last": [text(9, 8), image(2)],
    "two texts": [text(3), text(11, 12, 13, 14)],
}


@torch.no_grad()
def whole(items: list[Any], query: Tensor, t: float, grid: tuple[int, int]) -> Tensor:
    """Velocity of a query image after a sequence, in one pass over everything under a dense mask: an independent reading."""
    llm = MODEL.language_model.model
    blocks: list[tuple[Tensor, list[bool], bool]] = []  # embeddings, drawing expert, causal

    def marked(tokens: Tensor, drawn: bool) -> None:
        ends = llm.embed_tokens(torch.tensor([IDS.start_of_image, IDS.end_of_image]))
        block = torch.cat([ends[:1], tokens, ends[1:]])
        blocks.append((block, [False, *[drawn] * len(tokens), False], False))

    def latent(tokens: Tensor, at: float, side: tuple[int, int]) -> Tensor:
        time = MODEL.time_embedder(torch.tensor([at]), torch.float32)
        places = torch.tensor([r * MODEL.config.latent_side + c for r in range(side[0]) for c in range(side[1])])
        return MODEL.vae2llm(tokens) + time + MODEL.latent_pos_embed.pos_embed[places]

    for item in items:
        if isinstance(item, fx.bagel.Text):
            ids = torch.tensor([IDS.bos_token_id, *item.ids.tolist(), IDS.eos_token_id])
            blocks.append((llm.embed_tokens(ids), [False] * len(ids), True))
            continue
        if item.latents is not None:
            _, _, height, width = item.latents.shape
            marked(latent(MODEL.packed(item.latents), 0.0, (height // 2, width // 2)), True)
        if item.vit_tokens is not None:
            features = MODEL.connector(MODEL.vit_model(item.vit_tokens, item.vit_position_ids))
            marked(features + MODEL.vit_pos_embed.pos_embed[item.vit_position_ids], False)
    marked(latent(query, t, grid), True)
    x = torch.cat([block for block, _, _ in blocks])
    drawn = torch.tensor([flag for _, flags, _ in blocks for flag in flags])
    length = len(x)
    mask, positions, at, position = torch.zeros(length, length, dtype=torch.bool), [], 0, 0
    for block, _, causal in blocks:
        n = len(block)
        mask[at : at + n, :at] = True
        mask[at : at + n, at : at + n] = torch.ones(n, n, dtype=torch.bool).tril() if causal else True
        positions += list(range(position, position + n)) if causal else [position] * n
        at, position = at + n, position + (n if causal else 1)
    d = MODEL.config.hidden // MODEL.config.heads
    angle = torch.tensor(positions)[:, None] * MODEL.config.rope_theta ** (-torch.arange(0, d, 2) / d)
    cos, sin = (torch.cat([f(angle)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))

    def rotate(y: Tensor) -> Tensor:
        return y * cos + torch.cat([-y[..., d // 2 :], y[..., : d // 2]], -1) * sin

    def of_expert(owner: Any, name: str, y: Tensor) -> Tensor:
        return torch.where(
            drawn.view(-1, *[1] * (y.dim() - 1)), getattr(owner, f"{name}_moe_gen")(y), getattr(owner, name)(y)
        )

    for layer in llm.layers:
        attention, normed = layer.self_attn, of_expert(layer, "input_layernorm", x)
        q, k, v = (of_expert(attention, f"{n}_proj", normed).unflatten(-1, (-1, d)) for n in "qkv")
        q, k = rotate(of_expert(attention, "q_norm", q)), rotate(of_expert(attention, "k_norm", k))
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(d)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        x = x + of_expert(attention, "o_proj", torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        x = x + of_expert(layer, "mlp", of_expert(layer, "post_attention_layernorm", x))
    return MODEL.llm2vae(llm.norm_moe_gen(x[-len(query) - 1 : -1]))


@pytest.mark.parametrize("name", SEQUENCES)
@torch.no_grad()
def test_a_context_is_the_whole_sequence(name: str) -> None:
    items, grid = SEQUENCES[name], (2, 3)
    query = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    context = MODEL.context(items, IDS)
    got = MODEL.velocity(MODEL.hidden(query, torch.tensor([0.6]), grid, context, IDS))
    assert relative(got, whole(items, query, 0.6, grid)) < LIMIT


@torch.no_grad()
def test_appending_changes_no_other_context() -> None:
    first = MODEL.context(SEQUENCES["a text"], IDS)
    before = [each.clone() for each in (*first.keys, *first.values)]
    one = MODEL.append(first, image(0), IDS)
    two = MODEL.append(first, text(5), IDS)
    assert all(torch.equal(a, b) for a, b in zip((*first.keys, *first.values), before, strict=True))
    assert (first.length, first.position) == (5, 5)
    assert (one.length, one.position) == (5 + 26 + 37, 7)  # an image has one position as latents, one for the encoder
    assert (two.length, two.position) == (8, 8)
    assert Context().length == 0


def draw(items: list[Any], **changes: Any) -> Tensor:
    noise = torch.randn(12, 64, generator=torch.Generator().manual_seed(2))
    return fx.bagel.sample(MODEL, noise, items, (48, 64), IDS, **{"num_timesteps": 7, **changes})


def test_interleaved_sequences_are_drawn_from() -> None:
    drawn = {name: draw(items, cfg_img_scale=1.5, cfg_interval=(0.0, 1.0)) for name, items in SEQUENCES.items()}
    assert all(each.isfinite().all() for each in drawn.values())
    assert len({round(float(each.sum()), 3) for each in drawn.values()}) == len(drawn)
    # Without a text there is nothing to guide from.
    assert draw([image(1)], cfg_text_scale=4.0).isfinite().all()


def test_answers_of_interleaved_sequences() -> None:
    items = [image(0, latents=False), text(220, 221), image(1, latents=False), text(200, 201, 202)]
    words = fx.bagel.answer_tokens(MODEL, items, IDS, 8, stop=False)
    assert words.shape == (8,)
    assert fx.bagel.answer_tokens(MODEL, items, IDS, 0).shape == (0,)
    ending, last = model_of(FIXTURE), int(words[2])
    head = ending.language_model.lm_head.weight.data
    head[[IDS.eos_token_id, last]] = head[[last, IDS.eos_token_id]]
    ended = fx.bagel.answer_tokens(ending, items, IDS, 8).tolist()
    assert ended == [*words[: words.tolist().index(last)].tolist(), IDS.eos_token_id]


@pytest.mark.parametrize("again", [False, True])
def test_taylorseer_has_no_state_between_images(again: bool) -> None:
    seer = fx.bagel.TaylorSeer(first_enhance=2, fresh_threshold=2)
    plain = draw(SEQUENCES["a text"])
    forecast = draw(SEQUENCES["a text"], taylorseer=seer)
    assert not torch.equal(plain, forecast)
    other = draw(SEQUENCES["two texts"], taylorseer=seer) if again else None
    assert torch.equal(draw(SEQUENCES["a text"], taylorseer=seer), forecast)
    assert torch.equal(draw(SEQUENCES["a text"]), plain)
    assert other is None or torch.equal(draw(SEQUENCES["two texts"], taylorseer=seer), other)
    always = fx.bagel.TaylorSeer(fresh_threshold=1)
    assert torch.equal(draw(SEQUENCES["a text"], taylorseer=always), plain)


def test_a_taylor_polynomial_is_exact_for_low_orders() -> None:
    one = torch.ones(3)
    assert torch.equal(taylor_prediction([5 * one, 2 * one], 3), 11 * one)
    assert torch.equal(taylor_prediction([5 * one], 3), 5 * one)
    assert torch.equal(taylor_prediction([0 * one, 0 * one, 2 * one], 3), 9 * one)


def test_the_interval_is_compared_in_fp32() -> None:
    # Of 12 points one lies at 0.4: as upstream's, it is not above it.
    times = time_grid(12, 3.0)[:-1].tolist()
    assert 0.4 < times[9] < 0.4000001
    assert not any(fx.bagel.Guidance(4.0, 1.0, (0.4, 1.0)).branches(times[9]))


def test_branches_run_where_they_count() -> None:
    guidance = fx.bagel.Guidance(4.0, 2.0, (0.4, 0.9))
    assert [guidance.branches(t) for t in (0.4, 0.41, 0.9, 0.91)] == [
        (False, False),
        (True, True),
        (True, True),
        (False, False),
    ]
    assert fx.bagel.Guidance(1.0, 2.0).branches(0.5) == (False, False)
    assert fx.bagel.Guidance(4.0, 1.0).branches(0.5) == (True, False)


def test_time_grid() -> None:
    grid = time_grid(5, 3.0)
    u = torch.linspace(1, 0, 5)
    assert torch.allclose(grid, 3 * u / (1 + 2 * u)) and float(grid[0]) == 1 and float(grid[-1]) == 0


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_renormalisation_never_enlarges(renorm: str) -> None:
    generator = torch.Generator().manual_seed(4)
    full, text_free, image_free = (torch.randn(5, 8, generator=generator) for _ in range(3))
    got = guided(full, text_free, image_free, fx.bagel.Guidance(3.0, 1.5, renorm=renorm))
    plain = image_free + 1.5 * (text_free + 3.0 * (full - text_free) - image_free)
    if renorm == "text_channel":
        first = text_free + 3.0 * (full - text_free)
        first = first * (full.norm(dim=-1, keepdim=True) / first.norm(dim=-1, keepdim=True)).clamp(max=1)
        expected = image_free + 1.5 * (first - image_free)
    else:
        dim = None if renorm == "global" else -1
        norms = [torch.linalg.vector_norm(each, dim=dim, keepdim=True) for each in (full, plain)]
        expected = plain * (norms[0] / norms[1]).clamp(max=1)
    torch.testing.assert_close(got, expected)
    assert torch.equal(guided(full, None, None, fx.bagel.Guidance()), full)
    opposed = guided(full, 1.5 * full, None, fx.bagel.Guidance(2.0, renorm=renorm))
    torch.testing.assert_close(opposed, 0.5 * full)
    least = guided(full, text_free, None, fx.bagel.Guidance(9.0, renorm=renorm, renorm_min=1.0))
    torch.testing.assert_close(least, text_free + 9.0 * (full - text_free))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"size": (48, 60)}, ValueError, r"size: expected \(height, width\) in pixels, multiples of 16 up to 160"),
        ({"size": (48, 320)}, ValueError, "size: expected"),
        ({"size": 48}, ValueError, "size: expected"),
        ({"noise": torch.zeros(12, 60)}, ValueError, r"noise: expected \[12, 64\]"),
        ({"noise": torch.zeros(12, 64).long()}, TypeError, "noise: expected a floating-point tensor"),
        ({"inputs": "a cat"}, TypeError, "inputs: expected a list of Text and Image"),
        ({"inputs": ["a cat"]}, TypeError, r"inputs\[0\]: expected a Text or an Image, got str"),
        ({"inputs": [text(1), text(320)]}, IndexError, r"inputs\[1\].ids: expected token ids in \[0, 320\)"),
        ({"inputs": [fx.bagel.Image()]}, ValueError, r"inputs\[0\]: expected latents, vit_tokens or both"),
        (
            {"inputs": [fx.bagel.Image(torch.zeros(1, 16, 7, 8))]},
            ValueError,
            r"inputs\[0\].latents: expected \[1, 16, H, W\]",
        ),
        (
            {"inputs": [fx.bagel.Image(vit_tokens=torch.zeros(4, 588))]},
            ValueError,
            "vit_tokens, vit_position_ids: expected both or none",
        ),
        (
            {"inputs": [fx.bagel.Image(None, torch.zeros(2, 588), torch.tensor([0, 144]))]},
            IndexError,
            r"vit_position_ids: expected places in \[0, 144\)",
        ),
        ({"token_ids": {"bos": 1}}, ValueError, "token_ids: expected bos_token_id"),
        ({"token_ids": 3}, TypeError, "token_ids: expected TokenIds"),
        ({"token_ids": fx.bagel.TokenIds(1, 2, 3, 320)}, IndexError, "token_ids.end_of_image"),
        ({"num_timesteps": 1}, ValueError, "num_timesteps: expected an integer in .2, 10000."),
        ({"cfg_text_scale": float("nan")}, ValueError, "cfg_text_scale"),
        ({"cfg_interval": (1.0, 0.4)}, ValueError, "cfg_interval: expected"),
        ({"cfg_renorm_type": "none"}, ValueError, "cfg_renorm_type: expected one of global"),
        ({"cfg_renorm_min": 2.0}, ValueError, "cfg_renorm_min"),
        ({"timestep_shift": 0.0}, ValueError, "timestep_shift"),
        ({"taylorseer": 6}, TypeError, "taylorseer: expected None or a TaylorSeer"),
        ({"callback": 1}, TypeError, "callback: expected None or a function"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], error: Any, message: str) -> None:
    arguments = {"noise": torch.zeros(12, 64), "inputs": [text(1)], "size": (48, 64), "token_ids": IDS, **changes}
    with pytest.raises(error, match=message):
        fx.bagel.sample(MODEL, **{"num_timesteps": 3, **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads: expected a divisor of 96"),
        ({"vit_layers_kept": 9}, "vit_layers_kept: expected 1 to 4"),
        ({"qk_norm": False}, "qk_norm: expected True"),
        ({"layers": 0}, "layers: expected an integer"),
    ],
)
def test_wrong_sizes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fx.bagel.BagelConfig(**{**FIXTURE.spec["model"], **change})
    for seer in ({"max_order": -1}, {"first_enhance": 0}, {"fresh_threshold": 0}):
        with pytest.raises(ValueError, match=next(iter(seer))):
            fx.bagel.TaylorSeer(**seer)


def test_pictures_become_tokens() -> None:
    config = MODEL.config
    for files, count in ((EDITED, 3), (ASKED, 2)):
        for i in range(count):
            resized = fx.bagel.vae_image(files[f"image_rgb.{i}"].numpy(), config, smallest=1)
            assert np.array_equal(np.array(resized), files[f"image_resized.{i}"].numpy())
            tokens, places = fx.bagel.vit_image(resized, config, smallest=1)
            assert torch.equal(tokens, files[f"vit_tokens.{i}"]) and torch.equal(places, files[f"vit_position_ids.{i}"])
    large = fx.bagel.vae_image(Pictures.new("RGB", (3000, 1500)), fx.bagel.BagelConfig())
    assert large.size == (1024, 512)
    with pytest.raises(ValueError, match="image: expected at most 12 patches a side"):
        fx.bagel.vit_image(large, config)


def test_latents_are_sampled_and_packed() -> None:
    mean, std = torch.randn(1, 16, 4, 6), torch.rand(1, 16, 4, 6)
    got = fx.bagel.encoded(mean, std, torch.Generator().manual_seed(1))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(got, 0.3611 * (mean + std * noise - 0.1159))
    assert torch.equal(MODEL.unpacked(MODEL.packed(got), (32, 48)), got)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden": 30, "heads": 6, "kv": 2}, "hidden: expected a multiple of 4"),
        ({"hidden": 36, "heads": 4, "kv": 2}, "heads: expected an even width"),
    ],
)
def test_sizes_that_no_model_can_have(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fx.bagel.BagelConfig(**sizes)
    with pytest.raises(ValueError, match="heads: expected an even width"):
        fx.janusflow.JanusFlowConfig(hidden=36, heads=4, kv=2)
