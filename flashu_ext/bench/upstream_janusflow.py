"""Drives the unmodified JanusFlow class of a checkout by its demo's own loop: `bench e2e --family janusflow --upstream`.

The sizes that upstream writes as numbers are replaced: modules of them are built anew from upstream's classes, a size is added to
the SigLIP table, and the loop's numbers are replaced on its syntax tree. On a CPU its bfloat16 is float32, and `cuda()` does
nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.janusflow import JanusFlowConfig
from .checkouts import Float32Torch, declare_operators, imported
from .families import JanusFlowSubject
from .shapes import Inputs

__all__ = ["UpstreamJanusFlowSubject", "build", "drawing_loop", "load"]

_FILES = ("janus/janusflow/models/modeling_vlm.py", "demo/app_janusflow.py")
_NAME = "siglip_of_another_size"


def load(directory: Path) -> tuple[ModuleType, ModuleType]:
    """The checkout's `modeling_vlm` and `siglip_vit`.

    Raises:
        ValueError: the folder is not such a checkout. ImportError: something it needs is not installed.
    """
    declare_operators()
    needs = "transformers 4.38.2 or later, diffusers, timm, einops, attrdict and torchvision"
    names = ("janus", "janus.janusflow.models.modeling_vlm", "janus.janusflow.models.siglip_vit")
    _, modeling, siglip = imported(directory, "Janus", needs, _FILES, names)
    return modeling, siglip


def build(directory: Path, config: JanusFlowConfig) -> nn.Module:
    """Upstream's `MultiModalityCausalLM` of these sizes, with its constructors' random weights, in fp32."""
    loaded: Any = load(directory)
    modeling, siglip = loaded
    siglip.SigLIP_MODEL_CONFIG[_NAME] = {
        "image_size": config.image_size,
        "patch_size": config.vit_patch,
        "width": config.vit,
        "layers": config.vit_layers,
        "heads": config.vit_heads,
        "mlp_ratio": config.vit_ratio,
        "global_pool": "map",
        "use_checkpoint": False,
    }
    blocks = {
        "block_out_channels": [config.channels],
        "layers_in_middle": config.blocks,
        "hidden_size": config.hidden,
        "norm_eps": config.uvit_norm_eps,
        "use_mid_block": True,
    }
    ends = {"input_channels": config.latent_channels, "kernel_size": 2, "stride": 2, "padding": 0}
    llm = {
        "hidden_size": config.hidden,
        "intermediate_size": config.inter,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv,
        "vocab_size": config.vocab,
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": 2048,
        "eos_token_id": None,
    }
    out = {"in_channels": config.channels, "out_channels": config.latent_channels, "upsamples": 1}
    seen = {"model_name": _NAME, "image_size": config.image_size, "select_layer": -1, "select_feature": "same"}
    whole = modeling.MultiModalityConfig(
        language_config=llm,
        vision_und_enc_config={"cls": "CLIPVisionTower", "params": seen},
        vision_gen_enc_config={"cls": "ShallowUViTEncoder", "params": ends | blocks},
        vision_gen_dec_config={"cls": "ShallowUViTDecoder", "params": out | blocks},
    )
    model = modeling.MultiModalityCausalLM(whole)
    model.vision_und_enc_aligner = nn.Linear(config.vit, config.hidden)
    model.beg_of_und_embed = nn.Parameter(torch.zeros(1, config.hidden))
    model.vision_gen_enc_aligner = nn.Linear(config.channels, config.hidden)
    model.vision_gen_dec_aligner_norm = modeling.LlamaRMSNorm(config.hidden, eps=config.eps)
    model.vision_gen_dec_aligner = nn.Linear(config.hidden, config.channels)
    built: nn.Module = model.eval()
    return built


class _Numbers(ast.NodeTransformer):
    """Replaces integers."""

    def __init__(self, numbers: dict[int, int]):
        self.numbers = numbers

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        known = type(node.value) is int and node.value in self.numbers
        return ast.copy_location(ast.Constant(self.numbers[node.value]), node) if known else node  # type: ignore[index]


class _Torch(Float32Torch):
    """`Float32Torch` whose first random numbers are given."""

    noise: Tensor

    def __getattr__(self, name: str) -> Any:
        return (lambda *_, **__: self.noise.clone()) if name == "randn" else super().__getattr__(name)


def drawing_loop(
    directory: Path, model: Any, config: JanusFlowConfig, images: int, change: Callable[[str], str] = lambda text: text
) -> Callable[..., Tensor]:
    """The demo's `generate` for so many images of these sizes: (noise, tokens int64 [n], steps, guidance, pad_token) -> latents.

    Args:
        change: of the function's text.
    """
    tree = ast.parse((directory / "demo" / "app_janusflow.py").read_text(encoding="utf-8"))
    (function,) = (each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == "generate")
    patches = config.grid**2
    numbers = {5: images, 10: 2 * images, 48: 2 * config.grid, 24: config.grid, 576: patches, 577: patches + 1}
    function = _Numbers(numbers | {768: config.channels}).visit(function)
    text = change(ast.unparse(ast.fix_missing_locations(function)))
    decoded: list[Tensor] = []

    def decode(latents: Tensor) -> Any:
        decoded.append(latents.clone())  # the demo clips what it gets in place
        return SimpleNamespace(sample=latents[:, :3])

    names: dict[str, Any] = {"np": np, "print": lambda *_: None, "vl_gpt": model, "torch": _Torch()}
    names["vae"] = SimpleNamespace(decode=decode, config=SimpleNamespace(scaling_factor=1.0))
    names["vl_chat_processor"] = SimpleNamespace(pad_id=0)
    exec(compile(text, "app_janusflow.py", "exec"), names)

    def run(noise: Tensor, tokens: Tensor, steps: int, guidance: float, pad_token: int = 0) -> Tensor:
        names["torch"].noise, names["vl_chat_processor"].pad_id = noise, pad_token
        cuda = Tensor.cuda
        if not torch.cuda.is_available():
            Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
        try:
            names["generate"](tokens, guidance, steps)
        finally:
            Tensor.cuda = cuda  # type: ignore[method-assign]
        return decoded.pop()

    return run


class UpstreamJanusFlowSubject:
    """Draws by the demo's loop and answers as the demo does; may be accelerated."""

    name = "JanusFlow (upstream)"
    evaluates_only = True

    def __init__(self, directory: Path, own: JanusFlowSubject):
        config = own.model.config
        self.model: Any = build(directory, config)
        missing, unknown = self.model.load_state_dict(own.model.state_dict(), strict=False)
        assert not unknown and not [name for name in missing if "attn_pool" not in name], (missing, unknown)
        self._own, self._loop = own, drawing_loop(directory, self.model, config, 1)

    def generate(self, inputs: Inputs, steps: int, guidance: float, shift: float) -> Tensor:
        return self._loop(self._own.noise, self._own.prompt, steps - 1, guidance)

    @torch.inference_mode()
    def answer(self, inputs: Inputs, tokens: int) -> Tensor:
        """Greedy words [tokens]. Source: upstream demo/app_janusflow.py, `multimodal_understanding`."""
        model, ids = self.model, self._own.question
        image = (ids == 4) | (ids == 5)
        embeds = model.prepare_inputs_embeds(
            input_ids=ids.clone(),
            pixel_values=self._own.pixels[None],
            images_seq_mask=image,
            images_emb_mask=torch.ones(1, 1, int(image.sum()), dtype=torch.bool),
        )
        words: Tensor = model.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(ids),
            pad_token_id=0,
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
        )
        return words[0].clone()
