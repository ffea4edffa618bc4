"""Room: calibration. Runs a model on what it really sees, per task, and scores its FFN neurons: the result is a TaskPlan.

Generation sees latents noised to several times, with their prompts, under guidance; understanding sees images, questions
and answers. Padding and the tokens behind an image are not counted: nothing that is drawn or answered depends on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops, reference
from .plan import TaskPlan
from .showo2 import validate
from .structure import Showo2Parts

__all__ = ["GenerationSample", "UnderstandingSample", "calibrate"]

DEFAULT_TIMES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class GenerationSample:
    """Images with their prompts.

    Attributes:
        latents: clean latents [B, channels, H, W]. text_tokens, text_tokens_null: int64 [B, length].
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
        image_latents: [1, channels, H, W]. tokens_before_image: int64 [1, n].
        tokens_after_boi: int64 [1, m]: boi, eoi, question, and the answer's tokens.
    """

    image_latents: Tensor
    tokens_before_image: Tensor
    tokens_after_boi: Tensor


def calibrate(
    model: Any,
    generation: Sequence[GenerationSample] = (),
    understanding: Sequence[UnderstandingSample] = (),
    *,
    ratio: float = 0.2,
    multiple: int = 64,
    times: Sequence[float] = DEFAULT_TIMES,
    seed: int = 0,
    progress: bool = True,
) -> TaskPlan:
    """Score the language model's FFN neurons for each task by Wanda: sum of abs(W_down[:, j]) times the L2 norm of neuron j.

    Args:
        model: a Show-o2 model that is not accelerated.
        generation, understanding: samples of each task; a task without samples gets no neuron set.
        ratio, multiple: pruning of the resulting plan (`TaskPlan.with_ratio` changes them later).
        times: times t in [0, 1] at which generation is seen; 0 is noise, 1 the image.
        seed: of the noise. The result is deterministic.
        progress: show a progress bar.

    Raises:
        ValueError: no samples, a time outside [0, 1], or a sample of wrong shapes. RuntimeError: the model is accelerated.
    Source: paper section 3.2; the score is that of its reference code, the inputs are not (it sees one prompt with
    placeholder image embeddings).
    """
    from .runtime import find_runner

    parts = Showo2Parts.find(model)
    if find_runner(model) is not None:
        raise RuntimeError("model: expected a model that is not accelerated; call handle.remove() first")
    if not generation and not understanding:
        raise ValueError("generation, understanding: expected samples of at least one task, got none")
    if generation and (not times or not all(0 <= t <= 1 for t in times)):
        raise ValueError(f"times: expected at least one time in [0, 1], got {list(times)}")
    for name, samples, kind in (
        ("generation", generation, GenerationSample),
        ("understanding", understanding, UnderstandingSample),
    ):
        for i, sample in enumerate(samples):
            if not isinstance(sample, kind):
                raise TypeError(f"{name}[{i}]: expected a {kind.__name__}, got {type(sample).__name__}")
    generator = torch.Generator().manual_seed(seed)
    scores: dict[str, list[Tensor]] = {}
    with torch.no_grad(), _bar(len(generation) * len(times) + len(understanding), progress) as bar:
        if generation:
            with _neuron_norms(parts) as norms:
                for sample in generation:
                    for t in times:
                        _see_generation(parts, sample, t, generator, norms)
                        bar.update()
            scores["generation"] = norms.scores()
        if understanding:
            with _neuron_norms(parts) as norms:
                for question in understanding:
                    _see_understanding(parts, question, norms)
                    bar.update()
            scores["understanding"] = norms.scores()
    return TaskPlan.from_scores(
        generation=scores.get("generation"),
        understanding=scores.get("understanding"),
        ratio=ratio,
        multiple=multiple,
        model=model,
    )


class _NeuronNorms:
    """Running sums of squares of every layer's neurons, over the tokens named by `counted`."""

    def __init__(self, parts: Showo2Parts):
        self.parts = parts
        self.counted: Tensor | None = None
        mlps = [layer.mlp for layer in parts.layers]
        self.sums = [torch.zeros(mlp.down_proj.in_features, dtype=torch.float32, device=parts.device) for mlp in mlps]
        accumulate: Any = ops.neuron_norms_
        self._accumulate = accumulate if accumulate.is_supported(parts.device, parts.dtype) else reference.neuron_norms_

    def add(self, layer: int, hidden: Tensor) -> None:
        """hidden [rows, tokens, intermediate]"""
        rows = hidden[self.counted] if self.counted is not None else hidden.flatten(0, 1)
        self._accumulate(self.sums[layer], rows)

    def scores(self) -> list[Tensor]:
        weights = [layer.mlp.down_proj.weight for layer in self.parts.layers]
        return [w.float().abs().sum(0) * total.sqrt() for w, total in zip(weights, self.sums, strict=True)]


@contextmanager
def _neuron_norms(parts: Showo2Parts) -> Iterator[_NeuronNorms]:
    """Watch the inputs of every down projection while the block runs."""
    norms = _NeuronNorms(parts)
    hooks = []
    try:
        for index, layer in enumerate(parts.layers):

            def hook(_module: nn.Module, inputs: tuple[Tensor, ...], index: int = index) -> None:
                norms.add(index, inputs[0])

            hooks.append(layer.mlp.down_proj.register_forward_pre_hook(hook))
        yield norms
    finally:
        for handle in hooks:
            handle.remove()


def _see_generation(
    parts: Showo2Parts, sample: GenerationSample, t: float, generator: torch.Generator, norms: _NeuronNorms
) -> None:
    """One evaluation of noised latents under guidance, both halves counted up to the end of their spans."""
    tokens = torch.cat([sample.text_tokens, sample.text_tokens_null])
    positions = torch.cat([sample.modality_positions, sample.modality_positions_null])
    noise = torch.randn(sample.latents.shape, generator=generator).to(sample.latents)
    latents = (t * sample.latents + (1 - t) * noise).repeat(2, 1, 1, 1)
    time = torch.full((tokens.shape[0],), t, dtype=torch.float32, device=tokens.device)
    validate.check_t2i_inputs(parts.model, latents, time, tokens, positions, True)
    end = positions[:, 0].sum(dim=-1, keepdim=True)
    norms.counted = torch.arange(tokens.shape[1], device=tokens.device) < end
    parts.model.t2i_generate(
        image_latents=latents,
        t=time,
        text_tokens=tokens,
        attention_mask=_additive(validate.omni_allowed(positions, tokens.shape[1])[:, None], parts.dtype),
        modality_positions=positions,
        max_seq_len=tokens.shape[1],
        guidance_scale=1.0,
    )


def _see_understanding(parts: Showo2Parts, sample: UnderstandingSample, norms: _NeuronNorms) -> None:
    """One prefill of image, question and answer."""
    from .showo2.understanding import prompt_embeds

    embeds, allowed = prompt_embeds(
        parts.model, sample.image_latents, sample.tokens_before_image, sample.tokens_after_boi
    )
    norms.counted = None
    parts.model.showo(inputs_embeds=embeds, attention_mask=_additive(allowed[None, None], parts.dtype), use_cache=False)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def _bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="calibrate", unit="pass", disable=not progress)
