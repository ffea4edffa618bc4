"""Random-weight JanusFlow and BAGEL with 144 and 256 image tokens and a prompt of 40, as subjects of `e2e`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..planning.plan import TaskPlan
from .shapes import Inputs, fill

__all__ = ["FAMILIES", "BagelSubject", "JanusFlowSubject", "expert_plan"]

PROMPT, QUESTION = 40, 24
MULTIPLE = 64


def _words(count: int, vocabulary: int, seed: int) -> Tensor:
    return torch.randint(8, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


class JanusFlowSubject:
    """JanusFlow through `janusflow.sample` and `answer_tokens`."""

    name = "JanusFlow"
    prune_multiple = MULTIPLE

    def __init__(self, seed: int, tiny: bool = False):
        from ..models.janusflow import JanusFlow, JanusFlowConfig

        sizes: dict[str, Any] = {
            "hidden": 64,
            "inter": 192,
            "layers": 3,
            "heads": 4,
            "kv": 4,
            "vocab": 300,
            "channels": 32,
            "grid": 4,
        }
        if not tiny:
            sizes = {
                "hidden": 512,
                "inter": 1408,
                "layers": 8,
                "heads": 4,
                "kv": 4,
                "vocab": 32000,
                "channels": 192,
                "grid": 12,
            }
        vision: dict[str, Any] = {"vit": 64, "vit_layers": 2, "vit_heads": 4, "image_size": 48}
        if not tiny:
            vision = {"vit": 256, "vit_layers": 6, "vit_heads": 4, "image_size": 192}
        config = JanusFlowConfig(**sizes, **vision, latent_size=2 * sizes["grid"])
        self.model: Any = JanusFlow(config).eval()
        fill(self.model, seed)
        side = config.latent_size
        self._noise = torch.randn(1, config.latent_channels, side, side, generator=torch.Generator().manual_seed(seed))
        self._pixels = torch.randn(1, 3, *[config.image_size] * 2, generator=torch.Generator().manual_seed(seed))
        self._prompt = _words(PROMPT, config.vocab, seed)
        image = torch.tensor([4, *[5] * config.vit_tokens, 6])
        self._question = torch.cat([_words(16, config.vocab, 1), image, _words(QUESTION, config.vocab, 2)])[None]

    def generate(self, inputs: Inputs | None, steps: int, guidance: float, shift: float) -> Tensor:
        from ..models.janusflow import sample

        return sample(self.model, self._noise, self._prompt, steps - 1, guidance)

    def answer(self, inputs: Inputs | None, tokens: int) -> Tensor:
        from ..models.janusflow import answer_tokens

        return answer_tokens(self.model, self._pixels, self._question, tokens)


class BagelSubject:
    """BAGEL through `bagel.sample` (with the guidance of its API: text 4, image 1.5, between 0.4 and 1) and `answer_tokens`."""

    name = "BAGEL"
    prune_multiple = MULTIPLE

    def __init__(self, seed: int, tiny: bool = False):
        from ..models.bagel import Bagel, BagelConfig, Image, Text, TokenIds

        sizes: dict[str, Any] = {
            "hidden": 64,
            "inter": 192,
            "layers": 3,
            "heads": 4,
            "kv": 2,
            "vocab": 300,
            "latent_side": 16,
        }
        if not tiny:
            sizes = {"hidden": 448, "inter": 2368, "layers": 8, "heads": 7, "kv": 1, "vocab": 32000, "latent_side": 16}
        vision: dict[str, Any] = {
            "vit": 64,
            "vit_inter": 128,
            "vit_layers": 3,
            "vit_layers_kept": 2,
            "vit_heads": 4,
            "vit_side": 12,
        }
        if not tiny:
            vision = {
                "vit": 192,
                "vit_inter": 768,
                "vit_layers": 5,
                "vit_layers_kept": 4,
                "vit_heads": 4,
                "vit_side": 16,
            }
        config = BagelConfig(**sizes, **vision)
        self.model: Any = Bagel(config).eval()
        fill(self.model, seed)
        self._grid = 4 if tiny else 16
        side = config.vit_side
        make = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(self._grid**2, config.patch_width, generator=make)
        patches = torch.randn(side**2, 3 * config.vit_patch**2, generator=make)
        self._ids = TokenIds(1, 2, 3, 4)
        self._prompt: list[Text | Image] = [Text(_words(PROMPT, config.vocab, seed))]
        image = Image(None, patches, torch.arange(side**2))
        self._question: list[Text | Image] = [image, Text(_words(QUESTION, config.vocab, 2))]

    def generate(self, inputs: Inputs | None, steps: int, guidance: float, shift: float) -> Tensor:
        from ..models.bagel import sample

        size = (self._grid * self.model.config.token_pixels,) * 2
        return sample(
            self.model, self._noise, self._prompt, size, self._ids, steps, cfg_img_scale=1.5, timestep_shift=shift
        )

    def answer(self, inputs: Inputs | None, tokens: int) -> Tensor:
        from ..models.bagel import answer_tokens

        return answer_tokens(self.model, self._question, self._ids, tokens, stop=False)


FAMILIES: dict[str, type[JanusFlowSubject] | type[BagelSubject]] = {
    "janusflow": JanusFlowSubject,
    "bagel": BagelSubject,
}


def expert_plan(model: nn.Module, multiple: int = MULTIPLE) -> TaskPlan:
    """A plan from the column norms of W_down, of each task's own FFNs where the model has experts."""
    layers = model.language_model.model.layers  # type: ignore[union-attr]
    scores = {}
    for task, names in (("generation", ("mlp_moe_gen", "mlp")), ("understanding", ("mlp",))):
        ffns = [next(getattr(layer, name) for name in names if hasattr(layer, name)) for layer in layers]  # type: ignore[union-attr]
        own = [ffn.down_proj.weight.detach().float().norm(dim=0).cpu() for ffn in ffns]
        shared = task == "understanding" and not hasattr(layers[0], "mlp_moe_gen")  # type: ignore[index]
        scores[task] = [score.roll(score.numel() // 3) if shared else score for score in own]
    return TaskPlan.from_scores(**scores, ratio=0.2, multiple=multiple)
