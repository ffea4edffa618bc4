"""Small random Show-o2 models and their inputs: tied or not, layers in any order of importance, several shapes of heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import flashu_ext as fx

GRID, VOCABULARY, LENGTH = 4, 48, 26


def small_model(
    seed: int = 0,
    *,
    tied: bool = False,
    order: Sequence[int] = (3, 0, 5, 1, 7, 2, 6, 4),
    heads: tuple[int, int] = (4, 2),
    hidden: int = 32,
    head_hidden: int = 48,
    time_token: bool = True,
) -> Any:
    """A model with random weights everywhere.

    Args:
        tied: logits use the token embeddings. order: the layers by importance, least important first.
        heads: numbers of query and key heads of the language model. hidden, head_hidden: widths; if equal, no projection
            lies between language model and head.
    """
    torch.manual_seed(seed)
    model: Any = fx.showo2.Showo2(
        fx.showo2.Showo2Config(
            llm={
                "hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": len(order), "vocab_size": VOCABULARY,
                "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "tie_word_embeddings": tied,
            },
            vision={"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2},
            head={
                "hidden_size": head_hidden, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
                "head_dim": 16, "num_layers": 2,
            },
            image_latent_height=GRID,
            image_latent_width=GRID,
            add_time_embeds=time_token,
        )
    )  # fmt: skip
    _fill(model, order)
    return model.eval()


@torch.no_grad()
def _fill(model: Any, order: Sequence[int]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5)
    for rank, layer in enumerate(order):  # a layer that adds more to the residual stream is more important
        for linear in (model.showo.model.layers[layer].self_attn.o_proj, model.showo.model.layers[layer].mlp.down_proj):
            linear.weight.mul_(0.02 * 1.7**rank)


def generation_inputs(model: Any, seed: int = 1, images: int = 2) -> dict[str, Any]:
    """Arguments of `sample`: prompts of other lengths than the empty one."""
    generator = torch.Generator().manual_seed(seed)
    span = GRID * GRID + model.config.add_time_embeds

    def tokens() -> Tensor:
        return torch.randint(0, VOCABULARY, (images, LENGTH), generator=generator)

    return {
        "noise": torch.randn(images, 16, 2 * GRID, 2 * GRID, generator=generator),
        "text_tokens": tokens(),
        "text_tokens_null": tokens(),
        "modality_positions": torch.tensor([[[3 + row % 4, span]] for row in range(images)]),
        "modality_positions_null": torch.tensor([[[2, span]]] * images),
        "guidance_scale": 3.0,
        "time_shifting_factor": 3.0,
    }


def question_inputs(seed: int = 1) -> dict[str, Any]:
    """Arguments of `answer_tokens`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "image_latents": torch.randn(1, 16, 2 * GRID, 2 * GRID, generator=generator),
        "tokens_before_image": torch.randint(0, VOCABULARY, (1, 3), generator=generator),
        "tokens_after_boi": torch.randint(0, VOCABULARY, (1, 5), generator=generator),
    }
