"""The model's layers as the runtime runs them: which modules are on kernels, which run as themselves, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

from torch import Tensor

from ..models.adapter import Adapter
from ..models.known import why_not_ffn, why_not_linear, why_not_norm
from ..models.lora import BASE, adapter_layers, adapter_names
from ..ops.kernel_sets import KernelSet, KernelSets, KernelUnavailableError
from ..planning.config import FlashUConfig
from ..planning.decoders import FAMILIES
from ..planning.neurons import NeuronLayout
from ..planning.reading import shown
from .modules.adapters import RowAdapters
from .modules.attention import head_norms
from .modules.embedders import PatchEmbedder, TimeEmbedder
from .modules.ffn import FFN
from .modules.layer import Layer, Projections
from .modules.linear import Chain, Linear, Linears, Unknown
from .modules.norm import Norm
from .modules.vision import VisionEncoder

__all__ = ["Network"]


@dataclass(frozen=True)
class Network:
    """A model's layers on one set of kernels; `at` gives the same model on the set of a phase."""

    source: Adapter
    """The model's own modules."""
    parts: Adapter
    """The same, with the runtime's embedders, image encoder and projections in place of the model's: called alike."""
    sets: KernelSets
    kernels: KernelSet
    layers: tuple[Layer, ...]
    final_norm: Norm
    blocks: tuple[Layer, ...]
    experts: tuple[Layer, ...]
    """Of a drawing's patches; empty: `layers` compute them."""
    rows: RowAdapters
    """Of which adapters the rows are that its layers, and those on the other sets, compute."""
    layouts: Sequence[NeuronLayout | None] | None = None
    """See `over`."""
    built: list[Network] = field(default_factory=list)
    """The same model on the other sets, as far as they were asked for."""

    @classmethod
    def build(
        cls, parts: Adapter, sets: KernelSets, kernels: KernelSet | None = None, rows: RowAdapters | None = None
    ) -> Network:
        """The model's layers; every task uses all neurons. kernels: one of the sets; None: any."""
        kernels, rows = kernels or next(iter(sets.sets.values())), rows or RowAdapters()
        like = parts.embed_tokens.weight
        kit = _Kit(kernels, like, rows)
        adapters = [BASE, *names] if (names := adapter_names(parts.model)) else []

        def layer(module: Any) -> Layer:
            named = [name for name in adapters if why_not_ffn(module.mlp, like, adapter=name) is None]
            ffn = FFN(module.mlp, kernels, why_not_ffn(module.mlp, like), None, rows, named)
            projections = Projections.build(module.self_attn, module.self_attn.o_proj, kernels, like, rows)
            norms = kit.norm(module.input_layernorm), kit.norm(module.post_attention_layernorm)
            return Layer(projections, *norms, ffn, head_norms(module.self_attn))

        layers, blocks, experts = (tuple(map(layer, each)) for each in (parts.layers, parts.blocks, parts.experts))
        return cls(parts, parts.on(kit), sets, kernels, layers, kit.norm(parts.final_norm), blocks, experts, rows)

    def over(self, layouts: Sequence[NeuronLayout | None]) -> Network:
        """The same network over the tasks' neurons.

        Args:
            layouts: for each layer, in the order in which its weights lie; None: all neurons.
        """
        layers = [replace(layer, ffn=layer.ffn.over(own)) for layer, own in zip(self.layers, layouts, strict=True)]
        # An expert's neurons are read where they lie: only those of `layers` are moved.
        experts = [
            replace(layer, ffn=layer.ffn.over(own and own.in_place()))
            for layer, own in zip(self.experts, layouts, strict=False)
        ]
        return replace(self, layers=tuple(layers), experts=tuple(experts), layouts=layouts, built=[])

    def at(self, task: str, phase: str) -> Network:
        """The network of a phase; phases with the same kernels share one."""
        kernels = self.sets.of(task, phase)
        for network in (self, *self.built):
            if network.kernels is kernels:
                return network
        network = Network.build(self.source, self.sets, kernels, self.rows)
        self.built.append(network if self.layouts is None else network.over(self.layouts))
        return self.built[-1]

    def check_explicit(self, config: FlashUConfig) -> None:
        """Raise KernelUnavailableError where a module runs as itself and a setting asks for kernels there."""
        names = self._names()
        for each in self._modules():
            asked = [f"{family}_kernels" for family in _FAMILIES[type(each)]]
            asked = [name for name in asked if getattr(config.execution, name) == "flashu"]
            asked += ["batch_invariant"] if config.execution.batch_invariant else []
            if each.why_itself is not None and asked:
                value = getattr(config.execution, asked[0])
                raise KernelUnavailableError(
                    f"model.{names[each.module]}: FlashUConfig.{asked[0]} is {value!r}, and no kernel computes this module: "
                    f"{each.why_itself}"
                )

    def run_as_themselves(self, adapter: str | None = None) -> dict[str, str]:
        """Path in the model -> why the module is not on a kernel, in rows of a known adapter; None: of what is active."""
        names = self._names()
        reasons = ((names[each.module], self._why_itself(each, adapter)) for each in self._modules())
        return {name: why for name, why in reasons if why is not None}

    def _why_itself(self, part: Itself, adapter: str | None) -> str | None:
        like = self.source.embed_tokens.weight
        if adapter is not None and isinstance(part, FFN):
            return why_not_ffn(part.module, like, adapter=adapter) or part.why_not(adapter)
        if adapter is not None and isinstance(part, Linear):
            return why_not_linear(part.module, like, adapter)
        return part.why_itself

    def check_adapter(self, adapter: str) -> None:
        """That the layers compute rows of a LoRA adapter of peft, whichever is active.

        Raises:
            ValueError: the model has no such adapter, it is merged, or one of its layers is not computed by this network.
        """
        model = self.source.model
        known, layers = adapter_names(model), adapter_layers(model)
        if adapter not in (*known, BASE):
            raise ValueError(f"adapter: expected one of {[*known, BASE]} or None, got {shown(adapter)}")
        merged = next((name for name, each in layers.items() if getattr(each, "merged_adapters", None)), None)
        if merged is not None:
            raise ValueError(f"adapter: expected none while adapters are merged, as in model.{merged}")
        every = (self, *self.built)
        itself = {name: why for each in every for name, why in each.run_as_themselves(adapter).items()}
        read = {module for each in every for module in each._read()}
        for name, module in layers.items():
            why = next((why for path, why in itself.items() if f"{name}.".startswith(f"{path}.")), None)
            if why is not None or module not in read:
                raise ValueError(
                    f"adapter: expected one that the kernels add everywhere, and model.{name} runs as itself, with what is "
                    f"active: it {why or f'is a {type(module).__module__}.{type(module).__qualname__}'}"
                )

    def _read(self) -> Iterator[Any]:
        """The linear layers of the model that are computed from their weights."""
        for each in self._modules():
            if isinstance(each, FFN):
                yield from (each.module.gate_proj, each.module.up_proj, each.module.down_proj)
            elif isinstance(each, Linear):
                yield each.module

    def ffn_paths(self) -> list[str]:
        """Of every layer's FFN in the model."""
        stack = FAMILIES[self.source.family].stack
        return [f"{stack}.layers.{index}.mlp" for index in range(len(self.layers))]

    def _modules(self) -> Iterator[Itself]:
        return _all((self.parts, self.layers, self.final_norm, self.blocks, self.experts))

    def _names(self) -> dict[Any, str]:
        return {module: name for name, module in self.source.model.named_modules()}


