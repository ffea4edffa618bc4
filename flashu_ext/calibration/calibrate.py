"""Runs a model on calibration samples of each task and scores its FFN neurons: the result is a TaskPlan.

What is run for a sample is the family's (`Adapter.passes`). Generation runs on latents noised to several times, with their
prompts, under guidance; understanding runs on images with questions and answers. Padding and tokens after an image are not
counted, because no output depends on them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..models.accelerated import handle_of
from ..models.adapter import Adapter, adapter_of, family_of
from ..models.autocast import without_autocast
from ..models.calibration import DensePass, Noise, Sample, TokenSample, text_passes
from ..models.showo2.calibration import GenerationSample, UnderstandingSample
from ..ops import reference
from ..planning.decoders import FAMILIES, Decoder, check_parts, decoder_of
from ..planning.estimators import DownNorms, check_estimator
from ..planning.fingerprint import model_fingerprint
from ..planning.plan import TaskPlan, check_pruning
from .state import KINDS, TaskState, chained_digest, load_states, measured, save_states

# Show-o2's samples had their names here before other families had any.
__all__ = ["GenerationSample", "TokenSample", "UnderstandingSample", "calibrate"]

DEFAULT_TIMES = (0.05, 0.25, 0.5, 0.75, 0.95)


def calibrate(
    model: Any,
    generation: Iterable[Any] = (),
    understanding: Iterable[Any] = (),
    *,
    tasks: Mapping[str, Iterable[Any]] | None = None,
    estimator: str = "wanda",
    ratio: float = 0.2,
    multiple: int = 64,
    times: Sequence[float] = DEFAULT_TIMES,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_interval: int = 8,
    keep_checkpoint: bool = False,
    progress: bool = True,
) -> TaskPlan:
    """Score the language model's FFN neurons and layers for each task, in one pass over its samples.

    The plan contains the sums of every neuron, so `TaskPlan.with_estimator`, `with_ratio` and `with_adaptive_ratios` need no
    second run.

    Args:
        model: of any family, or with `TokenSample`s any decoder (`planning.decoders`); not accelerated. Where drawing has
            experts of its own (BAGEL), a generation task scores their neurons, over the patches, and an understanding task those
            of the text's, as each prunes.
        generation, understanding: samples of each task, `GenerationSample`s and `UnderstandingSample`s of the model's family
            (`fx.showo2`, `fx.janusflow`, `fx.bagel`), or `TokenSample`s; any iterable, read once and one at a time. A task
            without samples gets no neuron set.
        tasks: further tasks by name, any number. The samples of one task are all of one type.
        estimator: 'wanda' (the paper's), 'flap' or 'reconstruction', see `estimators.ESTIMATORS`.
        ratio, multiple: pruning of the resulting plan (`TaskPlan.with_ratio` changes them later).
        times: times t in [0, 1] at which generation is measured; 0 is noise, 1 the image.
        seed: of the noise, which depends only on seed, task name, sample number and time. The result is deterministic.
        checkpoint: file for the state, written every `checkpoint_interval` samples and deleted at the end. If it exists, the
            run resumes from it, with a result bit-equal to an uninterrupted run; earlier samples are read again and compared.
        keep_checkpoint: leave the finished checkpoint to the caller, who deletes it when the plan is saved.
        progress: show a progress bar.

    Raises:
        ValueError: no samples, a time outside [0, 1], an unknown estimator, a sample of wrong shapes, an activation that is not
            finite, or a checkpoint of other settings, another model or other samples.
        TypeError: a sample of another type.
        RuntimeError: the model is accelerated.
    Source: paper section 3.2; its reference code computes the same Wanda score on one prompt with placeholder image
    embeddings.
    """
    decoder = decoder_of(model)
    weights = (
        f"layers.{i}.mlp.{name}_proj.weight" for i in range(len(decoder.layers)) for name in ("gate", "up", "down")
    )
    check_parts(decoder.stack, "decoder", weights)
    if handle_of(model) is not None:
        raise RuntimeError("model: expected a model that is not accelerated; call handle.remove() first")
    check_estimator(estimator)
    check_pruning(ratio, multiple)
    given = _given(generation, understanding, tasks)
    times = tuple(times)
    if not times or not all(isinstance(t, (int, float)) and not isinstance(t, bool) and 0 <= t <= 1 for t in times):
        raise ValueError(f"times: expected at least one time in [0, 1], got {list(times)}")
    for name, value, least in (("seed", seed, 0), ("checkpoint_interval", checkpoint_interval, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    run = _Run(
        decoder, list(given), times, seed, Path(checkpoint) if checkpoint is not None else None, checkpoint_interval
    )
    sizes = [len(samples) if isinstance(samples, Sized) else None for samples in given.values()]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    with torch.no_grad(), without_autocast(decoder.device), _bar(total, progress) as bar:
        for task, samples in given.items():
            bar.set_postfix_str(task)
            run.accumulate(task, samples, bar)
    states = {task: run.states[task] for task in given}
    calibration = measured(states, run.observer.down, run.observer.drawing_down, times)
    notes = {"samples": {task: state.samples for task, state in states.items()}, "seed": seed}
    plan = TaskPlan.from_calibration(
        calibration, estimator=estimator, ratio=ratio, multiple=multiple, model=model, notes=notes
    )
    run.finish(keep_checkpoint)
    return plan


def _given(generation: Any, understanding: Any, tasks: Any) -> dict[str, Iterable[Any]]:
    """The given tasks by name, without empty ones."""
    given = {"generation": generation, "understanding": understanding}
    named = {task: s for task, s in given.items() if not (isinstance(s, Sized) and len(s) == 0)}
    for task, samples in (tasks or {}).items():
        if not isinstance(task, str) or not task:
            raise ValueError(f"tasks: expected names, got {task!r}")
        if task in named:
            raise ValueError(f"tasks: {task!r} is given twice")
        named[task] = samples
    if not named:
        raise ValueError("generation, understanding, tasks: expected samples of at least one task, got none")
    for task, samples in named.items():
        if not isinstance(samples, Iterable):
            raise TypeError(f"{task}: expected an iterable of samples, got {type(samples).__name__}")
    return named


class _Run:
    """One calibration run: the states of its tasks and their checkpoint."""

    def __init__(
        self,
        decoder: Decoder,
        tasks: list[str],
        times: tuple[float, ...],
        seed: int,
        checkpoint: Path | None,
        interval: int,
    ):
        self.times, self.seed, self.checkpoint, self.interval = times, seed, checkpoint, interval
        self.decoder = decoder
        self.parts = adapter_of(decoder.model) if family_of(decoder.model) else None
        own: tuple[Any, ...] = self.parts.samples if self.parts is not None else ()
        self.types = own if TokenSample in own else (*own, TokenSample)
        self.observer = _Observer(decoder, self.parts)
        self.states: dict[str, TaskState] = {}
        layers, intermediate = self.observer.down.absolute.shape
        # All that the sums depend on. Ratio, multiple and estimator are applied afterwards.
        self.settings = {
            "tasks": tasks,
            "times": list(times),
            "seed": seed,
            "layers": layers,
            "intermediate": intermediate,
            "dtype": str(decoder.dtype),
            "fingerprint": model_fingerprint(decoder.model),
        }
        if checkpoint is not None:
            if not checkpoint.absolute().parent.is_dir():
                raise FileNotFoundError(f"checkpoint: expected a file in an existing folder, got {str(checkpoint)!r}")
            if checkpoint.exists():
                self.states = load_states(checkpoint, self.settings, decoder.device)
        self.unsaved = 0

    def accumulate(self, task: str, samples: Iterable[Any], bar: Any) -> None:
        """Read a task's samples and accumulate those not in the checkpoint."""
        before = self.states.get(task)
        seen, digest, index = (before.samples if before else 0), "", -1
        for index, sample in enumerate(samples):
            self._check(task, index, sample)
            if self.checkpoint is not None:
                digest = chained_digest(digest, sample)
            if index < seen:
                if index == seen - 1 and before is not None and digest != before.digest:
                    raise ValueError(
                        f"{self.checkpoint}: checkpoint of other samples: the first {seen} of {task} differ"
                    )
            else:
                self._add(task, index, sample, digest)
            bar.update()
        if index + 1 == 0:
            raise ValueError(f"{task}: expected at least one sample, got none")
        if index + 1 < seen:
            raise ValueError(f"{self.checkpoint}: checkpoint of {seen} samples of {task}, got {index + 1}")

    def finish(self, keep: bool) -> None:
        if self.checkpoint is not None and keep:
            save_states(self.checkpoint, self.settings, self.states)
        elif self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)

    def _check(self, task: str, index: int, sample: Any) -> None:
        state = self.states.get(task)
        kind = state.kind if state else task if task in KINDS else None
        if isinstance(sample, Sample) and sample.family not in (None, self.parts and self.parts.family):
            family = FAMILIES.get(sample.family or "")
            expected, got = family.name if family else sample.family, type(self.decoder.model).__name__
            raise TypeError(f"{task}[{index}]: model: expected a {expected} model, as the sample is, got {got}")
        allowed = tuple(each for each in self.types if kind in (None, each.kind))
        if not isinstance(sample, allowed):
            names = " or ".join(each.__name__ for each in allowed) or f"model with samples of {kind}"
            raise TypeError(f"{task}[{index}]: expected a {names}, got {type(sample).__name__}")
        for field in fields(sample):
            value = getattr(sample, field.name)
            if field.type in ("Tensor", Tensor) and not isinstance(value, Tensor):
                raise TypeError(f"{task}[{index}].{field.name}: expected a tensor, got {type(value).__name__}")

    def _add(self, task: str, index: int, sample: Any, digest: str) -> None:
        state = self.states.get(task)
        if state is None:
            shape = self.observer.down.absolute.shape
            state = TaskState.build(sample.kind, shape[0], shape[1], len(self.times), self.decoder.device)
            self.states[task] = state
        try:
            with self.observer.watching(state):
                for each in self._passes(sample, lambda t, like: self._noise(task, index, t, like)):
                    self.observer.run(each)
        except (TypeError, ValueError, IndexError) as error:
            kind_of_error = next(base for base in (TypeError, ValueError, IndexError) if isinstance(error, base))
            raise kind_of_error(f"{task}[{index}]: {error}") from error
        state.samples, state.digest = index + 1, digest
        self.unsaved += 1
        if self.checkpoint is not None and self.unsaved >= self.interval:
            save_states(self.checkpoint, self.settings, self.states)
            self.unsaved = 0

    def _passes(self, sample: Any, noise: Noise) -> Iterator[DensePass]:
        if self.parts is not None and isinstance(sample, self.parts.samples):
            return self.parts.passes(sample, self.times, noise)
        return text_passes(self.decoder.stack, sample)

    def _noise(self, task: str, index: int, t: float, like: Tensor) -> Tensor:
        """Noise of a sample at a time, from its own seed: a resumed run samples the same noise."""
        digest = hashlib.sha256(f"{self.seed}/{task}/{index}/{float(t)!r}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu").to(like)


