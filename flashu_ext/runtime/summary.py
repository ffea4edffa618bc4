"""What an accelerated model did, for people and tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Summary"]


@dataclass(frozen=True)
class Summary:
    """A snapshot of a handle. Counts of the last image are empty before one was drawn.

    Attributes:
        steps: evaluations of the last image by kind (see `schedule.Step.kind`).
        backbone_evaluations, head_evaluations: how many of them ran the language model, and the head's blocks.
        encoder_evaluations: how many ran the SigLIP encoder.
        decided: evaluations that were decided while running (`adaptive_cache`): 'computed' and 'cached'.
        routed: tokens of the image span times rows times layers of the language model: 'computed', and 'carried' past a layer
            (`token_skip`).
        layers_skipped: (step, layers) for every measurement of the last image.
        answer_layers_skipped: for each prompt of the last call the layers that its answer skipped.
        neurons: task -> FFN neurons read per layer (where layers differ, their mean, rounded), for tasks with a set of their
            own. intermediate: all of them.
        tokens: 'prefix' (longest prompt, computed once), 'span' (per step), 'tail' (dropped) of the last image; 'prefilled' and
            'reused' prompt tokens over all answers; 'visual' image tokens in the prompts of the last call and 'visual kept' of
            them behind the pruning layer.
        weight_bytes: the model's weights. extra_weight_bytes: what acceleration keeps beside them (the permutations).
        cache_bytes: held now beside the weights: keys and values, tables, activations that outlive an evaluation, caches.
        memory: the same by purpose. last_image_memory: what the last image held at its end (or,
            while it is in progress, at its beginning), by purpose.
        launches: by kind of evaluation the operators that the last image's last one launched; a matrix product or an
            attention of torch counts as one.
        syncs: times in the last image's evaluations that an operator made the host wait for the device. host_waits: times
            that the host waited for numbers sent earlier (a measurement of layers, the adaptive cache's flag).
        step_runner: 'graphs', or 'eager: ' and why. graphs: 'workspaces' held now for images, the work 'captured' in them, its
            'replays', and how often work was 'run eagerly'.
        kernels: op -> backend. fallbacks: reason -> occurrences.
    """

    steps: Mapping[str, int]
    backbone_evaluations: int
    head_evaluations: int
    encoder_evaluations: int
    decided: Mapping[str, int]
    routed: Mapping[str, int]
    layers_skipped: tuple[tuple[int, tuple[int, ...]], ...]
    answer_layers_skipped: tuple[tuple[int, ...], ...]
    neurons: Mapping[str, int]
    intermediate: int
    tokens: Mapping[str, int]
    weight_bytes: int
    extra_weight_bytes: int
    cache_bytes: int
    memory: Mapping[str, int]
    last_image_memory: Mapping[str, int]
    launches: Mapping[str, int]
    syncs: int
    host_waits: int
    step_runner: str
    graphs: Mapping[str, int]
    kernels: Mapping[str, str]
    fallbacks: Mapping[str, int]

    def __str__(self) -> str:
        def listed(items: Mapping[str, object]) -> str:
            return ", ".join(f"{name} {value}" for name, value in items.items()) or "none"

        def mebibytes(items: Mapping[str, int]) -> str:
            return listed({name: f"{count / 2**20:.2f} MiB" for name, count in items.items()})

        skipped = "; ".join(f"as of step {step}: {list(layers)}" for step, layers in self.layers_skipped) or "none"
        lines = [
            f"evaluations   {listed(self.steps)}",
            f"              {self.backbone_evaluations} backbone, {self.head_evaluations} head, "
            f"{self.encoder_evaluations} encoder",
            f"decided       {listed(self.decided)}",
            f"tokens routed {listed(self.routed)}",
            f"layers skipped {skipped}",
            f"   in answers  {'; '.join(str(list(layers)) for layers in self.answer_layers_skipped if layers) or 'none'}",
            f"FFN neurons   {listed(self.neurons)} (of {self.intermediate})",
            f"tokens        {listed(self.tokens)}",
            f"memory        weights {self.weight_bytes / 2**20:.1f} MiB, extra {self.extra_weight_bytes / 2**20:.3f} MiB, "
            f"caches {self.cache_bytes / 2**20:.1f} MiB",
            f"  held now    {mebibytes(self.memory)}",
            f"  last image  {mebibytes(self.last_image_memory)}",
            f"launches      {listed(self.launches)} an evaluation",
            f"host waits    {self.syncs} synchronising operators, {self.host_waits} for numbers sent earlier",
            f"step runner   {self.step_runner}"
            + ("" if self.step_runner.startswith("eager") else f": {listed(self.graphs)}"),
            f"kernels       {listed(self.kernels)}",
            f"fallbacks     {listed(self.fallbacks)}",
        ]
        return "\n".join(lines)
