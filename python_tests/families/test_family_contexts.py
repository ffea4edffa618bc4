"""JanusFlow and BAGEL in the contexts that a call may be made in: no bit changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from support.conformance import FIXTURES
from support.contexts import CONTEXTS
from torch import Tensor

import flashu_ext as fx
from flashu_ext.models.bagel.conformance import model_of as bagel_of
from flashu_ext.models.comparison import Fixture
from flashu_ext.models.janusflow.conformance import model_of as janusflow_of

pytestmark = pytest.mark.usefixtures("one_thread")

PICTURE = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3))
# A dense model is torch's own: autocast is there to change it.
DENSE = [name for name in CONTEXTS if "autocast" not in name]


def janusflow(accelerated: bool) -> Callable[[], list[Tensor]]:
    fixture = Fixture.read(FIXTURES / "janusflow")
    model, drawn, asked = janusflow_of(fixture), fixture.tensors("t2i"), fixture.tensors("mmu")
    noise = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    if accelerated:
        fx.accelerate(model)

    def work() -> list[Tensor]:
        return [
            fx.janusflow.sample(model, noise, drawn["tokens.0"], 5, 3.0),
            fx.janusflow.answer_tokens(model, asked["pixel_values.0"][0], asked["tokens.0"], 5),
            fx.janusflow.pixel_values(PICTURE, model.config),
        ]

    return work


def bagel(accelerated: bool) -> Callable[[], list[Tensor]]:
    fixture = Fixture.read(FIXTURES / "bagel")
    model, edited = bagel_of(fixture), fixture.tensors("edit")
    ids = fx.bagel.TokenIds(**fixture.spec["token_ids"])
    noise = torch.randn(12, 64, generator=torch.Generator().manual_seed(2))
    words = torch.tensor([11, 12, 13])
    if accelerated:
        fx.accelerate(model)
    seen = fx.bagel.Image(None, edited["vit_tokens.0"], edited["vit_position_ids.0"])
    image = fx.bagel.Image(edited["image_latents.0"], edited["vit_tokens.0"], edited["vit_position_ids.0"])

    def work() -> list[Tensor]:
        sequence = [image, fx.bagel.Text(words)]
        return [
            fx.bagel.sample(model, noise, sequence, (48, 64), ids, num_timesteps=5, cfg_img_scale=1.5),
            fx.bagel.sample(model, noise, sequence, (48, 64), ids, num_timesteps=8, taylorseer=fx.bagel.TaylorSeer()),
            fx.bagel.answer_tokens(model, [seen, fx.bagel.Text(words)], ids, 5, stop=False),
            *fx.bagel.vit_image(PICTURE, model.config, 48, 16),
        ]

    return work


def unchanged(work: Callable[[], list[Tensor]], context: str) -> None:
    expected = work()
    with CONTEXTS[context]():
        got = work()
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


FAMILIES = {"janusflow": janusflow, "bagel": bagel}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_accelerated(family: str, context: str) -> None:
    unchanged(FAMILIES[family](True), context)


@pytest.mark.parametrize("context", DENSE)
@pytest.mark.parametrize("family", FAMILIES)
def test_dense(family: str, context: str) -> None:
    unchanged(FAMILIES[family](False), context)
