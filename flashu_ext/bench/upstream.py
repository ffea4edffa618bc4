"""Drives the unmodified Show-o2 classes of a checkout: `bench e2e --upstream`.

Their code is imported from the checkout and left as it is: no class or function of it is replaced. Its own
requirements (transformers 4.47, diffusers, timm, einops, torchdiffeq) must be in the environment.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..models.showo2.config import Showo2Config
from .checkouts import imported
from .shapes import Inputs

__all__ = ["UpstreamSubject", "build"]

_FILES = (
    "models/modeling_showo2_qwen2_5.py",
    "models/modules.py",
    "models/omni_attention.py",
    "transport/transport.py",
)
_MODULES = (
    *(f"models.{name}" for name in ("modeling_showo2_qwen2_5", "modules", "modeling_siglip", "omni_attention")),
    "transport",
)


@dataclass(frozen=True)
class Checkout:
    """The imported modules of a Show-o2 checkout."""

    showo2: ModuleType
    modules: ModuleType
    siglip: ModuleType
    attention: ModuleType
    transport: ModuleType

    @classmethod
    def load(cls, directory: Path) -> Checkout:
        """Import a checkout's `models` and `transport` packages.

        Raises:
            ValueError: the folder is not such a checkout. ImportError: something it needs is not installed.
        """
        needs = "transformers 4.47, diffusers, timm, einops and torchdiffeq"
        return cls(*imported(directory, "Show-o2", needs, _FILES, _MODULES))


def build(directory: Path, config: Showo2Config) -> UpstreamSubject:
    """Upstream's `Showo2Qwen2_5` of a shape, with its constructors' random weights.

    Its constructor reads a language model's config and a SigLIP checkpoint by name, so both are written to a
    temporary folder; it fixes the head's size, so this instance's head is built anew from upstream's classes.
    """
    checkout = Checkout.load(directory)
    with tempfile.TemporaryDirectory() as folder:
        llm, clip = Path(folder) / "llm", Path(folder) / "clip"
        llm.mkdir()
        (llm / "config.json").write_text(json.dumps({"model_type": "qwen2", **config.llm}), encoding="utf-8")
        _siglip(checkout, config).save_pretrained(str(clip))
        model = checkout.showo2.Showo2Qwen2_5(
            llm_vocab_size=config.llm_vocab_size,
            llm_model_path=str(llm),
            load_from_showo=True,
            image_latent_dim=config.image_latent_dim,
            image_latent_height=config.image_latent_height,
            image_latent_width=config.image_latent_width,
            patch_size=config.patch_size,
            hidden_size=config.hidden_size,
            clip_latent_dim=config.clip_latent_dim,
            num_diffusion_layers=0,
            add_time_embeds=config.add_time_embeds,
            clip_pretrained_model_path=str(clip),
        )
    _set_head(checkout.modules, model, config)
    return UpstreamSubject(model.eval(), checkout)


def _siglip(checkout: Checkout, config: Showo2Config) -> Any:
    """A SigLIP with one layer more than is kept: upstream drops the last one."""
    from transformers import SiglipConfig

    if config.position_rows != config.image_latent_height**2 or config.image_latent_height != config.image_latent_width:
        raise ValueError("--upstream: expected a square image grid with one row of the position table per patch")
    vision = dict(config.vision)
    vision |= {
        "num_hidden_layers": config.vision["num_hidden_layers"] + 1,
        "image_size": config.image_latent_height * 16,
        "patch_size": 16,
    }
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 8,
    }
    return checkout.siglip.SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


def _set_head(modules: ModuleType, model: Any, config: Showo2Config) -> None:
    head = config.head
    shape = modules.DiffusionHeadConfig(head["hidden_size"], head["head_dim"], head["intermediate_size"])
    shape.num_attention_heads = head["num_attention_heads"]
    shape.num_key_value_heads = head["num_key_value_heads"]
    width, hidden = head["hidden_size"], config.hidden_size
    model.diffusion_head_config = shape
    model.time_embed = modules.TimestepEmbedder(width)
    for name in ("diff_proj", "time_embed_proj"):
        if hasattr(model, name):
            delattr(model, name)
    if hidden != width:
        model.diff_proj = nn.Sequential(nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, width))
        model.time_embed_proj = nn.Linear(width, hidden)
    blocks = [modules.ModulatedAttentionBlock(shape, layer) for layer in range(head["num_layers"])]
    model.diffusion_head_a = nn.ModuleList(blocks)
    model.diffusion_head_b = modules.FinalLayer(width, config.patch_size, config.image_latent_dim)


class UpstreamSubject:
    """Generates and answers as upstream's scripts do; its model may be accelerated."""

    name = "Show-o2 (upstream)"
    evaluates_only = False

    def __init__(self, model: nn.Module, checkout: Checkout):
        self.model: Any = model
        self.checkout = checkout

    def generate(self, inputs: Inputs, steps: int, guidance: float, shift: float) -> Tensor:
        """Final latents. Source: upstream inference_t2i.py and the transport settings of its configs."""
        tokens = torch.cat([inputs.text_tokens, inputs.text_tokens_null])
        positions = torch.cat([inputs.positions, inputs.positions_null])
        mask = self.checkout.attention.omni_attn_mask_naive(len(tokens), tokens.shape[1], positions, tokens.device)
        dtype = self.model.showo.model.embed_tokens.weight.dtype
        transport = self.checkout.transport.create_transport(snr_type="lognorm", do_shift=True, seq_len=tokens.shape[1])
        sampler = self.checkout.transport.Sampler(transport)
        integrate = sampler.sample_ode(sampling_method="euler", num_steps=steps, time_shifting_factor=shift)
        samples = integrate(
            torch.cat([inputs.noise, inputs.noise]),
            self.model.t2i_generate,
            text_tokens=tokens,
            attention_mask=mask.to(dtype),
            modality_positions=positions,
            output_hidden_states=True,
            max_seq_len=tokens.shape[1],
            guidance_scale=guidance,
        )
        return samples[-1].chunk(2)[0]

    @torch.no_grad()
    def answer(self, inputs: Inputs, tokens: int) -> Tensor:
        """Greedy tokens [tokens]. Source: upstream inference_mmu.py, the span one token late included."""
        model = self.model
        und = model.image_embedder_und(inputs.image_latents) + model.position_embedding(model.image_position_ids)
        und = model.und_trans(und)["last_hidden_state"]
        image = model.fusion_proj(torch.cat([und, model.image_embedder_gen(inputs.image_latents)], dim=-1))
        embed = model.showo.model.embed_tokens
        before, after = embed(inputs.before), embed(inputs.after)
        pieces, start = [before, after[:, :1]], inputs.before.shape[1] + 1
        if model.config.add_time_embeds:
            time = model.time_embed(torch.tensor([[1.0]], device=before.device), before.dtype)
            pieces.append(model.time_embed_proj(time) if hasattr(model, "time_embed_proj") else time)
            start += 1
        embeds = torch.cat([*pieces, image, after[:, 1:]], dim=1)
        span = image.shape[1] + (1 if model.config.add_time_embeds else 0)
        spans = torch.tensor([[[start, span]]], device=embeds.device)
        mask = self.checkout.attention.omni_attn_mask_naive(1, embeds.shape[1], spans, embeds.device)
        generated = model.mmu_generate(
            input_embeds=embeds,
            attention_mask=mask.to(embeds.dtype),
            max_new_tokens=tokens,
            top_k=1,
            eos_token=None,
        )
        return torch.stack(generated)
