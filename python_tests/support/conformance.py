"""The conformance fixture: outputs of the unmodified upstream programs on a small random model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

import flashu_ext as fx

DATA = Path(__file__).parents[1] / "data" / "conformance"


class Fixture:
    """One conformance directory: the model, inputs and upstream's outputs."""

    def __init__(self, directory: Path = DATA):
        self.directory = directory
        self.spec: dict[str, Any] = json.loads((directory / "fixture.json").read_text())
        self.t2i = load_file(directory / "t2i.safetensors")
        self.mmu = load_file(directory / "mmu.safetensors")
        self.flashu = load_file(directory / "flashu.safetensors")

    def model(self) -> Any:
        """A fresh dense model with the fixture's weights."""
        m = self.spec["model"]
        config = fx.showo2.Showo2Config(
            llm={
                "hidden_size": m["hidden"],
                "intermediate_size": m["inter"],
                "num_hidden_layers": m["layers"],
                "num_attention_heads": m["heads"],
                "num_key_value_heads": m["kv"],
                "vocab_size": m["vocab"],
                "rope_theta": m["rope_theta"],
                "rms_norm_eps": m["rms_norm_eps"],
                "tie_word_embeddings": m["tie_word_embeddings"],
            },
            vision={
                "hidden_size": m["clip"],
                "intermediate_size": 4 * m["clip"],
                "num_hidden_layers": m["clip_layers"] - 1,
                "num_attention_heads": 4,
            },
            head={
                "hidden_size": m["head_hidden"],
                "intermediate_size": m["head_inter"],
                "num_attention_heads": m["head_heads"],
                "num_key_value_heads": m["head_kv"],
                "head_dim": m["head_dim"],
                "num_layers": m["nd"],
            },
            image_latent_dim=m["image_latent_dim"],
            image_latent_height=m["grid"],
            image_latent_width=m["grid"],
            patch_size=m["patch_size"],
        )
        model = fx.showo2.Showo2(config)
        model.load_state_dict(load_file(self.directory / "model.safetensors"), strict=True)
        return model.eval()

    @property
    def sample_inputs(self) -> dict[str, Any]:
        names = ("noise", "text_tokens", "text_tokens_null", "modality_positions", "modality_positions_null")
        return {
            **{name: self.t2i[name] for name in names},
            "guidance_scale": self.spec["guidance_scale"],
            "time_shifting_factor": self.spec["time_shifting_factor"],
        }

    def flashu_config(self, **overrides: Any) -> fx.FlashUConfig:
        """The settings of FlashU's run."""
        f = self.spec["flashu"]
        settings: dict[str, Any] = {
            "ffn_prune_ratio": f["r_p"],
            "full_network_steps": f["tau"],
            "layer_skip_ratio": f["r_LS"],
            "layer_skip_interval": f["T_LS"],
            "head_cache_interval": f["T_cache"],
            "steps": f["steps"],
            "guidance": [tuple(phase) for phase in f["schedule"]],
        }
        return fx.FlashUConfig.paper(**{**settings, **overrides})

    def flashu_plan(self) -> fx.TaskPlan:
        layers = self.spec["model"]["layers"]
        scores = [self.flashu[f"score.{i}"] for i in range(layers)]
        return fx.TaskPlan.from_scores(generation=scores, ratio=self.spec["flashu"]["r_p"], multiple=64)

    @property
    def answer_inputs(self) -> dict[str, Any]:
        return {
            **{name: self.mmu[name] for name in ("image_latents", "tokens_before_image", "tokens_after_boi")},
            "max_new_tokens": self.spec["mmu"]["max_new_tokens"],
        }


@cache
def public() -> Fixture:
    return Fixture()


def relative(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance of a from b."""
    return float((a.double() - b.double()).norm() / b.double().norm())
