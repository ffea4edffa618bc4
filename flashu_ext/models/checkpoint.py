"""Checkpoint folders of all models: config.json and weights, upstream's or our own.

Loading is strict and executes no code; files are written atomically.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..planning.reading import exists, refusal, shown
from ..planning.safe_files import save_safetensors, write_text
from .weights import DTYPES, Shapes, Sizes, listed, read_object, read_shapes, read_weights

M = TypeVar("M", bound=nn.Module)

__all__ = ["Layout", "check_dtype", "check_names", "config_of", "load", "read_config", "save"]


@dataclass(frozen=True)
class Layout:
    """What the checkpoint folders of one family of models are like.

    Attributes:
        name: of the family, as 'Show-o2'.
        language_model: name of the submodule that is transformers' language model with its head.
        own: fields of a config.json in our own format -> the model's configuration.
        upstream: (folder, fields of upstream's config.json, sizes of the weights) -> the configuration.
        layers: a configuration -> for every kind of layer its name for messages, the pattern of its weights' names, and how many
            there are.
        shallow: a configuration -> one of a small model with the same buffers: one layer of each kind.
        suffixes: kinds of weight files.
    """

    name: str
    language_model: str
    own: Callable[[dict[str, Any]], Any]
    upstream: Callable[[Path, dict[str, Any], Sizes], Any]
    layers: Callable[[Any], Iterable[tuple[str, str, int]]]
    shallow: Callable[[Any], Any]
    suffixes: tuple[str, ...] = ("safetensors",)

    def tied_head(self, model: Any) -> str | None:
        """The output head's weight where it is the token embedding, which a checkpoint then need not hold."""
        tied = model.get_submodule(self.language_model).config.tie_word_embeddings
        return f"{self.language_model}.lm_head.weight" if tied else None


def load(
    layout: Layout, directory: str | os.PathLike[str], build: Callable[[Any], M], dtype: torch.dtype | None = None
) -> M:
    """Load a model from a folder with config.json and weights.

    Args:
        directory: upstream's layout, or one written by `save`.
        build: the model's class. It is called on the meta device, when the files' layers are known to be there.
        dtype: of the parameters; None keeps the token embedding's.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        FileNotFoundError: the folder, its config.json or its weights are missing.
        ValueError: a file is malformed, or names, shapes or dtypes do not match the model; the message lists them.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected a folder with a {layout.name} checkpoint")
    check_dtype(dtype)
    config_path = directory / "config.json"
    if not exists(config_path):
        raise FileNotFoundError(f"{directory}: expected config.json in the checkpoint folder")
    fields = read_object(config_path)
    state = read_weights(directory, layout.suffixes)
    config = config_of(layout, directory, fields, {name: tuple(t.shape) for name, t in state.items()})
    model: Any = _on_meta(config_path, build, config)
    head = layout.tied_head(model)
    check_names(directory, model, state, () if head is None else (head,))
    if dtype is None:
        dtype = state[f"{layout.language_model}.model.embed_tokens.weight"].dtype
    for name, tensor in state.items():
        state[name] = tensor.to(dtype)
    # assign=True makes the loaded tensors the parameters, so the weights are never in memory twice.
    model.load_state_dict(state, strict=True, assign=True)
    if head is not None:
        model.get_submodule(layout.language_model).tie_weights()
    _restore_buffers(model, lambda: build(layout.shallow(config)))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def save(layout: Layout, model: Any, directory: str | os.PathLike[str]) -> None:
    """Write `model.safetensors` and `config.json` in our own format, each atomically.

    Args:
        directory: created if missing; existing files of these names are replaced.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    state.pop(layout.tied_head(model), None)
    save_safetensors(directory / "model.safetensors", state)
    write_text(directory / "config.json", model.config.to_json() + "\n")


def read_config(layout: Layout, directory: str | os.PathLike[str]) -> Any:
    """The configuration of the model in a checkpoint folder; of safetensors only headers are read."""
    directory = Path(directory)
    return config_of(layout, directory, read_object(directory / "config.json"), read_shapes(directory, layout.suffixes))


def config_of(layout: Layout, directory: Path, fields: dict[str, Any], shapes: Shapes) -> Any:
    """The configuration that the fields of config.json and the shapes of the weights give together.

    Raises:
        ValueError: they do not; the message names config.json.
    """
    sizes = Sizes(shapes)
    try:
        config = layout.own(fields) if "format" in fields else layout.upstream(directory, fields, sizes)
        for where, pattern, asked in layout.layers(config):  # before a layer is built
            if sizes.count(pattern) != asked:
                raise ValueError(f"{where}: expected {sizes.count(pattern)}, as the weights have, got {asked}")
    except ValueError as error:
        raise refusal(directory / "config.json", error) from error
    return config


def check_dtype(dtype: Any) -> None:
    """Of a model's weights. Raises ValueError, naming `dtype`."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected None or a floating dtype of {listed(DTYPES)}, got {shown(dtype)}")


def _on_meta(path: Path, build: Callable[[Any], Any], config: Any) -> Any:
    """The model without memory for its weights."""
    try:
        with torch.device("meta"):
            return build(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        raise refusal(path, f"no model can be built of it: {error}") from error


def check_names(directory: Path, model: Any, state: Mapping[str, Tensor], optional: Sequence[str] = ()) -> None:
    """Names and shapes of weights are the model's; `optional` ones may be missing. Raises ValueError, listing the others."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = sorted(set(expected) - set(state) - set(optional))
    unexpected = sorted(set(state) - set(expected))
    problems = []
    if missing:
        problems.append(f"missing: {listed(missing)}")
    if unexpected:
        problems.append(f"unexpected: {listed(unexpected)}")
    for name in sorted(set(expected) & set(state)):
        if tuple(state[name].shape) != expected[name]:
            problems.append(f"{name}: expected shape {list(expected[name])}, got {shown(list(state[name].shape))}")
    if problems:
        raise refusal(directory, "the weights do not match the model: " + "; ".join(problems[:8]))


def _restore_buffers(model: Any, build: Callable[[], Any]) -> None:
    """Compute the buffers that are not in checkpoints (rotary frequencies, position ids) and are still on meta, by a small
    model that has them too."""
    twin = None
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            continue
        if twin is None:
            with torch.device("cpu"):
                twin = dict(build().named_buffers())
        owner, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        value = twin[re.sub(r"\.\d+\.", ".0.", name)]  # it has one layer of each kind
        module._buffers[leaf] = value.clone()
        if leaf == "inv_freq" and hasattr(module, "original_inv_freq"):
            module.original_inv_freq = module._buffers[leaf]
