"""Loads LoRA adapters of peft from folders, as its `save_pretrained` writes them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..planning.extras import extra
from ..planning.reading import read_text, refusal, shown, strict_json
from ..planning.safe_files import load_safetensors
from .known import why_not_linear
from .lora import BASE, adapter_names, base_of, is_lora

__all__ = ["AdapterFiles", "add_adapter", "check_adapter_name", "read_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_READ = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""What sizes and scales the updates. All other settings are looked at only so that an adapter of another kind is refused."""

_WITHOUT_EFFECT = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "peft_type",
        "peft_version",
        "task_type",
        "inference_mode",
    ),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config", "lora_dropout"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying", "fan_in_fan_out", "bias", *_READ),
}
"""On a finished adapter of linear layers, whose file says which they are; or checked below."""

_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Of `init_lora_weights`: those that leave the model's own weights as they are."""

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<part>[AB])\.weight")


@dataclass(frozen=True)
class AdapterFiles:
    """What a folder holds, checked as far as it can be without a model."""

    folder: Path
    settings: Mapping[str, Any]
    """Arguments of peft's LoraConfig."""
    targets: tuple[str, ...]
    """Ends of the names of modules, where the config lists them."""
    weights: Mapping[str, tuple[Tensor, Tensor]]
    """Path of a linear layer -> A [r, in] and B [out, r]."""


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFiles:
    """Read a folder. No other file of it is opened: a pickle is refused by name.

    Raises:
        ValueError: a file is damaged, or the adapter is no plain LoRA of linear layers; the message names file and setting.
        OSError: there is no such folder or file, or it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r}: expected a folder with {CONFIG} and {WEIGHTS}")
    if not (folder / WEIGHTS).exists() and (pickles := [*folder.glob("adapter_model.bin*")]):
        raise refusal(pickles[0], f"expected {WEIGHTS}, got a pickle, which is never read")
    path = folder / CONFIG
    config = strict_json(read_text(path), str(path))
    try:
        settings, targets = _settings(config)
    except ValueError as error:
        raise refusal(path, error) from error
    tensors, _ = load_safetensors(folder / WEIGHTS)
    try:
        return AdapterFiles(folder, settings, targets, _weights(tensors))
    except ValueError as error:
        raise refusal(folder / WEIGHTS, error) from error


def _settings(config: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    if not isinstance(config, dict):
        raise ValueError(f"expected a JSON object, got {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type: expected 'LORA', got {shown(config.get('peft_type'))}")
    for name, value in config.items():
        if value and name not in _WITHOUT_EFFECT:
            raise ValueError(f"{name}: expected none, as of a plain LoRA adapter, got {shown(value)}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"bias: expected 'none', got {shown(config['bias'])}")
    if (begun := config.get("init_lora_weights", True)) not in _BEGINNINGS:
        raise ValueError(f"init_lora_weights: expected one that leaves the model's weights alone, got {shown(begun)}")
    settings = {name: config[name] for name in _READ if config.get(name) is not None}
    for name, kinds in (("r", (int,)), ("lora_alpha", (int, float)), ("use_rslora", (bool,))):
        value = settings.get(name, kinds[0](1))
        if not isinstance(value, kinds) or isinstance(value, bool) != (kinds == (bool,)) or (name == "r" and value < 1):
            raise ValueError(f"{name}: expected a {kinds[-1].__name__}{' >= 1' * (name == 'r')}, got {shown(value)}")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(name, {})
        plain = isinstance(patterns, dict) and all(isinstance(each, (int, float)) for each in patterns.values())
        if not plain:
            raise ValueError(f"{name}: expected numbers by module, got {shown(patterns)}")
    targets = config.get("target_modules")
    return settings, tuple(map(str, targets)) if isinstance(targets, list) else ()


def _weights(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"{key:.200}: expected lora_A.weight or lora_B.weight of a linear layer")
        parts.setdefault(match["path"], {})[match["part"]] = tensor
    for path, own in parts.items():
        if len(own) < 2:
            raise ValueError(f"{path:.200}: expected lora_A and lora_B, got lora_{next(iter(own))} alone")
    if not parts:
        raise ValueError("expected weights of an adapter, got none")
    return {path: (own["A"], own["B"]) for path, own in parts.items()}


def check_adapter_name(name: Any) -> None:
    """That an adapter may have this name. Raises TypeError or ValueError."""
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")
    if not name or "." in name or name == BASE or not name.isprintable():
        raise ValueError(f"name: expected one without dots and other than {BASE!r}, got {shown(name)}")


def add_adapter(model: nn.Module, name: str, files: AdapterFiles) -> None:
    """Put an adapter beside a model's linear layers, in place. What is active stays active: where nothing was, nothing is.

    Raises:
        ValueError: the name is taken, or the adapter does not fit the model. The model is as it was then.
        ImportError: peft is not installed.
    """
    check_adapter_name(name)
    if name in adapter_names(model):
        raise ValueError(f"name: expected one that the model has no adapter of, got {shown(name)}")
    _check_fits(model, files)
    with extra("lora"):
        from peft import LoraConfig, inject_adapter_in_model

    modules = dict(model.named_modules())
    wanted = [(weight, weight.requires_grad) for weight in model.parameters()]
    before = {
        path: (module.active_adapters, module.disable_adapters) for path, module in modules.items() if is_lora(module)
    }
    active, disabled = next(iter(before.values()), ([], False))
    configs = hasattr(model, "peft_config")
    exactly = "|".join(map(re.escape, files.weights))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the model has adapters already, or layers whose weights are tied
            config = LoraConfig(**files.settings, target_modules=exactly, inference_mode=True)
            inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)
        _fill(model, name, files)
    except BaseException:
        _remove(model, name, before)
        raise
    finally:
        for path, module in model.named_modules():
            if is_lora(module):
                own, off = before.get(path, (active, disabled))
                module.set_adapter(list(own), inference_mode=True)
                module.enable_adapters(False) if off else None
        for weight, wants in wanted:
            weight.requires_grad_(wants)
        if not configs and not adapter_names(model):
            vars(model).pop("peft_config", None)


def _check_fits(model: nn.Module, files: AdapterFiles) -> None:
    """Raise ValueError where a layer that the adapter names is not in the model."""
    modules = dict(model.named_modules())
    for target in files.targets:
        if not any(f".{name}".endswith(f".{target}") for name in modules):
            raise refusal(files.folder / CONFIG, f"target_modules: the model has no module {shown(target)}")
    for path, (down, up) in files.weights.items():
        base = base_of(modules.get(path))
        if not isinstance(base, nn.Linear):
            found = "none" if base is None else f"a {type(base).__name__}"
            raise refusal(
                files.folder / WEIGHTS, f"{path:.200}: expected a linear layer of the model there, got {found}"
            )
        shapes = [down.shape[0], base.in_features], [base.out_features, down.shape[0]]
        if (list(down.shape), list(up.shape)) != shapes:
            got = list(down.shape), list(up.shape)
            raise refusal(files.folder / WEIGHTS, f"{path:.200}: expected A and B of {shapes}, got {got}")


def _fill(model: nn.Module, name: str, files: AdapterFiles) -> None:
    """Give the new layers their weights, in the file's dtype.

    Raises:
        ValueError: peft made others than the files have, or a layer is of a kind that is not added beside it.
    """
    for path, (down, up) in files.weights.items():
        module: Any = model.get_submodule(path)
        if not is_lora(module):
            raise refusal(files.folder, f"{path:.200}: expected a linear layer, got a {type(module).__name__}")
        like = module.base_layer.weight
        for linear, weight in ((module.lora_A[name], down), (module.lora_B[name], up)):
            if linear.weight.shape != weight.shape:
                raise refusal(
                    files.folder,
                    f"{path:.200}: rank {linear.weight.shape[0]} in {CONFIG}, {list(weight.shape)} in {WEIGHTS}",
                )
            linear.weight = nn.Parameter(weight.to(like.device), requires_grad=False)
        module.train(module.base_layer.training)
        if reason := why_not_linear(module, like, name):
            raise refusal(files.folder, f"{path:.200} would not run beside the model's layer: {reason}")


def _remove(model: nn.Module, name: str, before: Mapping[str, Any]) -> None:
    """Take an adapter away that was not added whole."""
    for path, module in [*model.named_modules()]:
        if not is_lora(module) or name not in module.lora_A:
            continue
        if path in before:
            module.delete_adapter(name)
        else:
            owner, _, child = path.rpartition(".")
            setattr(model.get_submodule(owner), child, module.base_layer)
    getattr(model, "peft_config", {}).pop(name, None)
