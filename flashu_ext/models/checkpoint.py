"""Checkpoint folders of all models: config files and weights, upstream's or our own.

Loading is strict and executes no code; files are written atomically.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..planning.reading import exists, refusal, shown
from ..planning.safe_files import save_safetensors, write_text
from .fields import JsonConfig
from .llm import is_tied
from .weights import DTYPES, USUAL, Files, Shapes, Sizes, listed, read_object, read_shapes, read_weights

C = TypeVar("C", bound=JsonConfig)
M = TypeVar("M", bound=nn.Module)

__all__ = ["Configs", "Layout", "check_dtype", "check_names", "expect_fields"]

OWN = "config.json"
"""The config file of our own format, by its field `format`; upstream's may have the same name."""

Configs = Mapping[str, Mapping[str, Any]]
"""The objects in a folder's config files, by the files' names."""


@dataclass(frozen=True)
class Layout(Generic[C]):
    """What the checkpoint folders of one family of models are like.

    Attributes:
        name: of the family, as 'Show-o2'.
        language_model: name of the submodule that is the language model with its head: `model.embed_tokens`, `lm_head`,
            `config.tie_word_embeddings` and `tie_weights()` as transformers' have them.
        config: the class of configurations.
        upstream: (folder, what is in upstream's config files, sizes of the weights) -> the configuration.
        layers: a configuration -> for every kind of layer its name for messages, the pattern of its weights' names, and how many
            there are.
        shallow: a configuration -> one of a small model with the same buffers: one layer of each kind.
        configs: upstream's config files. All of them must be there.
        files: upstream's weights. Ours are of the same kinds and have the usual names.
        named: what is in upstream's config files -> whether they are of this family.
    """

    name: str
    language_model: str
    config: type[C]
    upstream: Callable[[Path, Configs, Sizes], C]
    layers: Callable[[C], Iterable[tuple[str, str, int]]]
    shallow: Callable[[C], C]
    configs: tuple[str, ...] = (OWN,)
    files: Files = USUAL
    named: Callable[[Configs], bool] = lambda configs: True

    # ---- folders

    def is_in(self, directory: Path) -> bool:
        """Whether a folder's config files are this family's, whatever else is wrong with them."""
        try:
            configs = self._read_configs(directory)
        except (OSError, ValueError):
            return False
        return configs[OWN]["format"] == self.config.FORMAT if self._is_own(configs) else self.named(configs)

    def load(self, directory: str | os.PathLike[str], build: Callable[[C], M], dtype: torch.dtype | None = None) -> M:
        """Load a model from a folder with config files and weights.

        Args:
            directory: upstream's layout, or one written by `save`.
            build: the model's class. It is called on the meta device, when the files' layers are known to be there.
            dtype: of the parameters; None keeps the token embedding's.

        Returns:
            The model on the CPU, in eval mode. Parameters take gradients where the class's do.

        Raises:
            FileNotFoundError: the folder, a config file or its weights are missing.
            ValueError: a file is malformed, or names, shapes or dtypes do not match the model; the message lists them.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: expected a folder with a {self.name} checkpoint")
        check_dtype(dtype)
        configs = self._read_configs(directory)
        state = read_weights(directory, self._files(configs))
        config = self.config_of(directory, configs, {name: tuple(t.shape) for name, t in state.items()})
        model: Any = _on_meta(_where(directory, configs), build, config)
        head = self._tied_head(model)
        check_names(directory, model, state, () if head is None else (head,))
        if dtype is None:
            dtype = state[f"{self.language_model}.model.embed_tokens.weight"].dtype
        for name, tensor in state.items():
            state[name] = tensor.to(dtype)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        # assign=True makes the loaded tensors the parameters, so the weights are never in memory twice.
        try:
            model.load_state_dict(state, strict=True, assign=True)
        except ValueError as error:
            raise refusal(directory, error) from error
        if head is not None:
            model.get_submodule(self.language_model).tie_weights()
        _restore_buffers(model, lambda: build(self.shallow(config)))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        return model.eval()

    def save(self, model: Any, directory: str | os.PathLike[str]) -> None:
        """Write `model.safetensors` and `config.json` in our own format, each atomically.

        Args:
            directory: created if missing; existing files of these names are replaced. They count where upstream's are there too.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        state = model.state_dict()
        # A caller may have tied or untied the head: what is written says what it is.
        config, llm = model.config, model.get_submodule(self.language_model)
        if (tied := is_tied(llm)) != bool(llm.config.tie_word_embeddings):
            config = config.with_tied_head(tied)
        if tied:
            state.pop(f"{self.language_model}.lm_head.weight", None)
        save_safetensors(directory / "model.safetensors", state)
        write_text(directory / OWN, config.to_json() + "\n")

    def read_config(self, directory: str | os.PathLike[str]) -> C:
        """The configuration of the model in a checkpoint folder; of safetensors only headers are read.

        Raises:
            FileNotFoundError, ValueError: as `load`, for what is read.
        """
        directory = Path(directory)
        configs = self._read_configs(directory)
        return self.config_of(directory, configs, read_shapes(directory, self._files(configs)))

    def config_of(self, directory: Path, configs: Configs, shapes: Shapes) -> C:
        """The configuration that the config files and the shapes of the weights give together.

        Raises:
            ValueError: they do not; the message names the config file, or the folder where there are several.
        """
        sizes = Sizes(shapes)
        try:
            own = self._is_own(configs)
            config = self.config.from_fields(configs[OWN]) if own else self.upstream(directory, configs, sizes)
            for where, pattern, asked in self.layers(config):  # before a layer is built
                if sizes.count(pattern) != asked:
                    raise ValueError(f"{where}: expected {sizes.count(pattern)}, as the weights have, got {asked}")
        except ValueError as error:
            raise refusal(_where(directory, configs), error) from error
        return config

    # ---- files

    def _read_configs(self, directory: Path) -> Configs:
        """Our own config file, or all of upstream's."""
        try:
            own = self._read_config(directory, OWN)
        except (OSError, ValueError):
            # A published config.json that upstream's program does not read need not even be JSON.
            if OWN in self.configs or not any(exists(directory / name) for name in self.configs):
                raise
            own = {}
        if OWN in self.configs or "format" in own:
            return {OWN: own}
        return {name: self._read_config(directory, name) for name in self.configs}

    def _read_config(self, directory: Path, name: str) -> Mapping[str, Any]:
        if not exists(directory / name):
            others = "" if OWN in self.configs else f", or upstream's {listed(self.configs)}"
            raise FileNotFoundError(
                f"{directory}: expected {name} in the checkpoint folder{others if name == OWN else ''}"
            )
        return read_object(directory / name)

    def _is_own(self, configs: Configs) -> bool:
        return "format" in configs.get(OWN, ())

    def _files(self, configs: Configs) -> Files:
        return Files(suffixes=self.files.suffixes) if self._is_own(configs) else self.files

    def _tied_head(self, model: Any) -> str | None:
        """The output head's weight where it is the token embedding, which a checkpoint then need not hold."""
        tied = model.get_submodule(self.language_model).config.tie_word_embeddings
        return f"{self.language_model}.lm_head.weight" if tied else None


def expect_fields(
    where: str, fields: Mapping[str, Any], found: Mapping[str, Any], plain: Mapping[str, Any] | None = None
) -> None:
    """Raise ValueError for the first field of a config file that says something else than expected.

    Args:
        where: before the field's name in messages.
        found: what the weights have. A field that is missing or null says nothing.
        plain: what the program here computes. A field that is missing says that.
    """
    for name, value in (plain or {}).items():
        if fields.get(name, value) != value:
            raise ValueError(f"{where}{name}: expected {value!r}, got {shown(fields[name])}")
    for name, value in found.items():
        if fields.get(name) not in (None, value):
            raise ValueError(f"{where}{name}: expected {value}, as the weights have, got {shown(fields[name])}")


def _where(directory: Path, configs: Configs) -> Path:
    """What an error about the config files names: the file, or of several the folder."""
    return directory.joinpath(*configs) if len(configs) == 1 else directory


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
