"""Models of transformers, with what its versions do differently."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..planning.extras import extra

__all__ = ["language_model", "siglip_encoder"]


def language_model(kind: str, fields: dict[str, Any]) -> nn.Module:
    """A `{kind}ForCausalLM` with attention by SDPA. fields: of its config."""
    with extra("showo2"):
        import transformers

        config: Any = getattr(transformers, f"{kind}Config")(**fields)
        if "rope_theta" in fields and getattr(config, "rope_parameters", None) is not None:
            # transformers 5 moved the base here, and its loader does not always convert the plain field.
            config.rope_parameters["rope_theta"] = fields["rope_theta"]
        config._attn_implementation = "sdpa"
        model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model


def siglip_encoder(fields: dict[str, Any]) -> nn.Module:
    """A `SiglipEncoder` with attention by SDPA. fields: of its config."""
    with extra("showo2"):
        from transformers import SiglipVisionConfig
        from transformers.models.siglip.modeling_siglip import SiglipEncoder

    config: Any = SiglipVisionConfig(**fields)
    config._attn_implementation = "sdpa"
    return SiglipEncoder(config)
