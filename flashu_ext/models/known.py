"""Which modules the kernels compute exactly, and why another one must run as itself or cannot be accelerated.

The accelerated loop never calls some modules; it reimplements them from their weights. That is right only for classes known
here, in instances without hooks, replaced methods or unusual weights.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .adapter import Adapter, AttentionShape, norm_eps
from .int8 import is_int8, why_not_int8
from .lora import LORA, adapters_of, is_lora, remakes_weights
from .stamp import COMPUTED, GLOBAL_HOOKS, called_functions, registered_attention, tracked

__all__ = [
    "EMBEDDING",
    "Known",
    "check_model",
    "epilogue_of",
    "refused_decoder",
    "refused_layer",
    "refused_model",
    "untracked",
    "patch_convolution",
    "why_not_activation",
    "why_not_adapter",
    "why_not_attention_kernel",
    "why_not_chain",
    "why_not_ffn",
    "why_not_linear",
    "why_not_norm",
    "why_not_patches",
    "why_not_time",
    "why_not_vision",
    "why_replaced",
]

_HEAD = ("flashu_ext.models.showo2.head", "models.modules")
_BAGEL = "flashu_ext.models.bagel.layers"
_QWEN2 = ("transformers.models.qwen2.modeling_qwen2", "models.qwen2", "modeling.qwen2.modeling_qwen2")

_LLAMA, _QWEN3, _MISTRAL = ((f"transformers.models.{name}.modeling_{name}",) for name in ("llama", "qwen3", "mistral"))
_FFNS = {"Qwen2MLP": _QWEN2, "LlamaMLP": _LLAMA, "Qwen3MLP": _QWEN3, "MistralMLP": _MISTRAL, "MLP": (*_HEAD, _BAGEL)}
_NORMS = {
    "Qwen2RMSNorm": _QWEN2,
    "LlamaRMSNorm": _LLAMA,
    "Qwen3RMSNorm": _QWEN3,
    "MistralRMSNorm": _MISTRAL,
    "RMSNorm": (*_HEAD, "flashu_ext.models.norms"),
}
_ATTENTIONS = {
    **dict.fromkeys(("Qwen2Attention", "Qwen2SdpaAttention", "Qwen2FlashAttention2"), _QWEN2),
    **dict.fromkeys(("LlamaAttention", "LlamaSdpaAttention", "LlamaFlashAttention2"), _LLAMA),
    **dict.fromkeys(("Attention", "SdpaAttention"), (*_HEAD, _BAGEL)),
    "PackedAttentionMoT": ("modeling.bagel.qwen2_navit",),
    "Qwen3Attention": _QWEN3,
    "MistralAttention": _MISTRAL,
}
_PATCHES = {
    "PatchEmbed": (
        *("flashu_ext.models.showo2.embedders", "models.modules", "flashu_ext.models.janusflow.vision"),
        "timm.layers.patch_embed",
    )
}
_TIMES = {"TimestepEmbedder": ("flashu_ext.models.embedding", "models.modules", "modeling.bagel.modeling_utils")}
_SIGLIP = ("transformers.models.siglip.modeling_siglip", "models.modeling_siglip", "modeling.bagel.siglip_navit")
_VISION = {"SiglipEncoder": _SIGLIP}
_VISION_LAYERS = {"SiglipEncoderLayer": _SIGLIP}
_VISION_ATTENTIONS = dict.fromkeys(("SiglipAttention", "SiglipSdpaAttention", "SiglipFlashAttention2"), _SIGLIP)
_VISION_MLPS = {"SiglipMLP": _SIGLIP}
EMBEDDING = {"Embedding": ("torch.nn.modules.sparse",)}
_LINEAR = {"Linear": ("torch.nn.modules.linear",)}
_DROPOUT = {"Dropout": ("torch.nn.modules.dropout",), "Identity": ("torch.nn.modules.linear",)}
_LAYER_NORM = {"LayerNorm": ("torch.nn.modules.normalization", "models.modeling_siglip")}
_CONVOLUTION = {"Conv2d": ("torch.nn.modules.conv",)}
_CHAIN = {"Sequential": ("torch.nn.modules.container",)}
_TORCH_ACTIVATION, _ACTIVATION = ("torch.nn.modules.activation",), ("transformers.activations",)
_SILU = {"SiLU": _TORCH_ACTIVATION, "SiLUActivation": _ACTIVATION}
_GELU = {
    "GELU": _TORCH_ACTIVATION,
    **dict.fromkeys(("GELUActivation", "GELUTanh", "PytorchGELUTanh"), _ACTIVATION),
}
"""Class name -> modules that define it; upstream's are matched by the end of their path."""

