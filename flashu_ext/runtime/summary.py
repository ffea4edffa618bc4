"""What an accelerated model did, for users and tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

__all__ = ["Summary"]


@dataclass(frozen=True)
class Summary:
    """A snapshot of a handle. Counts of the last image are empty before the first one.

    Attributes:
        steps: evaluations of the last image by kind (see `schedule.Step.kind`). In a batch whose images decide on their own, the
            last image is its first one; `routed`, 'prefix' and `last_image_memory` are of the whole batch.
        backbone_evaluations: how many of them ran the language model.
        head_evaluations: how many ran the head's blocks.
        encoder_evaluations: how many ran the SigLIP encoder.
        decided: evaluations decided while running (`adaptive_cache`): 'computed' and 'cached'.
        routed: image tokens times rows times layers of the language model: 'computed' and 'skipped' (`token_skip`).
        layers_skipped: (step, layers) for every measurement of the last image.
        answer_layers_skipped: for each prompt of the last call, the layers that its answer skipped.
        neurons: task -> FFN neurons read per layer (the rounded mean where layers differ), for tasks with their own set.
        plan_unused: a plan was given, and the config prunes nothing.
        intermediate: all FFN neurons of a layer.
        tokens: 'prefix' (longest prompt, computed once), 'span' (per step) and 'tail' (not computed) of the last image;
            'prefilled' and 'reused' prompt tokens over all answers; 'visual' image tokens in the prompts of the last call,
            and how many of them the pruning layer left ('visual kept').
        weight_bytes: the model's weights.
        int8_weights: how many of them are torchao's int8; `fallbacks` has those that no int8 kernel reads.
        adapters: LoRA adapter that is active -> layers that it is beside; `fallbacks` as above.
        extra_weight_bytes: what acceleration stores besides them (the permutations).
        cache_bytes: held now besides the weights: keys and values, tables, persistent activations, caches.
        memory: `cache_bytes` by purpose.
        last_image_memory: what the last image held at its end (at its start while in progress), by purpose.
        launches: kind of evaluation -> operators launched by the last one of this kind; a matrix product or an attention of
            torch counts as one.
        syncs: times that an operator of the last image made the host wait for the device.
        host_waits: times that the host waited for numbers sent earlier (layer importance, the adaptive cache's flag).
        evicted: images in progress that were ended to make room for others, over all calls.
        step_runner: 'graphs', or 'eager: ' and why.
        graphs: image 'memories' held now, work 'captured' on them, its 'replays', and work 'run eagerly'.
        kernels: op -> implementation, or several where phases differ.
        ran: 'task phase' -> op -> implementation, for phases that ran: of the last image, and of all answers.
        fallbacks: reason -> occurrences.
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
    evicted: int
    step_runner: str
    graphs: Mapping[str, int]
    kernels: Mapping[str, str]
    fallbacks: Mapping[str, int]
    ran: Mapping[str, Mapping[str, str]]
    plan_unused: bool = False
    int8_weights: int = 0
    adapters: Mapping[str, int] = field(default_factory=dict)

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
            *(f"  {phase:<22} {_by_implementation(ops)}" for phase, ops in self.ran.items()),
            "fallbacks     " + ("" if self.fallbacks else "none"),
            *_by_reason(self.fallbacks),
        ]
        if self.int8_weights or self.adapters:
            lines.append(f"weights       {self.int8_weights} of int8, layers beside adapters: {listed(self.adapters)}")
        if self.plan_unused:
            lines.append("plan          not used, the config prunes nothing")
        return "\n".join(lines)


def _by_reason(fallbacks: Mapping[str, int]) -> Iterator[str]:
    """A line for each reason, with the first module that has it and how many more do."""
    modules: dict[str, list[str]] = {}
    for reason, count in fallbacks.items():
        path, _, why = reason.partition(": ")
        if path.startswith("model."):
            modules.setdefault(why, []).append(path)
        else:
            yield f"  {reason} {count}"
    for why, paths in modules.items():
        yield f"  {paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {why}"


def _by_implementation(ops: Mapping[str, str]) -> str:
    names = dict.fromkeys(ops.values())
    return "; ".join(f"{name}: {', '.join(op for op in ops if ops[op] == name)}" for name in names)
