"""Random-weight models and inputs of fixed shapes, the same for one seed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.adapter import adapter_of
from ..models.showo2.config import Showo2Config
from ..planning.plan import TaskPlan

__all__ = ["SHAPES", "Inputs", "Shape", "fill", "fill_on_device", "inputs", "weight_plan"]


@dataclass(frozen=True)
class Shape:
    """A model with the lengths that it is run at.

    Attributes:
        config: the model. sequence: padded length of a prompt with its image. prompt: tokens of the prompt.
        before, question: tokens before the image and of the question when it answers.
        prune_multiple: kept FFN neurons are a multiple of this.
    """

    config: Showo2Config
    sequence: int
    prompt: int
    before: int
    question: int
    prune_multiple: int


def _published(config: Showo2Config) -> Shape:
    """432 px with upstream's padding (1024) and a prompt and a question of usual lengths."""
    return Shape(config, sequence=1024, prompt=40, before=14, question=24, prune_multiple=64)


SHAPES = {
    "1.5b": _published(Showo2Config.show_o2_1_5b()),
    "7b": _published(Showo2Config.show_o2_7b()),
    "bench": Shape(
        Showo2Config(
            llm={
                "hidden_size": 512,
                "intermediate_size": 2816,
                "num_hidden_layers": 14,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "vocab_size": 32000,
                "max_position_embeddings": 4096,
                "rope_theta": 1e6,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
            },
            vision={
                "hidden_size": 384,
                "intermediate_size": 1536,
                "num_hidden_layers": 11,
                "num_attention_heads": 6,
            },
            head={
                "hidden_size": 640,
                "intermediate_size": 2560,
                "num_attention_heads": 10,
                "num_key_value_heads": 5,
                "head_dim": 64,
                "num_layers": 5,
            },
            image_latent_height=14,
            image_latent_width=14,
        ),
        sequence=256,
        prompt=20,
        before=16,
        question=16,
        prune_multiple=64,
    ),
    "tiny": Shape(
        Showo2Config(
            llm={
                "hidden_size": 64,
                "intermediate_size": 160,
                "num_hidden_layers": 5,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 256,
                "max_position_embeddings": 256,
                "rope_theta": 1e6,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
            },
            vision={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            },
            head={
                "hidden_size": 48,
                "intermediate_size": 96,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 24,
                "num_layers": 2,
            },
            image_latent_height=4,
            image_latent_width=4,
        ),
        sequence=40,
        prompt=6,
        before=4,
        question=4,
        prune_multiple=16,
    ),
}


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Random values in order of name: matrices at variance 1 / fan-in, norm weights near one."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for name, parameter in sorted(model.named_parameters()):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if parameter.dim() == 1:
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if name.endswith("bias") else 1 + noise)
        else:
            fan_in = math.prod(parameter.shape[1:])
            scale = 0.3 if "embed" in name and parameter.dim() == 2 else 1 / math.sqrt(fan_in)
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def fill_on_device(model: nn.Module, seed: int) -> None:
    """As `fill`, but sampled on the weights' device and in their dtype, for billions of weights; values depend on the device."""
    generator: torch.Generator | None = None
    for name, parameter in sorted(model.named_parameters()):  # tied weights come once
        if generator is None:
            generator = torch.Generator(device=parameter.device).manual_seed(seed)
        if parameter.dim() == 1:
            parameter.normal_(0 if name.endswith("bias") else 1, 0.05, generator=generator)
        else:
            scale = 0.3 if "embed" in name and parameter.dim() == 2 else 1 / math.sqrt(math.prod(parameter.shape[1:]))
            parameter.normal_(0, scale, generator=generator)


@dataclass(frozen=True)
class Inputs:
    """One image's and one answer's inputs; shapes as in `showo2.sample` and `answer_tokens`, batch 1."""

    noise: Tensor
    text_tokens: Tensor
    text_tokens_null: Tensor
    positions: Tensor
    positions_null: Tensor
    image_latents: Tensor
    before: Tensor
    after: Tensor


def inputs(shape: Shape, seed: int) -> Inputs:
    """Random noise and token ids in Show-o2's layout: bos, prompt, boi, image span, eoi, eos, padding."""
    generator = torch.Generator().manual_seed(seed + 1)
    config = shape.config
    vocabulary = config.llm_vocab_size
    bos, boi, eoi, eos, pad, image = (vocabulary - 1 - i for i in range(6))
    size = (
        1,
        config.image_latent_dim,
        *(n * config.patch_size for n in (config.image_latent_height, config.image_latent_width)),
    )
    span = config.image_tokens

    def ids(count: int) -> list[int]:
        return torch.randint(0, vocabulary - 6, (count,), generator=generator).tolist()

    def drawing(prompt: list[int]) -> tuple[Tensor, Tensor]:
        head = [bos, *prompt, boi]
        row = [*head, *[image] * span, eoi, eos]
        row += [pad] * (shape.sequence - len(row))
        return torch.tensor([row]), torch.tensor([[[len(head), span]]])

    noise = torch.randn(size, generator=generator)
    text, positions = drawing(ids(shape.prompt))
    null, positions_null = drawing([])
    latents = torch.randn(size, generator=generator)
    before = torch.tensor([[bos, *ids(shape.before - 1)]])
    after = torch.tensor([[boi, eoi, *ids(shape.question)]])
    return Inputs(noise, text, null, positions, positions_null, latents, before, after)


def weight_plan(model: nn.Module, multiple: int) -> TaskPlan:
    """A plan from the column norms of W_down, which need no data; the choice of sets costs no time."""
    parts = adapter_of(model)
    understanding = _column_norms(parts.layers)
    if len(parts.experts):
        generation = _column_norms(parts.experts)
    else:
        # Understanding ranks the neurons differently, as in trained models: the sets overlap in part.
        generation, understanding = understanding, [norms.roll(norms.numel() // 3) for norms in understanding]
    return TaskPlan.from_scores(generation=generation, understanding=understanding, ratio=0.2, multiple=multiple)


def _column_norms(layers: Iterable[Any]) -> list[Tensor]:
    return [layer.mlp.down_proj.weight.detach().float().norm(dim=0).cpu() for layer in layers]
