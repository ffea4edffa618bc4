"""Random-weight JanusFlow and BAGEL with 144 and 256 image tokens and a prompt of 40, as subjects of `e2e`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .shapes import Inputs, fill

__all__ = ["BAGEL_DRAWINGS", "SUBJECTS", "BagelSubject", "JanusFlowSubject"]

PROMPT, QUESTION = 40, 24

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "janusflow": {
        "bench": {
            **{"hidden": 512, "inter": 1408, "layers": 8, "heads": 4, "kv": 4, "vocab": 32000},
            **{"channels": 192, "grid": 12, "latent_size": 24},
            **{"vit": 256, "vit_layers": 6, "vit_heads": 4, "image_size": 192},
        },
        "tiny": {
            **{"hidden": 64, "inter": 192, "layers": 3, "heads": 4, "kv": 4, "vocab": 300},
            **{"channels": 32, "grid": 4, "latent_size": 8},
            **{"vit": 64, "vit_layers": 2, "vit_heads": 4, "image_size": 48},
        },
    },
    "bagel": {
        "bench": {
            **{"hidden": 448, "inter": 2368, "layers": 8, "heads": 7, "kv": 1, "vocab": 32000, "latent_side": 16},
            **{"vit": 192, "vit_inter": 768, "vit_layers": 5, "vit_layers_kept": 4, "vit_heads": 4, "vit_side": 16},
        },
        "tiny": {
            **{"hidden": 64, "inter": 192, "layers": 3, "heads": 4, "kv": 2, "vocab": 300, "latent_side": 4},
            **{"vit": 64, "vit_inter": 128, "vit_layers": 3, "vit_layers_kept": 2, "vit_heads": 4, "vit_side": 12},
        },
    },
}
"""Of the configurations, by family and shape."""

BAGEL_DRAWINGS: dict[str, tuple[float, float, bool]] = {
    "api": (4.0, 1.5, False),
    "text": (4.0, 1.0, False),
    "plain": (1.0, 1.0, False),
    "taylorseer": (4.0, 1.5, True),
}
"""How BAGEL draws: the guidance scales of text and image, and whether TaylorSeer extrapolates. Upstream's API has the first."""


def _normal(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _words(count: int, vocabulary: int, seed: int) -> Tensor:
    return torch.randint(8, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


class JanusFlowSubject:
    """JanusFlow through `janusflow.sample` and `answer_tokens`, with what it draws from and is asked."""

    name = "JanusFlow"
    evaluates_only = False

    def __init__(self, shape: str, seed: int, drawing: str = "api"):
        from ..models.janusflow import JanusFlow, JanusFlowConfig

        self._config = config = JanusFlowConfig(**SIZES["janusflow"][shape])  # type: ignore[arg-type]
        self.model: Any = JanusFlow(config).eval()
        fill(self.model, seed)
        side, image = config.latent_size, [4, *[5] * config.vit_tokens, 6]
        self.noise = _normal(1, config.latent_channels, side, side, seed=seed)
        self.pixels = _normal(1, 3, config.image_size, config.image_size, seed=seed)
        self.prompt = _words(PROMPT, config.vocab, seed)
        before, after = _words(16, config.vocab, seed + 1), _words(QUESTION, config.vocab, seed + 2)
        self.question = torch.cat([before, torch.tensor(image), after])[None]

    def generate(self, inputs: Inputs, steps: int, guidance: float, shift: float) -> Tensor:
        from ..models.janusflow import sample

        return sample(self.model, self.noise, self.prompt, steps - 1, guidance)

    def answer(self, inputs: Inputs, tokens: int) -> Tensor:
        from ..models.janusflow import answer_tokens

        return answer_tokens(self.model, self.pixels, self.question, tokens)


class BagelSubject:
    """BAGEL through `bagel.sample`, guided between 0.4 and 1 as by its API, and `answer_tokens`.

    drawing: a key of `BAGEL_DRAWINGS`.
    """

    name = "BAGEL"
    evaluates_only = False

    def __init__(self, shape: str, seed: int, drawing: str = "api"):
        from ..models.bagel import Bagel, BagelConfig, Image, Text, TokenIds

        config = BagelConfig(**SIZES["bagel"][shape])  # type: ignore[arg-type]
        self.model: Any = Bagel(config).eval()
        fill(self.model, seed)
        self.drawing = BAGEL_DRAWINGS[drawing]
        self.size = (config.latent_side * config.token_pixels,) * 2
        self.noise = _normal(config.latent_side**2, config.patch_width, seed=seed)
        self.ids = TokenIds(1, 2, 3, 4)
        self.prompt = [Text(_words(PROMPT, config.vocab, seed))]
        patches = config.vit_side**2
        image = Image(None, _normal(patches, 3 * config.vit_patch**2, seed=seed), torch.arange(patches))
        self.question = image, Text(_words(QUESTION, config.vocab, seed + 2))

    def generate(self, inputs: Inputs, steps: int, guidance: float, shift: float) -> Tensor:
        from ..models.bagel import TaylorSeer, sample

        text, image, extrapolates = self.drawing
        seer = TaylorSeer() if extrapolates else None
        arguments = self.noise, self.prompt, self.size, self.ids, steps, text, image
        return sample(self.model, *arguments, timestep_shift=shift, taylorseer=seer)

    def answer(self, inputs: Inputs, tokens: int) -> Tensor:
        from ..models.bagel import answer_tokens

        return answer_tokens(self.model, self.question, self.ids, tokens, stop=False)


SUBJECTS: dict[str, type[JanusFlowSubject] | type[BagelSubject]] = {
    "janusflow": JanusFlowSubject,
    "bagel": BagelSubject,
}