class _Observer:
    """Accumulates activations of a model's layers in a task's state, by hooks."""

    def __init__(self, decoder: Decoder, parts: Adapter | None):
        self.decoder = decoder
        self.down = DownNorms.from_projections([ffn.down_proj for ffn in decoder.ffns])
        self._experts = [layer.mlp for layer in parts.experts] if parts is not None else []
        self._expert_norm = parts.expert_norm if parts is not None else None
        self.drawing_down: DownNorms | None = None
        if self._experts:
            self.drawing_down = DownNorms.from_projections([ffn.down_proj for ffn in self._experts])
        self._norms = _supported(ops.neuron_norms_, reference.neuron_norms_, decoder)
        self._importance = _supported(ops.cosine_importance, reference.cosine_importance, decoder)
        self._state: TaskState | None = None
        self._pass: DensePass | None = None
        self._values: list[list[Tensor]] = []
        """Importance of the counted tokens, for each layer of each of its calls in the pass."""

    def run(self, each: DensePass) -> None:
        """Accumulate a pass."""
        state = self._state
        assert state is not None, "run is called inside `watching`"
        self._values = [[] for _ in self.decoder.layers]
        self._pass = each
        try:
            each.run()
        finally:
            self._pass = None
        for layer, calls in enumerate(self._values):
            values = torch.cat(calls)
            if state.kind == "generation":
                state.importance[each.row, layer] += values.mean()
            else:
                state.importance[0, layer] += values[-1 - each.answer]
                state.mean_importance[layer] += values.mean()

    @contextmanager
    def watching(self, state: TaskState) -> Iterator[None]:
        """A context in which every `run` is accumulated in `state`. What else the model runs in it does not count."""
        drawn = bool(self._experts) and state.kind == "generation"
        ffns, norm = (self._experts, self._expert_norm) if drawn else (self.decoder.ffns, self.decoder.norm)
        hooks = []
        self._state = state
        try:
            for index, (layer, ffn) in enumerate(zip(self.decoder.layers, ffns, strict=True)):
                hooks.append(layer.register_forward_hook(self._layer_hook(index, norm), with_kwargs=True))
                hooks.append(ffn.down_proj.register_forward_pre_hook(self._neurons_hook(index, drawn)))
            yield
        finally:
            self._state = None
            for hook in hooks:
                hook.remove()

    def _neurons_hook(self, index: int, drawn: bool) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._pass is None:
                return
            assert self._state is not None
            # Experts compute no tokens but their own.
            counted = None if drawn else self._pass.counted
            rows = inputs[0][counted] if counted is not None else inputs[0].flatten(0, -2)
            if index == 0:
                self._state.tokens += rows.shape[0]
            # The kernel sums squares; the plain sum, needed only for the variance, is torch's, over the same rows.
            self._norms(self._state.squares[index], rows)
            self._state.total[index] += rows.sum(0, dtype=torch.float64)

        return hook

    def _layer_hook(self, index: int, norm: Any) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._pass is None:
                return
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            if index == len(self.decoder.layers) - 1:
                after = norm(after)
            values = self._importance(before, after).double()
            counted = self._pass.counted
            self._values[index].append(values[counted] if counted is not None else values.flatten())

        return hook


def _supported(kernel: Any, fallback: Any, decoder: Decoder) -> Any:
    return kernel if kernel.is_supported(decoder.device, decoder.dtype) else fallback


def _bar(total: int | None, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="calibrate", unit="sample", disable=not progress)
