"""Answers in plain torch: the whole sequence is computed for every token, dropped tokens are masked as keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashu_ext.models.showo2.understanding import prompt_embeds


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def _layer(layer: Any, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor, heads: tuple[int, int]) -> Any:
    """One Qwen2 layer on x [n, hidden] -> (output, attention weights [heads, n, n], values [n, kv, d])."""
    attention, n = layer.self_attn, x.shape[0]
    h = layer.input_layernorm(x)
    query, key, value = (
        getattr(attention, f"{name}_proj")(h).view(n, count, -1)
        for name, count in (("q", heads[0]), ("k", heads[1]), ("v", heads[1]))
    )
    q, k = _rotate(query.transpose(0, 1), cos, sin), _rotate(key.transpose(0, 1), cos, sin)
    group = heads[0] // heads[1]
    k, v = k.repeat_interleave(group, 0), value.transpose(0, 1).repeat_interleave(group, 0)
    logits = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~seen, float("-inf"))
    weights = torch.softmax(logits, dim=-1).nan_to_num()
    x = x + attention.o_proj((weights @ v).transpose(0, 1).reshape(n, -1))
    h = layer.post_attention_layernorm(x)
    mlp = layer.mlp
    return x + mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(h)) * mlp.up_proj(h)), weights, value


@torch.no_grad()
def oracle(
    model: Any,
    image_latents: Tensor | Sequence[Tensor],
    tokens_before_image: Tensor,
    tokens_after_boi: Tensor,
    max_new_tokens: int,
    ratio: float = 0.0,
    layer: int = 2,
    score: str = "value_norm",
    skip: float = 0.0,
    hidden: slice | None = None,
    importance: list[Tensor] | None = None,
) -> tuple[list[int], Tensor, list[int]]:
    """A dense model's greedy answer with tokens pruned and layers skipped: (tokens, logits [n, vocab], skipped layers).

    hidden: positions of the prompt that only they themselves attend to. importance: receives 1 - cosine(input, output) of every
    layer, of the prompt's last token.
    """
    llm, config = model.showo.model, model.showo.config
    heads = (config.num_attention_heads, config.num_key_value_heads)
    embeds, allowed = prompt_embeds(model, image_latents, tokens_before_image, tokens_after_boi)
    embeds, prompt = embeds[0], embeds.shape[1]
    if hidden is not None:
        allowed[:, hidden] = torch.eye(prompt, dtype=torch.bool)[:, hidden]
    visuals, start = [], tokens_before_image.shape[1]
    for latents in [image_latents] if isinstance(image_latents, Tensor) else image_latents:
        first = start + (2 if model.config.add_time_embeds else 1)
        visuals.append(torch.arange(first, first + latents.shape[2] * latents.shape[3] // model.config.patch_size**2))
        start = int(visuals[-1][-1]) + 2  # after eoi
    drops = [int(len(visual) * ratio) for visual in visuals]
    dropped = torch.zeros(prompt, dtype=torch.bool)
    skipped: list[int] = []
    tokens: list[int] = []
    logits = []
    for count in range(max_new_tokens):
        n = prompt + count
        seen = torch.zeros(n, n, dtype=torch.bool)
        seen[:prompt, :prompt] = allowed
        seen[prompt:, :prompt] = allowed[-1]
        seen[prompt:, prompt:] = torch.ones(count, count).tril().bool()
        cos, sin = (table[0] for table in llm.rotary_emb(embeds, torch.arange(n)[None]))
        x, angles = embeds, []
        for index, block in enumerate(llm.layers):
            if index == layer and count == 0 and any(drops):
                _, weights, value = _layer(block, x, cos, sin, seen, heads)
                scores = {
                    "value_norm": value.flatten(1).norm(dim=1),
                    "value_norm_small": -value.flatten(1).norm(dim=1),
                    "attention": -weights[:, -1].mean(0),
                }.get(score)
                for visual, drop in zip(visuals, drops, strict=True):
                    drawn = -torch.rand(len(visual), generator=torch.Generator().manual_seed(0))
                    own = drawn if scores is None else scores[visual]
                    dropped[visual[own.argsort(descending=True)[:drop]]] = True
            keys = (
                torch.cat([dropped, torch.zeros(count, dtype=torch.bool)]) if index >= layer else torch.zeros(n).bool()
            )
            out, _, _ = _layer(block, x, cos, sin, seen & ~keys, heads)
            if index in skipped:
                out = torch.cat([out[:prompt], x[prompt:]])  # the prompt runs through all layers, the answer skips some
            angles.append(1 - torch.cosine_similarity(x[-1], out[-1], dim=0))
            x = out
        if count == 0:
            skipped = sorted(torch.stack(angles).argsort()[: int(len(angles) * skip)].tolist())
            if importance is not None:
                importance += angles
        logits.append(model.showo.lm_head(llm.norm(x[-1])))
        tokens.append(int(logits[-1].argmax()))
        embeds = torch.cat([embeds, llm.embed_tokens(torch.tensor(tokens[-1:]))])
    return tokens, torch.stack(logits), skipped


def decoded(engine: Any, prompts: Sequence[Any], new: int) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy answers of an accelerated model's engine: (tokens, logits [new, vocab]) of each prompt."""
    rows: list[list[Tensor]] = [[] for _ in prompts]

    def pick(logits: Tensor, numbers: Sequence[int]) -> Tensor:
        for row, prompt in zip(logits, numbers, strict=True):
            rows[prompt].append(row.clone())
        return logits.argmax(-1, keepdim=True)

    tokens = engine.decode(prompts, new, pick, None)
    return [[int(t) for t in row] for row in tokens], [torch.stack(row) for row in rows]


def ask(seed: int, before: int = 4, after: int = 6) -> dict[str, Tensor]:
    """A random image and question for the fixture's model, as arguments of `answer_tokens`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "image_latents": torch.randn(1, 16, 12, 12, generator=generator),
        "tokens_before_image": torch.randint(0, 300, (1, before), generator=generator),
        "tokens_after_boi": torch.cat([torch.tensor([[301, 302]]), torch.randint(0, 300, (1, after), generator=generator)], 1),
    }  # fmt: skip


def batch(asked: Sequence[dict[str, Tensor]]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Questions as the first arguments of `answer_tokens_batch`."""
    return (
        torch.cat([a["image_latents"] for a in asked]),
        [a["tokens_before_image"] for a in asked],
        [a["tokens_after_boi"] for a in asked],
    )
