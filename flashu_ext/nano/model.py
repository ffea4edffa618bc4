"""The embedded model's shape, and loading what is shipped."""

from __future__ import annotations

from pathlib import Path

import torch

from ..models.showo2.config import Showo2Config
from ..models.showo2.model import Showo2
from ..planning.config import FlashUConfig
from ..planning.plan import TaskPlan
from .codec import CHANNELS, GRID
from .tokenizer import vocabulary

__all__ = ["DATA", "PRUNE_MULTIPLE", "load_model", "load_plan", "nano_config"]

DATA = Path(__file__).parent / "data"
PRUNE_MULTIPLE = 16
"""The FFNs are small, so kept neurons are counted in 16s here."""


def nano_config() -> Showo2Config:
    """Show-o2's architecture at about 2.7 M parameters; 36 image tokens and a time token."""
    return Showo2Config(
        llm={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(vocabulary()),
            "max_position_embeddings": 256,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        },
        vision={"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
        head={
            "hidden_size": 160,
            "intermediate_size": 480,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "head_dim": 32,
            "num_layers": 3,
        },
        image_latent_dim=CHANNELS,
        image_latent_height=GRID * GRID,
        image_latent_width=1,
    )


def load_model(directory: Path = DATA) -> Showo2:
    """The trained model, fp32, in eval mode.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    if not (directory / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{directory}: model.safetensors is missing; train it with python -m flashu_ext.nano.train"
        )
    return Showo2.from_pretrained(directory, torch.float32)


def load_plan(model: Showo2, directory: Path = DATA, config: FlashUConfig | None = None) -> TaskPlan:
    """The shipped task plan, pruned as `config` says (default: as `FlashUConfig.paper(prune_multiple=PRUNE_MULTIPLE)` does)."""
    plan = TaskPlan.load(directory / "plan.safetensors", model=model)
    return plan if config is None else plan.with_ratio(config.ffn_prune_ratio, config.prune_multiple)
