"""Models of transformers, with what its versions do differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..planning.extras import extra
from ..planning.groups import is_real
from ..planning.reading import shown

__all__ = ["fill_tied_head", "is_tied", "language_model", "rope_theta", "siglip_encoder"]


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


def rope_theta(config: Mapping[str, Any]) -> Any:
    """The base as transformers writes it, in either place; 10000 where it is in neither.

    Raises:
        ValueError: it is no number > 0, or the frequencies are scaled, which is not computed here.
    """
    nested = config.get("rope_parameters")
    kind = nested.get("rope_type", "default") if isinstance(nested, dict) else "default"
    for name, value, plain in (("rope_scaling", config.get("rope_scaling"), None), ("rope_type", kind, "default")):
        if value != plain:
            raise ValueError(f"the language model's {name}: expected {plain!r}, got {shown(value)}")
    if "rope_theta" in config or not isinstance(nested, dict):
        return _base(config.get("rope_theta", 10000.0))
    return _base(nested.get("rope_theta", 10000.0))


def _base(value: Any) -> float:
    if not is_real(value):
        raise ValueError(f"the language model's rope_theta: expected a finite number > 0, got {shown(value)}")
    return float(value)


def is_tied(language_model: Any) -> bool:
    """Whether the output head is the token embedding, whatever the config says."""
    head, table = language_model.lm_head.weight, language_model.model.embed_tokens.weight
    return head is table or (head.data_ptr() == table.data_ptr() != 0 and head.shape == table.shape)


def fill_tied_head(model: Any, state: dict[str, Any], prefix: str, *_: Any, language_model: str) -> None:
    """Fill in an output head that is tied to the token embedding and missing in a checkpoint: a hook of `load_state_dict`.

    Args:
        state: what `load_state_dict` is given; names begin with `prefix`.
        language_model: the model's attribute with the language model.

    Raises:
        ValueError: the head is the token embedding in the model, and another one in the checkpoint.
    """
    head, table = (f"{prefix}{language_model}.{name}.weight" for name in ("lm_head", "model.embed_tokens"))
    llm = model.get_submodule(language_model)
    if llm.config.tie_word_embeddings and head not in state and table in state:
        state[head] = state[table]
    elif is_tied(llm) and head in state and table in state:
        given, shared = state[head], state[table]
        if given.shape == shared.shape and not given.is_meta and not bool((given.to(shared.device) == shared).all()):
            raise ValueError(
                f"{head}: expected the values of {table}, the same weight in this model (tie_word_embeddings), got others"
            )