class _Kit:
    """The runtime's callables on one set of kernels (`Kit`)."""

    def __init__(self, kernels: KernelSet, like: Tensor, rows: RowAdapters):
        """like: a weight of the model, for dtype and device."""
        self._own = kernels, like, rows

    def linear(self, module: Any) -> Linear:
        return Linear(module, *self._own)

    def chain(self, module: Any) -> Chain:
        return Chain(module, *self._own)

    def norm(self, module: Any) -> Norm:
        kernels, like, _ = self._own
        return Norm(module, kernels, why_not_norm(module, like))

    def patches(self, module: Any) -> PatchEmbedder:
        return PatchEmbedder(module, *self._own[:2])

    def time(self, module: Any) -> TimeEmbedder:
        return TimeEmbedder(module, *self._own)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._own[0].attention(query, key, value)

    def vision(self, module: Any) -> VisionEncoder:
        return VisionEncoder(module, *self._own)


Itself = Norm | FFN | Linear | Unknown | Chain | VisionEncoder | PatchEmbedder | TimeEmbedder

_FAMILIES: Mapping[type, tuple[str, ...]] = {
    Norm: ("norm",),
    FFN: ("ffn",),
    Linear: ("linear",),
    Unknown: ("linear",),
    Chain: ("linear",),
    VisionEncoder: ("linear", "attention"),
    PatchEmbedder: ("linear",),
    TimeEmbedder: ("linear",),
}
"""Families of the kernels that compute a module."""


def _all(inside: Any) -> Iterator[Itself]:
    """Every part of the network that may run as the model's module."""
    if isinstance(inside, Itself):
        yield inside
    if is_dataclass(inside) or isinstance(inside, (Linears, Chain, TimeEmbedder, VisionEncoder)):
        inside = vars(inside)
    if isinstance(inside, dict):
        inside = tuple(inside.values())
    if isinstance(inside, (tuple, list)):
        for each in inside:
            yield from _all(each)
