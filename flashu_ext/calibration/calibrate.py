"""Runs a model on calibration samples of each task and scores its FFN neurons: the result is a TaskPlan.

Generation runs on latents noised to several times, with their prompts, under guidance; understanding runs on images with
questions and answers. Padding and tokens after an image are not counted, because no output depends on them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..models.accelerated import handle_of
from ..models.autocast import without_autocast
from ..models.masks import additive, omni_allowed
from ..models.showo2 import validate
from ..models.showo2.adapter import adapter
from ..models.showo2.understanding import prompt_embeds
from ..ops import reference
from ..planning.decoders import Decoder, decoder_of
from ..planning.estimators import DownNorms, check_estimator
from ..planning.fingerprint import model_fingerprint
from ..planning.plan import TaskPlan, check_pruning
from .state import TaskState, chained_digest, load_states, measured, save_states

__all__ = ["GenerationSample", "Sample", "TokenSample", "UnderstandingSample", "calibrate"]

DEFAULT_TIMES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class GenerationSample:
    """Images with their prompts.

    Attributes:
        latents: clean latents [B, channels, H, W].
        text_tokens, text_tokens_null: int64 [B, length].
        modality_positions, modality_positions_null: int64 [B, 1, 2].
    """

    latents: Tensor
    text_tokens: Tensor
    text_tokens_null: Tensor
    modality_positions: Tensor
    modality_positions_null: Tensor


@dataclass(frozen=True)
class UnderstandingSample:
    """One image with a question and its answer.

    Attributes:
        image_latents: [1, channels, H, W].
        tokens_before_image: int64 [1, n].
        tokens_after_boi: int64 [1, m]: boi, eoi, question and answer.
        answer_length: number of answer tokens among them. Layer importance is measured at the token before the answer, the
            last one of a prompt.
    """

    image_latents: Tensor
    tokens_before_image: Tensor
    tokens_after_boi: Tensor
    answer_length: int = 0


@dataclass(frozen=True)
class TokenSample:
    """A text, for a decoder of any kind.

    Attributes:
        tokens: int64 [1, n].
        answer_length: number of answer tokens at its end, as in `UnderstandingSample`.
    """

    tokens: Tensor
    answer_length: int = 0


Sample = GenerationSample | UnderstandingSample | TokenSample
_KINDS: Mapping[type[Any], str] = {
    GenerationSample: "generation",
    UnderstandingSample: "understanding",
    TokenSample: "understanding",
}


def calibrate(
    model: Any,
    generation: Iterable[GenerationSample] = (),
    understanding: Iterable[UnderstandingSample | TokenSample] = (),
    *,
    tasks: Mapping[str, Iterable[Sample]] | None = None,
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
        model: a Show-o2 model, or with `TokenSample`s any decoder (`planning.decoders`); not accelerated.
        generation, understanding: samples of each task, any iterable, read once and one at a time. A task without samples
            gets no neuron set.
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
    calibration = measured(states, run.observer.down, times)
    notes = {"samples": {task: state.samples for task, state in states.items()}, "seed": seed}
    plan = TaskPlan.from_calibration(
        calibration, estimator=estimator, ratio=ratio, multiple=multiple, model=model, notes=notes
    )
    run.finish(keep_checkpoint)
    return plan


def _given(generation: Any, understanding: Any, tasks: Any) -> dict[str, Iterable[Sample]]:
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
        self.observer = _Observer(decoder)
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

    def accumulate(self, task: str, samples: Iterable[Sample], bar: Any) -> None:
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
        kind = state.kind if state else task if task in _KINDS.values() else None
        allowed = tuple(cls for cls, of in _KINDS.items() if kind in (None, of))
        if not isinstance(sample, allowed):
            names = " or ".join(cls.__name__ for cls in allowed)
            raise TypeError(f"{task}[{index}]: expected a {names}, got {type(sample).__name__}")
        for field in fields(sample):
            value = getattr(sample, field.name)
            if field.type == "Tensor" and not isinstance(value, Tensor):
                raise TypeError(f"{task}[{index}].{field.name}: expected a tensor, got {type(value).__name__}")

    def _add(self, task: str, index: int, sample: Sample, digest: str) -> None:
        state = self.states.get(task)
        if state is None:
            shape = self.observer.down.absolute.shape
            kind = _KINDS[type(sample)]
            state = TaskState.build(kind, shape[0], shape[1], len(self.times), self.decoder.device)
            self.states[task] = state
        try:
            with self.observer.watching(state):
                if isinstance(sample, GenerationSample):
                    for row, t in enumerate(self.times):
                        _run_generation(self.observer, sample, t, row, self._noise(task, index, t, sample.latents))
                elif isinstance(sample, UnderstandingSample):
                    _run_understanding(self.observer, sample)
                else:
                    _run_tokens(self.observer, sample)
        except (TypeError, ValueError, IndexError) as error:
            kind_of_error = next(base for base in (TypeError, ValueError, IndexError) if isinstance(error, base))
            raise kind_of_error(f"{task}[{index}]: {error}") from error
        state.samples, state.digest = index + 1, digest
        self.unsaved += 1
        if self.checkpoint is not None and self.unsaved >= self.interval:
            save_states(self.checkpoint, self.settings, self.states)
            self.unsaved = 0

    def _noise(self, task: str, index: int, t: float, like: Tensor) -> Tensor:
        """Noise of a sample at a time, from its own seed: a resumed run samples the same noise."""
        digest = hashlib.sha256(f"{self.seed}/{task}/{index}/{float(t)!r}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu").to(like)


class _Observer:
    """Accumulates activations of a model's layers in a task's state, by hooks."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.down = DownNorms.from_projections([ffn.down_proj for ffn in decoder.ffns])
        self._norms = _supported(ops.neuron_norms_, reference.neuron_norms_, decoder)
        self._importance = _supported(ops.cosine_importance, reference.cosine_importance, decoder)
        self._state: TaskState | None = None
        self._counted: Tensor | None = None
        self._row = 0
        self._last: int | None = None
        self._into_last_layer: Tensor | None = None

    def run(self, inputs: Mapping[str, Tensor], counted: Tensor | None, row: int, last: int | None) -> None:
        """One pass of the decoder.

        Args:
            inputs: of the decoder: `inputs_embeds` [rows, length, hidden], or `input_ids`, and `attention_mask`.
            counted: bool [rows, length], tokens that count; None: all.
            row: of the state's importance.
            last: position whose importance is recorded; None: the mean over counted tokens.
        """
        assert self._state is not None, "run is called inside `watching`"
        self._counted, self._row, self._last = counted, row, last
        rows, length = next(iter(inputs.values())).shape[:2]
        self._state.tokens += int(counted.sum()) if counted is not None else rows * length
        # Without lm_head and diffusion head, which do not affect the language model's activations.
        self.decoder.stack(**inputs, use_cache=False)

    @contextmanager
    def watching(self, state: TaskState) -> Iterator[None]:
        """A context in which every `run` is accumulated in `state`."""
        hooks = [self.decoder.norm.register_forward_hook(self._after_norm)]
        self._state = state
        try:
            for index, layer in enumerate(self.decoder.layers):
                hooks.append(layer.register_forward_hook(self._layer_hook(index), with_kwargs=True))
                hooks.append(layer.mlp.down_proj.register_forward_pre_hook(self._neurons_hook(index)))
            yield
        finally:
            self._state = self._into_last_layer = None
            for hook in hooks:
                hook.remove()

    def _neurons_hook(self, index: int) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert self._state is not None
            hidden = inputs[0]
            rows = hidden[self._counted] if self._counted is not None else hidden.flatten(0, 1)
            # The kernel sums squares; the plain sum, needed only for the variance, is torch's, over the same rows.
            self._norms(self._state.squares[index], rows)
            self._state.total[index] += rows.sum(0, dtype=torch.float64)

        return hook

    def _layer_hook(self, index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            if index == len(self.decoder.layers) - 1:
                self._into_last_layer = before
            else:
                self._add_importance(index, before, output[0] if isinstance(output, tuple) else output)

        return hook

    def _after_norm(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert self._into_last_layer is not None
        self._add_importance(len(self.decoder.layers) - 1, self._into_last_layer, output)

    def _add_importance(self, layer: int, before: Tensor, after: Tensor) -> None:
        assert self._state is not None
        values = self._importance(before, after).double()
        mean = (values[self._counted] if self._counted is not None else values).mean()
        if self._last is None:
            self._state.importance[self._row, layer] += mean
        else:
            self._state.importance[self._row, layer] += values[0, self._last]
            self._state.mean_importance[layer] += mean


def _supported(kernel: Any, fallback: Any, decoder: Decoder) -> Any:
    return kernel if kernel.is_supported(decoder.device, decoder.dtype) else fallback


def _run_generation(observer: _Observer, sample: GenerationSample, t: float, row: int, noise: Tensor) -> None:
    """One evaluation of noised latents under guidance; both branches count up to the end of their spans."""
    parts = adapter(observer.decoder.model)
    tokens = torch.cat([sample.text_tokens, sample.text_tokens_null])
    positions = torch.cat([sample.modality_positions, sample.modality_positions_null])
    latents = t * sample.latents + (1 - t) * noise
    time = torch.full((tokens.shape[0],), t, dtype=torch.float32, device=tokens.device)
    validate.check_t2i_inputs(parts.model, latents.repeat(2, 1, 1, 1), time, tokens, positions, True)
    span = parts.with_time(parts.embed_image(latents).repeat(2, 1, 1), parts.time_token(parts.embed_time(time)))
    # No counted token attends past the longest row's span, so the rest is not computed.
    end = positions[:, 0].sum(dim=-1)
    length = int(end.max())
    embeds = parts.embed_tokens(tokens[:, :length])
    for i, offset in enumerate(positions[:, 0, 0].tolist()):
        embeds[i, offset : offset + span.shape[1]] = span[i]
    counted = torch.arange(length, device=tokens.device) < end[:, None]
    observer.run(_masked(embeds, omni_allowed(positions, length)), counted, row, None)


def _run_understanding(observer: _Observer, sample: UnderstandingSample) -> None:
    """One prefill of image, question and answer."""
    model, after, answer = observer.decoder.model, sample.tokens_after_boi, sample.answer_length
    adapter(model)
    validate.check_answer_inputs(model, [sample.image_latents], sample.tokens_before_image, after, 0)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer <= after.shape[1] - 2:
        raise ValueError(f"answer_length: expected an integer in [0, {after.shape[1] - 2}], got {answer!r}")
    embeds, allowed = prompt_embeds(model, sample.image_latents, sample.tokens_before_image, after)
    observer.run(_masked(embeds, allowed[None]), None, 0, embeds.shape[1] - 1 - answer)


def _run_tokens(observer: _Observer, sample: TokenSample) -> None:
    """One pass over a text."""
    tokens, answer = sample.tokens, sample.answer_length
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] == 0:
        raise ValueError(f"tokens: expected int64 [1, n], n > 0, got {tokens.dtype} {list(tokens.shape)}")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < tokens.shape[1]:
        raise ValueError(f"answer_length: expected an integer in [0, {tokens.shape[1]}), got {answer!r}")
    observer.run({"input_ids": tokens}, None, 0, tokens.shape[1] - 1 - answer)


def _masked(embeds: Tensor, allowed: Tensor) -> dict[str, Tensor]:
    """Inputs of a decoder: embeddings [rows, length, hidden], and what each may attend to, bool [rows, length, length]."""
    return {"inputs_embeds": embeds, "attention_mask": additive(allowed, embeds.dtype)[:, None]}


def _bar(total: int | None, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="calibrate", unit="sample", disable=not progress)