Known = Mapping[str, tuple[str, ...]]

_ATTENTION_FUNCTIONS = (None, "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Transformers' own, which compute the same."""

_LIBRARIES = ("torch", "transformers", "diffusers", "einops", "timm", "flash_attn", "flashu_ext")
"""Packages that decorate methods of known classes, or whose functions these call by name: upstream's model registers the
arguments of its `__init__` by diffusers, and rearranges tensors by einops."""

_SISTERS = {"modeling": ("data",)}
"""Upstream package -> others of the same program, whose functions its classes call."""

_CALLING = ("__call__", "_call_impl")
"""Methods that lead from a call of a module to its forward."""

_INNER = ("forward_inference",)
"""Methods that BAGEL's own forwards lead to."""

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Of rotary embeddings whose frequencies do not depend on the sequence's length; upstream's length is not the runtime's."""


def why_unknown(module: Any, known: Known, method: str = "forward") -> str | None:
    """Why a module's class may compute something else than those known, or None."""
    kind: Any = type(module)
    homes = known.get(kind.__name__)
    if homes is None or not any(kind.__module__ == home or kind.__module__.endswith(f".{home}") for home in homes):
        return f"is a {kind.__module__}.{kind.__qualname__}"
    for name in (method, *_CALLING, *(each for each in _INNER if hasattr(kind, each))):
        inherited = name in _CALLING and getattr(kind, name) is getattr(nn.Module, name)
        if _replaced_in_class(nn.Module if inherited else kind, name):
            return f"its class's {name} is replaced"
    return None


@functools.cache
def _replaced_in_class(kind: Any, method: str) -> bool:
    """Whether a method's code, or that of a function which it calls by its name in the module, such as the one that rotates
    queries and keys, comes from elsewhere than the class's own package or `_LIBRARIES`."""
    function, home = getattr(kind, method), _file_of(kind.__module__)
    libraries = tuple(f"{Path(file).parent}/" for name in _LIBRARIES if (file := _file_of(name)) is not None)
    while (code := getattr(function, "__code__", None)) is not None and code.co_filename != home:
        if not code.co_filename.startswith(libraries):
            return True
        if not hasattr(function, "__wrapped__"):
            break
        function = function.__wrapped__
    if code is None or home is None:
        return True
    root = kind.__module__.partition(".")[0]
    packages = [file for name in (root, *_SISTERS.get(root, ())) if (file := _file_of(name)) is not None] or [home]
    homes = (*libraries, *(f"{Path(file).parent}/" for file in packages))
    called = [namespace[name] for namespace, name in called_functions(function)]
    return any(not _undecorated(each).__code__.co_filename.startswith(homes) for each in called)


def _undecorated(function: Any) -> Any:
    """A function under the decorators of the standard library that make context managers."""
    while hasattr(function, "__wrapped__") and function.__code__.co_filename == contextlib.__file__:
        function = function.__wrapped__
    return function


def _file_of(module: str) -> str | None:
    return getattr(sys.modules.get(module), "__file__", None)


def _methods(kind: type) -> list[str]:
    """The methods that a model's class defines itself."""
    return [name for name, value in vars(kind).items() if inspect.isfunction(value)]


def _replaced_methods(module: Any, own: Sequence[str] = ()) -> list[str]:
    """Methods of the class that an attribute of the instance hides. Of private ones those that compute: others save and load.

    Args:
        own: methods that this library has replaced itself.
    """
    kind, computing = type(module), ("_call_impl", "_conv_forward")
    own = (*own, "extra_repr")  # a quantizer's, which only prints
    if _placed(module):
        own = (*own, "forward", "to", "cuda")
    return [
        name
        for name, value in vars(module).items()
        if (not name.startswith("_") or name in computing)
        and name not in own
        and callable(getattr(kind, name, None))
        and not _is_own(module, name, value)
    ]


def _is_own(module: Any, name: str, value: Any) -> bool:
    """Whether an attribute is the class's method bound to this module, as accelerate leaves it when its hooks are removed."""
    return getattr(value, "__self__", None) is module and getattr(value, "__func__", None) is getattr(
        type(module), name
    )


def _placed(module: Any) -> bool:
    """Whether accelerate's hook (`load_checkpoint_and_dispatch`) replaces a module's forward and only moves its inputs to the
    device where its weights lie, as the runtime does."""
    hook: Any = getattr(module, "_hf_hook", None)
    forward = getattr(module, "_old_forward", None)
    if type(hook).__name__ != "AlignDevicesHook" or not type(hook).__module__.startswith("accelerate."):
        return False
    wrapped = getattr(vars(module).get("forward"), "__wrapped__", None)
    if hook.offload or wrapped != forward or not _is_own(module, "forward", forward):
        return False
    place = hook.execution_device
    place = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    devices = {weight.device for weight in module.parameters()}
    return all(each.type == place.type and each.index in (place.index, place.index or 0) for each in devices)


def why_replaced(module: Any, known: Known, own: Sequence[str] = ()) -> str | None:
    """Why calling `module` may compute something else than a known class does, or None. own: see `_replaced_methods`."""
    reason = why_unknown(module, known)
    if reason is not None:
        return reason
    if names := _replaced_methods(module, own):
        return f"its {names[0]} is replaced"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "is compiled in place, by a backend that may compute something else"
    return why_hooked(module)


def why_hooked(module: Any) -> str | None:
    """Why a module's hooks may change its result, or None."""
    if module._forward_hooks:
        return "has a forward hook"
    return "has a forward pre-hook" if module._forward_pre_hooks else None


def why_not_weight(weight: Any, shape: tuple[int, ...], like: Tensor) -> str | None:
    """Why a kernel cannot read this weight, or None."""
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if tuple(weight.shape) != shape:
        return f"its weight is {list(weight.shape)}, expected {list(shape)}"
    if weight.dtype != like.dtype:
        return f"its weight is {weight.dtype}, the model's {like.dtype}"
    if weight.device != like.device:
        return f"its weight is on {weight.device}, the model's on {like.device}"
    if weight.layout != torch.strided or not weight.is_contiguous():
        return "its weight is not contiguous"
    return None


def why_not_ffn(ffn: Any, like: Tensor, own: Sequence[str] = (), adapter: str | None = None) -> str | None:
    """Why the FFN kernel does not compute this module, or None.

    Args:
        like: a weight of the model, for dtype and device.
        own: methods of the module that this library has replaced itself.
        adapter: see `why_not_linear`.
    """
    reason = why_replaced(ffn, _FFNS, own)
    if reason is not None:
        return reason
    activation = getattr(ffn, "act_fn", None)
    if activation is not None and (reason := why_replaced(activation, _SILU)):
        return f"act_fn {reason}"
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(ffn, name)
        reason = why_not_linear(linear, like, adapter) or ("has a bias" if linear.bias is not None else None)
        if reason is not None:
            return f"{name} {reason}"
    if len({is_int8(linear.weight) for linear in (ffn.gate_proj, ffn.up_proj, ffn.down_proj)}) > 1:
        return "some of its weights are int8, others are not"
    return None


def why_not_norm(norm: Any, like: Tensor) -> str | None:
    """Why the norm kernels do not compute this module, or None."""
    return why_replaced(norm, _NORMS) or why_not_weight(norm.weight, tuple(norm.weight.shape), like)


def why_not_linear(linear: Any, like: Tensor, adapter: str | None = None) -> str | None:
    """Why the kernel does not compute this linear layer, or None. adapter: of its LoRA adapters the one beside it, whichever is
    active; None: those that are active."""
    if is_lora(linear):
        return _why_not_lora(linear, like, adapter)
    if reason := why_replaced(linear, _LINEAR):
        return reason
    why_not = why_not_int8 if is_int8(linear.weight) else why_not_weight
    return why_not(linear.weight, (linear.out_features, linear.in_features), like) or _why_not_bias(linear, like)


def _why_not_lora(module: Any, like: Tensor, adapter: str | None) -> str | None:
    """Why a LoRA layer's base and the low-rank products beside it are not all that it computes, or None."""
    if reason := why_replaced(module, LORA):
        return reason
    if is_lora(module.base_layer):
        return "its base_layer has LoRA adapters too"
    if reason := why_not_linear(module.base_layer, like):
        return f"base_layer {reason}"
    if is_int8(module.base_layer.weight):
        return "base_layer's weight is int8"
    if adapter is None and module.disable_adapters and module.merged_adapters:
        return "its adapters are merged and disabled, which its next call undoes"
    if not getattr(module, "cast_input_dtype_enabled", True):
        return "its adapters do not cast their input"
    for name in adapters_of(module, adapter):
        if reason := why_not_adapter(module, name, like):
            return f"its adapter {name!r} {reason}"
    return None


def why_not_adapter(module: Any, name: str, like: Tensor) -> str | None:
    """Why an adapter of a LoRA layer is no plain low-rank update, or None."""
    variant = getattr(module, "lora_variant", {}).get(name)
    if variant is not None:
        return f"is of another kind, {type(variant).__name__}"
    if getattr(module, "use_dora", {}).get(name):
        return "is of another kind, DoRA"
    if not isinstance(module.scaling[name], (int, float)):
        return f"is scaled by a {type(module.scaling[name]).__name__}"
    dropout = module.lora_dropout[name] if name in module.lora_dropout else None
    if dropout is not None and (reason := why_replaced(dropout, _DROPOUT)):
        return f"has a dropout that {reason}"
    if dropout is not None and dropout.training and getattr(dropout, "p", 0.0) > 0:
        return "is in train mode with dropout; call model.eval()"
    down, up = module.lora_A[name], module.lora_B[name]
    for part, linear, shape in (
        ("A", down, (up.in_features, module.in_features)),
        ("B", up, (module.out_features, up.in_features)),
    ):
        own = linear.weight if linear.weight.dtype in (torch.float32, torch.bfloat16, torch.float16) else like
        reason = why_replaced(linear, _LINEAR) or ("has a bias" if linear.bias is not None else None)
        reason = reason or why_not_weight(linear.weight, shape, own)
        reason = reason or ("its weight is on another device" if linear.weight.device != like.device else None)
        if reason is not None:
            return f"has a {part} that {reason}"
    return None if up.weight.dtype == down.weight.dtype else "has an A and a B of two dtypes"


def _why_not_bias(module: Any, like: Tensor) -> str | None:
    bias = module.bias
    if bias is None:
        return None
    reason = why_not_weight(bias, tuple(module.weight.shape[:1]), like)
    return reason and reason.replace("its weight", "its bias")


def why_not_activation(module: Any) -> str:
    """Why a module is not an activation of the kernels (`epilogue_of` gives None)."""
    reasons = [why_replaced(module, known) for known in (_SILU, _GELU)]
    known = [reason for reason in reasons if reason is None or not reason.startswith("is a ")]
    return (known[0] if known else reasons[0]) or "torch.nn.functional.gelu is replaced, or its own function is another"


def epilogue_of(activation: Any) -> str | None:
    """The epilogue of `ops.linear` that computes an activation, or None."""
    if why_replaced(activation, _SILU) is None:
        return "silu"
    if why_replaced(activation, _GELU) is not None or not _is_torch_s("gelu"):
        return None
    if type(activation).__name__ == "GELU":
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if getattr(activation, "act", nn.functional.gelu) is nn.functional.gelu:
        return "gelu" if type(activation).__name__ == "GELUActivation" else "gelu_tanh"
    act = activation.act
    plain = isinstance(act, functools.partial) and act.func is nn.functional.gelu and not act.args
    return "gelu_tanh" if plain and act.keywords == {"approximate": "tanh"} else None


def _is_torch_s(function: str) -> bool:
    """Whether nobody has replaced a function of torch.nn.functional, before this library was loaded or after. Where one of
    `COMPUTED` is replaced, no model is accelerated; where another is, the modules that call it run as themselves."""
    found = getattr(nn.functional, function)
    code = getattr(found, "__code__", None)
    if code is not None:
        return bool(code.co_filename == nn.functional.__file__ and code.co_name == function)
    return found is getattr(torch._C._nn, function, None) or found is getattr(torch, function, None)


def why_not_attention_kernel() -> str | None:
    """Why attention runs torch's function: another library's is in its place, which users want; or None."""
    name = "scaled_dot_product_attention"
    return None if _is_torch_s(name) else f"torch.nn.functional.{name} is replaced"


def why_not_chain(module: Any) -> str | None:
    """Why a Sequential is called as it is, or None. Its layers may be anything."""
    return why_replaced(module, _CHAIN)


def patch_convolution(embedder: Any) -> Any:
    """The convolution of a patch embedding, which may be one itself."""
    return getattr(embedder, "proj", embedder)


def why_not_patches(embedder: Any, like: Tensor) -> str | None:
    """Why the kernel does not compute a patch embedding, or None."""
    convolution, norm = patch_convolution(embedder), getattr(embedder, "norm", None)
    if convolution is not embedder and (reason := why_replaced(embedder, _PATCHES)):
        return reason
    if reason := why_replaced(convolution, _CONVOLUTION) or why_unknown(convolution, _CONVOLUTION, "_conv_forward"):
        return reason if convolution is embedder else f"proj {reason}"
    if not _is_torch_s("conv2d"):
        return "torch.nn.functional.conv2d is replaced"
    if norm is not None and (type(norm) is not nn.Identity or why_hooked(norm)):
        return "has a norm"
    if not getattr(embedder, "flatten", True):
        return "does not flatten"
    plain = convolution.padding in ((0, 0), "valid") and convolution.dilation == (1, 1) and convolution.groups == 1
    if convolution.kernel_size != convolution.stride or not plain:
        return "proj is not a convolution of patches side by side"
    shape = (convolution.out_channels, convolution.in_channels, *convolution.kernel_size)
    return why_not_weight(convolution.weight, shape, like) or _why_not_bias(convolution, like)


def why_not_time(embedder: Any) -> str | None:
    """Why a time embedding is called as it is, or None."""
    if reason := why_replaced(embedder, _TIMES) or why_not_chain(embedder.mlp):
        return reason
    width = getattr(embedder.mlp[0], "in_features", 1)
    if "timestep_embedding" in vars(embedder) or getattr(embedder, "frequency_embedding_size", width) != width:
        return "its sinusoids are others"
    return "has sinusoids of odd width" if width % 2 else None


def why_not_vision(encoder: Any) -> str | None:
    """Why the image encoder is called as it is, or None. Its linear layers may be anything."""
    if reason := why_replaced(encoder, _VISION):
        return reason
    if not _is_torch_s("layer_norm"):
        return "torch.nn.functional.layer_norm is replaced"
    for index, layer in enumerate(encoder.layers):
        if reason := _why_not_vision_layer(layer):
            return f"layers.{index}{reason}"
    return None


def _why_not_vision_layer(layer: Any) -> str | None:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    for name, module, known in (
        ("", layer, _VISION_LAYERS),
        (".self_attn", attention, _VISION_ATTENTIONS),
        (".mlp", mlp, _VISION_MLPS),
    ):
        if reason := why_replaced(module, known):
            return f"{name} {reason}"
    assert attention is not None and mlp is not None
    if reason := _why_other_function(attention):
        return f".self_attn {reason}"
    for name in ("layer_norm1", "layer_norm2"):
        if reason := why_replaced(getattr(layer, name), _LAYER_NORM):
            return f".{name} {reason}"
    if abs(attention.scale * attention.head_dim**0.5 - 1) > 1e-9 or getattr(attention, "is_causal", False):
        return ".self_attn is scaled or masked in another way"
    if attention.num_heads * attention.head_dim != attention.embed_dim:
        return ".self_attn has heads that are not its width"
    if attention.training and attention.dropout:
        return f".self_attn is in train mode with dropout {attention.dropout}"
    if epilogue_of(mlp.activation_fn) is None:
        return f".mlp has the activation {type(mlp.activation_fn).__qualname__}"
    return None


def why_not_attention(attention: Any, shape: AttentionShape, like: Tensor) -> str | None:
    """Why the attention passes do not compute this module around its projections, or None."""
    reason = why_replaced(attention, _ATTENTIONS)
    if reason is not None:
        return reason
    scaling = getattr(attention, "scaling", None)
    if scaling is not None and abs(scaling * shape.head_dim**0.5 - 1) > 1e-9:
        return f"its scaling is {scaling}, expected 1 / sqrt({shape.head_dim})"
    heads = {"num_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim}
    own = {**heads, "num_key_value_groups": shape.heads // shape.kv_heads}
    for name, asked in own.items():
        if getattr(attention, name, asked) != asked:
            return f"its {name} is {getattr(attention, name)}, expected {asked}, as its weights have"
    if reason := _why_other_function(attention):
        return reason
    if getattr(attention, "sliding_window", None) is not None:
        return "has a sliding window"
    dropout = getattr(attention, "attention_dropout", 0.0)
    if attention.training and dropout:
        return f"is in train mode with attention dropout {dropout}; call model.eval()"
    for expert in ("", "_moe_gen"):  # BAGEL's attention has the drawing expert's beside its own
        names = (f"q_norm{expert}", f"k_norm{expert}")
        norms = {name: norm for name in names if (norm := getattr(attention, name, None)) is not None}
        for name, norm in norms.items():
            if reason := why_not_norm(norm, like):
                return f"{name} {reason}"
        if len({norm_eps(norm) for norm in norms.values()}) > 1:
            return f"{' and '.join(names)} have different epsilons"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = getattr(attention, name)
        if type(linear) is nn.Linear and tuple(linear.weight.shape) != (linear.out_features, linear.in_features):
            return f"{name}'s weight is {list(linear.weight.shape)} {linear.weight.dtype}, packed by a quantizer"
    return None


def _why_other_function(attention: Any) -> str | None:
    """Why an attention module may call a function that computes something else, or None."""
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if implementation not in _ATTENTION_FUNCTIONS:
        return f"its attention function is {implementation!r}"
    function = registered_attention().get(implementation)
    if function is not None and not str(getattr(function, "__module__", "")).startswith("transformers."):
        return f"its attention function {implementation!r} is replaced"
    return None


def untracked(model: nn.Module, own: Sequence[str] = ()) -> list[str]:
    """Paths of modules that may depend on more than weights and flags (a hook, an adapter, a replaced method): what was
    computed by them must not be used again in another call, and not be captured in a graph. own: dotted paths of methods that
    this library has replaced itself."""

    def replaced(name: str, module: nn.Module) -> bool:
        return "forward" in _replaced_methods(module) and f"{name}.forward" not in own

    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or replaced(name, module) or not tracked(module)
    ]


def check_model(adapter: Adapter) -> None:
    """Raise TypeError, with its name and the reason, for a module that the accelerated loop would pass over."""
    _replaced_in_class.cache_clear()  # once for the many modules of a class
    for name in GLOBAL_HOOKS:
        # Torch's own hooks, of its counters of modules and operations, change nothing.
        if any(
            not getattr(hook, "__module__", "").startswith("torch.") for hook in getattr(torch_module, name).values()
        ):
            raise TypeError(
                "model: a hook is registered on all modules (register_module_forward_hook); remove it first"
            )
    for name in COMPUTED:
        if not _is_torch_s(name):
            raise TypeError(
                f"model: torch.nn.functional.{name} is replaced, which the kernels compute; put it back first"
            )
    for name, module in adapter.model.named_modules():
        if remakes_weights(module):
            raise TypeError(
                f"model.{name}: its adapter is of peft's target_parameters, which makes weights anew in every call; "
                "merge it first"
            )
    for path, reason in adapter.refused():
        raise TypeError(
            f"model{path}: {reason}; the accelerated loop does not call it, so its result would be lost; undo that, or "
            "do not accelerate this model"
        )


def refused_model(model: Any, known: Known, methods: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What is wrong with the model's own class, instance and hooks. methods: that the runtime takes over."""
    for method in (*methods, *_methods(type(model))):
        if reason := why_unknown(model, known, method):
            yield "", reason
    if reason := why_hooked(model):
        yield "", reason
    for name in _replaced_methods(model):
        if name not in methods:
            yield "", f"its {name} is replaced"


def refused_decoder(path: str, decoder: Any, rope: Any, layers: int) -> Iterator[tuple[str, str]]:
    """What is wrong with the language model at a path: its number of layers, or its rotary embedding."""
    count = getattr(decoder.config, "num_hidden_layers", layers)
    if count != layers:
        yield path, f"its config says {count} layers, and it has {layers}"
    for index, layer in enumerate(decoder.model.layers):
        if getattr(layer.self_attn, "is_causal", True) is False:
            yield f"{path}.model.layers.{index}.self_attn", "its is_causal is False, and answers are causal"
    caches = [getattr(layer.self_attn, "layer_idx", None) for layer in decoder.model.layers]
    for index, cache in enumerate(caches):
        if cache is not None and cache in caches[:index]:
            yield (
                f"{path}.model.layers.{index}",
                f"its keys and values are cached with those of layer {caches.index(cache)}",
            )
    rope_type = getattr(rope, "rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        yield f"{path}.model.rotary_emb", f"its frequencies are of type {rope_type!r}, which depends on the length"


def refused_layer(path: str, layer: Any, shape: AttentionShape, like: Tensor) -> Iterator[tuple[str, str]]:
    """What is wrong with a layer's attention around its projections. like: a weight of the model."""
    if reason := why_not_attention(layer.self_attn, shape, like):
        yield f"{path}.self_attn", reason
    if getattr(layer, "attention_type", "full_attention") != "full_attention":
        yield path, f"its attention is {layer.attention_type}"
