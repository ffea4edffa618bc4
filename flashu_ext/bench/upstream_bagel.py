"""Drives the unmodified BAGEL classes of a checkout: `bench e2e --family bagel --upstream`.

On a CPU `flash_attn` is SDPA, and the bfloat16 that upstream's inference casts to is float32. Tokenizer, VAE and pictures
are the caller's.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..models.bagel import BagelConfig
from .checkouts import Float32Torch, imported, with_flash_attention

__all__ = ["build", "load"]

_FILES = ("inferencer.py", "modeling/bagel/bagel.py", "modeling/bagel/qwen2_navit.py")


def load(directory: Path) -> tuple[ModuleType, ModuleType]:
    """The checkout's `modeling.bagel` and `inferencer`.

    Raises:
        ValueError: the folder is not such a checkout. ImportError: something it needs is not installed.
    """
    with with_flash_attention():
        needs = "transformers 4.49, einops, accelerate and pillow"
        names = ("modeling.bagel", "inferencer", "modeling.bagel.qwen2_navit", "modeling.bagel.siglip_navit")
        bagel, inferencer, *cast = imported(directory, "BAGEL", needs, _FILES, names)
    for each in cast:
        vars(each)["torch"] = Float32Torch()
    return bagel, inferencer


def build(directory: Path, config: BagelConfig) -> nn.Module:
    """Upstream's `Bagel` of these sizes, as its app.py makes one, with its constructors' random weights, in fp32."""
    upstream: Any = load(directory)[0]
    llm = upstream.Qwen2Config(
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=config.inter,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv,
        rms_norm_eps=config.eps,
        rope_theta=config.rope_theta,
        max_position_embeddings=32768,
    )
    llm.qk_norm, llm.tie_word_embeddings, llm.layer_module = True, False, "Qwen2MoTDecoderLayer"
    vit = upstream.SiglipVisionConfig(
        hidden_size=config.vit,
        intermediate_size=config.vit_inter,
        num_hidden_layers=config.vit_layers_kept,
        num_attention_heads=config.vit_heads,
        image_size=config.vit_side * config.vit_patch,
        patch_size=config.vit_patch,
        layer_norm_eps=config.vit_eps,
    )
    vit.rope = False
    vae: Any = type("VaeConfig", (), {"downsample": config.vae_downsample, "z_channels": config.latent_channels})()
    whole = upstream.BagelConfig(
        visual_gen=True,
        visual_und=True,
        llm_config=llm,
        vit_config=vit,
        vae_config=vae,
        vit_max_num_patch_per_side=config.vit_side,
        connector_act="gelu_pytorch_tanh",
        latent_patch_size=config.latent_patch,
        max_latent_size=config.latent_side,
    )
    model = upstream.Bagel(upstream.Qwen2ForCausalLM(llm), upstream.SiglipVisionModel(vit), whole)
    model.vit_model.vision_model.embeddings.convert_conv2d_to_linear(vit)
    built: nn.Module = model.eval()
    return built
