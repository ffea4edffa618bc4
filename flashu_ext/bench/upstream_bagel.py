"""Drives the unmodified BAGEL classes of a checkout: `bench e2e --family bagel --upstream`.

On a CPU `flash_attn` is SDPA, and the bfloat16 that upstream's inference casts to is float32. Tokenizer, VAE and pictures
are the caller's.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..models.bagel import BagelConfig
from .checkouts import Float32Torch, imported, with_flash_attention
from .families import BagelSubject
from .shapes import Inputs

__all__ = ["UpstreamBagelSubject", "Words", "build", "load"]

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


class Words:
    """Takes the tokenizer's place: a text is its ids, written as numbers."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Tensor) -> str:
        return f"<|im_start|>{' '.join(str(word) for word in ids.tolist())}<|im_end|>"


class UpstreamBagelSubject:
    """Draws and answers as upstream's inferencer does, from the noise and about the image of `own`; may be accelerated."""

    name = "BAGEL (upstream)"
    evaluates_only = False

    def __init__(self, directory: Path, own: BagelSubject):
        self.model: Any = build(directory, own.model.config)
        self.model.load_state_dict(own.model.state_dict(), strict=True)
        self._own, self._ids = own, vars(own.ids)
        self._inferencer = load(directory)[1].InterleaveInferencer(self.model, None, Words(), None, None, self._ids)

    def generate(self, inputs: Inputs, steps: int, guidance: float, shift: float) -> Tensor:
        """Latent tokens. Source: upstream inferencer.py, `interleave_inference` and `gen_image`."""
        run, model, size = self._inferencer, self.model, [self._own.size]
        stack = model.language_model.model
        for part in (stack, *stack.layers):  # upstream leaves it on, and the next prompt would be extrapolated
            if getattr(part, "enable_taylorseer", False):
                part.enable_taylorseer = False
        context = run.init_gen_context()
        without_text, without_image = copy.deepcopy(context), copy.deepcopy(context)
        prompt = " ".join(str(word) for word in self._own.prompt[0].ids.tolist())
        context = run.update_context_text(prompt, context)
        without_image = run.update_context_text(prompt, without_image)
        arguments = model.prepare_vae_latent(context["kv_lens"], context["ropes"], size, self._ids)
        arguments |= {"packed_init_noises": self._own.noise, "past_key_values": context["past_key_values"]}
        for name, other in (("text", without_text), ("img", without_image)):
            prepared = model.prepare_vae_latent_cfg(other["kv_lens"], other["ropes"], size)
            arguments |= {key.replace("cfg_", f"cfg_{name}_"): value for key, value in prepared.items()}
            arguments[f"cfg_{name}_past_key_values"] = other["past_key_values"]
        text, image, extrapolates = self._own.drawing
        arguments |= {"cfg_text_scale": text, "cfg_img_scale": image, "cfg_interval": (0.4, 1.0)}
        arguments |= {"num_timesteps": steps, "timestep_shift": shift, "enable_taylorseer": extrapolates}
        drawn: Tensor = model.generate_image(**arguments)[0]
        return drawn

    def answer(self, inputs: Inputs, tokens: int) -> Tensor:
        """Greedy words [tokens]. Source: upstream inferencer.py, `gen_text`."""
        run, model, (image, text) = self._inferencer, self.model, self._own.question
        side, patch = model.vit_max_num_patch_per_side, model.vit_patch_size
        assert image.vit_tokens is not None, "it is asked about"
        grid = image.vit_tokens.reshape(side, side, patch, patch, 3)
        pixels = grid.permute(4, 0, 2, 1, 3).reshape(3, side * patch, side * patch)
        run.vit_transform = lambda image: image
        context = run.update_context_image(pixels, run.init_gen_context(), vae=False)
        context = run.update_context_text(" ".join(str(word) for word in text.ids.tolist()), context)
        prepared = model.prepare_start_tokens(context["kv_lens"], context["ropes"], self._ids)
        words: Tensor = model.generate_text(context["past_key_values"], max_length=tokens + 1, **prepared)
        return words[1:, 0]
