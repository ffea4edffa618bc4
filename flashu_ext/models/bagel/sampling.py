"""The sampler: a shifted time grid, up to three branches of guidance, renormalisation, and TaylorSeer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...planning.config import FlashUConfig
from ...planning.groups import real, steps_of
from ..checks import check_callback, check_own, check_tensor
from ..sampling import Callback, DrawInputs, Formula, Segment, Stepper, TaylorSeer, integrate, stepper_of
from .config import BagelConfig, config_of
from .latents import grid_of
from .layers import Context
from .model import Bagel, Image, Text, TokenIds

__all__ = [
    "MARKERS",
    "Guidance",
    "SampleInputs",
    "TaylorSeer",
    "extent",
    "guided",
    "begin",
    "sample",
    "taylor_prediction",
    "tokens_of",
    "time_grid",
]

DEFAULT_TIMESTEPS = 50
RENORMS = ("global", "channel", "text_channel")
SMALLEST_NORM = 1e-8

MARKERS = 2
"""Around a text, and around an image."""


@dataclass(frozen=True)
class Guidance:
    """How the branches' velocities are combined.

    Attributes:
        text: scale against the context without the text at its end; at most 1: no guidance at all, whatever `image` is.
        image: scale against the texts alone; at most 1: that branch is not computed.
        interval: (low, high): guided where low < t <= high.
        renorm: of the norm over everything ('global'), per token ('channel'), or per token before the image's guidance
            ('text_channel').
        renorm_min: lower bound of the factor that brings the guided velocity's norm back; the upper one is 1.
    """

    text: float = 4.0
    image: float = 1.0
    interval: tuple[float, float] = (0.4, 1.0)
    renorm: str = "global"
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for settings that mean nothing."""
        for name, value in (("cfg_text_scale", self.text), ("cfg_img_scale", self.image)):
            if real(value) is None or value < 0:
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
        if len(self.interval) != 2 or None in map(real, self.interval) or self.interval[0] > self.interval[1]:
            raise ValueError(f"cfg_interval: expected (low, high), low <= high, got {self.interval!r}")
        object.__setattr__(self, "interval", tuple(self.interval))  # a list is welcome, and guidance is hashed
        if self.renorm not in RENORMS:
            raise ValueError(f"cfg_renorm_type: expected one of {', '.join(RENORMS)}, got {self.renorm!r}")
        if real(self.renorm_min) is None or not 0 <= self.renorm_min <= 1:
            raise ValueError(f"cfg_renorm_min: expected a number in [0, 1], got {self.renorm_min!r}")

    def check_forecast(self, seer: TaylorSeer | None) -> None:
        """Raise ValueError where guidance begins later than TaylorSeer, whose state is one for all branches: upstream's counts a
        branch's own evaluations."""
        if seer is not None and self.text > 1 and self.interval[1] < 1:
            raise ValueError(
                f"cfg_interval: expected to reach 1, the time of noise, with taylorseer, got {self.interval}"
            )

    def branches(self, t: float) -> tuple[bool, bool]:
        """Whether the branches without text and without image are needed at a time; compared in fp32, as upstream does."""
        low, at, high = torch.tensor(
            (self.interval[0], t, self.interval[1]), dtype=torch.float32, device="cpu"
        ).tolist()
        text = self.text > 1 and low < at <= high
        return text, text and self.image > 1


class _Forecast:
    """The finite differences of one branch's hidden states."""

    def __init__(self, seer: TaylorSeer):
        self._seer = seer
        self._differences: list[Tensor] = []
        self._last = 0

    def update(self, index: int, hidden: Tensor) -> None:
        new, old = [hidden], self._differences
        # The first evaluations are too far from the rest to be extrapolated from: only their last two count.
        if old and index > self._seer.first_enhance - 2:
            for earlier in old[: self._seer.max_order]:
                new.append((new[-1] - earlier) / (index - self._last))
        self._differences, self._last = new, index

    def predict(self, index: int) -> Tensor:
        return taylor_prediction(self._differences, index - self._last)


def taylor_prediction(differences: Sequence[Tensor], ahead: float) -> Tensor:
    """The Taylor polynomial of finite differences, `ahead` steps after the last value."""
    terms = [each * (ahead**order / math.factorial(order)) for order, each in enumerate(differences)]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def time_grid(num_timesteps: int, shift: float) -> Tensor:
    """fp32 [num_timesteps]: t = s u / (1 + (s - 1) u) on u from 1 to 0; 1 is noise."""
    u = torch.linspace(1, 0, num_timesteps, dtype=torch.float32, device="cpu")
    return shift * u / (1 + (shift - 1) * u)


def guided(
    full: Tensor,
    without_text: Tensor | None,
    without_image: Tensor | None,
    guidance: Guidance,
    scale: Tensor | None = None,
) -> Tensor:
    """Velocities [n, numbers] of the branches that run -> the guided one. scale: takes the place of the text's."""
    if without_text is None:
        return full
    guided = without_text + (guidance.text if scale is None else scale) * (full - without_text)
    if guidance.renorm == "text_channel":
        guided = _renormed(guided, full, guidance.renorm_min, dim=-1)
    if without_image is not None:
        guided = without_image + guidance.image * (guided - without_image)
    if guidance.renorm == "text_channel":
        return guided
    return _renormed(guided, full, guidance.renorm_min, dim=None if guidance.renorm == "global" else -1)


def _renormed(guided: Tensor, full: Tensor, least: float, dim: int | None) -> Tensor:
    """Scaled down to the norm of the full branch's."""
    # Token by token first: the order of a sum must not depend on threads.
    squares = [each.square().sum(-1, keepdim=True) for each in (full, guided)]
    norms = [(each.sum(-2, keepdim=True) if dim is None else each).sqrt() for each in squares]
    return guided * (norms[0] / (norms[1] + SMALLEST_NORM)).clamp(least, 1.0)


@torch.no_grad()
def sample(
    model: Any,
    noise: Tensor,
    inputs: Sequence[Text | Image],
    size: tuple[int, int],
    token_ids: TokenIds | Mapping[str, int],
    num_timesteps: int | None = None,
    cfg_text_scale: float = 4.0,
    cfg_img_scale: float = 1.0,
    cfg_interval: tuple[float, float] = (0.4, 1.0),
    timestep_shift: float = 3.0,
    cfg_renorm_min: float = 0.0,
    cfg_renorm_type: str = "global",
    taylorseer: TaylorSeer | None = None,
    callback: Callback | None = None,
    return_velocity: bool = False,
) -> Any:
    """Draw or edit an image: integrate the velocity from noise (t = 1) to data (t = 0).

    Args:
        model: a Bagel.
        noise: [n, numbers of a token], n = height / 16 x width / 16 of the released model.
        inputs: texts and images in order; the prompt is the last text. To edit an image give it as latents and as the image
            encoder's tokens, before the prompt.
        size: (height, width) in pixels.
        token_ids: of the markers, `TokenIds` or a mapping with its names.
        num_timesteps: grid points; one evaluation less. None: the accelerated config's, else 50.
        cfg_text_scale, cfg_img_scale, cfg_interval, cfg_renorm_min, cfg_renorm_type: see `Guidance`.
        timestep_shift: see `time_grid`.
        taylorseer: extrapolate most evaluations; its state is the image's own.
        callback: called after each step with its number (from 1) and the latent tokens, which must not be modified.
        return_velocity: also return the guided velocities.

    Returns:
        Latent tokens fp32 [n, numbers] (`Bagel.unpacked` makes latents of them), or (tokens, velocities [evaluations, n, ...]).

    Raises:
        TypeError, ValueError, IndexError: an argument is wrong; the message names it, what was expected and what was given.
    Source: upstream inferencer.py and modeling/bagel/bagel.py.
    """
    guidance = Guidance(cfg_text_scale, cfg_img_scale, cfg_interval, cfg_renorm_type, cfg_renorm_min)
    told = (num_timesteps, guidance, timestep_shift, taylorseer)
    check_callback("callback", callback)
    stepper = begin(model, noise, inputs, size, token_ids, *told)
    return tokens_of(integrate(stepper, _told(callback), return_velocity))


def begin(
    model: Any,
    noise: Tensor,
    inputs: Sequence[Text | Image],
    size: tuple[int, int],
    token_ids: TokenIds | Mapping[str, int],
    num_timesteps: int | None,
    guidance: Guidance,
    timestep_shift: float,
    taylorseer: TaylorSeer | None = None,
    config: FlashUConfig | None = None,
    adapter: str | None = None,
) -> Stepper:
    """The steps of an image, whose latents are a grid of tokens [1, numbers, H, W]; the arguments are those of `sample`.

    Args:
        config, adapter: as in `stepper_of`.
    """
    ids = check_inputs(model, inputs, token_ids)
    grid = check_size(model, noise, size)
    points = steps_of("num_timesteps", num_timesteps, 2, "grid points")
    if real(timestep_shift) is None or timestep_shift <= 0:
        raise ValueError(f"timestep_shift: expected a finite number > 0, got {timestep_shift!r}")
    if taylorseer is not None and not isinstance(taylorseer, TaylorSeer):
        raise TypeError(f"taylorseer: expected None or a TaylorSeer, got {type(taylorseer).__name__}")
    guidance.check_forecast(taylorseer)
    told = (points, guidance, timestep_shift, taylorseer)
    drawn = SampleInputs.build(config_of(model), noise, branch_inputs(inputs), grid, ids, *told)

    def dense(model: Any, drawn: SampleInputs) -> Stepper:
        return DenseStepper(model, noise, inputs, grid, ids, *told)

    return stepper_of(model, drawn, dense, config, adapter)


class DenseStepper:
    """Upstream's loop: every evaluation runs the branches whose velocity counts, one after the other."""

    def __init__(
        self,
        model: Any,
        noise: Tensor,
        inputs: Sequence[Text | Image],
        grid: tuple[int, int],
        ids: TokenIds,
        num_timesteps: int | None,
        guidance: Guidance,
        shift: float,
        seer: TaylorSeer | None,
    ):
        check_own(model, Bagel)
        self._model, self._grid, self._ids, self._guidance = model, grid, ids, guidance
        self._times = time_grid(num_timesteps or DEFAULT_TIMESTEPS, shift)
        self.evaluations = len(self._times) - 1
        counts = zip(*((True, *guidance.branches(t)) for t in self._times[:-1].tolist()), strict=True)
        contexts = branch_contexts(model, inputs, ids)
        self._branches = [_Branch(*each, seer) for each in zip(contexts, counts, strict=True)]
        self._x = noise.float()

    def step(self, index: int) -> None:
        times, x = self._times, self._x
        t = times[index : index + 1].to(x.device)
        computed = [each.velocity(self._model, index, x, t, self._grid, self._ids) for each in self._branches]
        full, without_text, without_image = computed
        assert full is not None
        self._velocity = guided(full, without_text, without_image, self._guidance)
        self._x = x - self._velocity * (times[index] - times[index + 1]).to(x.device)

    def velocity(self) -> Tensor:
        return _latents(self._velocity, self._grid)

    def latents(self) -> Tensor:
        return _latents(self._x, self._grid)

    def close(self) -> None:
        pass


class _Branch:
    """A branch of guidance of the dense sampler."""

    def __init__(self, context: Context, counts: Sequence[bool], seer: TaylorSeer | None):
        """counts: for each evaluation whether its velocity is used."""
        self.context, self.counts, self.seer = context, counts, seer
        self.forecast = None if seer is None else _Forecast(seer)

    def velocity(
        self, model: Any, index: int, x: Tensor, t: Tensor, grid: tuple[int, int], ids: TokenIds
    ) -> Tensor | None:
        """Of evaluation `index`; None where it does not count."""
        counts = self.counts[index]
        if self.forecast is not None and self.seer is not None and not self.seer.computes(index):
            return model.velocity(self.forecast.predict(index)) if counts else None
        # Later evaluations extrapolate from what is computed now.
        if not counts and (self.forecast is None or not any(self.counts[index:])):
            return None
        hidden = model.hidden(x, t, grid, self.context, ids)
        if self.forecast is not None:
            self.forecast.update(index, hidden)
        return model.velocity(hidden) if counts else None


@dataclass(frozen=True)
class _Guide:
    """`guided` as a `Formula`. Branches that see the same are one row: without images the one without image is the full one."""

    guidance: Guidance
    text: int
    """Row of the branch without text; the full one's is 0."""
    image: int | None
    """Row of the branch without image, where it counts."""

    def __call__(self, rows: Tensor, scale: Tensor) -> Tensor:
        branches = rows.float().split(1)
        without_image = None if self.image is None else branches[self.image]
        return guided(branches[0], branches[self.text], without_image, self.guidance, scale)


@dataclass(frozen=True)
class SampleInputs(DrawInputs):
    """Of BAGEL: one image, whose rows are the branches of guidance. Latents are a grid of tokens."""

    sequences: tuple[tuple[Text | Image, ...], ...]
    """What each row sees; equal items are the same objects."""
    ids: TokenIds
    guide: _Guide
    shift: float
    extents: tuple[tuple[int, int], ...]
    """Tokens of each branch's sequence, and its rotary positions."""
    forecast: TaylorSeer | None = None

    @classmethod
    def build(
        cls,
        config: BagelConfig,
        noise: Tensor,
        branches: Sequence[tuple[Text | Image, ...]],
        grid: tuple[int, int],
        ids: TokenIds,
        num_timesteps: int | None,
        guidance: Guidance,
        shift: float,
        forecast: TaylorSeer | None = None,
    ) -> SampleInputs:
        """From arguments of `sample`, which are checked.

        Args:
            config: the model's sizes.
            branches: what they see: with everything, without the text, without images; those that count.
        """
        sequences: list[tuple[Text | Image, ...]] = []
        rows: list[int] = []
        for own in branches:
            alike = [index for index, other in enumerate(sequences) if list(map(id, other)) == list(map(id, own))]
            rows.append(alike[0] if alike else len(sequences))
            if not alike:
                sequences.append(own)
            if guidance.text <= 1 or (guidance.image <= 1 and len(rows) == 2):
                break
        guide = _Guide(guidance, rows[1] if len(rows) > 1 else 0, rows[2] if len(rows) > 2 else None)
        latents = _latents(noise.float(), grid)
        span = latents[0, 0].numel() + MARKERS
        extents = []
        for own in sequences:
            items = [extent(config, item) for item in own]
            extents.append((sum(tokens for tokens, _ in items), sum(positions for _, positions in items)))
        spans = torch.tensor([[[position, span]] for _, position in extents], device=noise.device)
        longest = max(tokens for tokens, _ in extents)
        tokens = torch.zeros(len(sequences), longest + span, dtype=torch.int64, device=noise.device)
        scale = guidance.text if len(sequences) > 1 else 0.0
        told = (tuple(sequences), ids, guide, shift, tuple(extents), forecast)
        return cls(latents, tokens, spans, num_timesteps, scale, *told)

    @property
    def branches(self) -> int:
        return len(self.sequences)

    @property
    def seen(self) -> tuple[int, ...]:
        return tuple(tokens for tokens, _ in self.extents)

    def context(self, parts: Any) -> list[list[Segment]]:
        made: dict[tuple[int, ...], list[Segment]] = {}
        rows = []
        for own in self.sequences:
            row: list[Segment] = []
            position = 0
            for count, item in enumerate(own, 1):
                key = tuple(map(id, own[:count]))  # sequences that begin alike share the segments
                if key not in made:
                    made[key] = parts.segments(item, self.ids, position)
                row += made[key]
                position += extent(parts.config, item)[1]
            rows.append(row)
        return rows

    def trailing(self, parts: Any) -> Tensor:
        markers: Tensor = parts.markers(self.ids)
        return markers

    @property
    def formula(self) -> Formula | None:
        return self.guide if self.branches > 1 else None

    def guides(self, grid_points: int, config: FlashUConfig) -> list[bool]:
        times = time_grid(grid_points, self.shift)[:-1].tolist()
        scales = [config.guidance_at(index, self.guide.guidance.text) for index in range(1, grid_points)]
        return [self.guide.guidance.branches(t)[0] and scale > 1 for t, scale in zip(times, scales, strict=True)]

    def schedule(self, grid_points: int) -> tuple[Tensor, Tensor]:
        times = time_grid(grid_points, self.shift).to(self.noise.device)
        return times[:-1], times[1:] - times[:-1]


def extent(config: BagelConfig, item: Text | Image) -> tuple[int, int]:
    """Tokens of an item of a sequence, markers included, and its rotary positions."""
    if isinstance(item, Text):
        return len(item.ids) + MARKERS, len(item.ids) + MARKERS
    blocks = []
    if item.latents is not None:
        blocks.append(item.latents[0, 0].numel() // config.latent_patch**2)
    if item.vit_tokens is not None:
        blocks.append(len(item.vit_tokens))
    return sum(blocks) + MARKERS * len(blocks), len(blocks)


def tokens_of(result: Any) -> Any:
    """Latents [1, numbers, H, W], and velocities [evaluations, 1, numbers, H, W] where asked for, as packed tokens."""
    if isinstance(result, tuple):
        latents, velocities = result
        return _tokens(latents), velocities.flatten(3)[:, 0].transpose(1, 2).contiguous()
    return _tokens(result)


def _latents(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[n, numbers] -> [1, numbers, H, W]."""
    return tokens.t().reshape(1, -1, *grid)


def _tokens(latents: Tensor) -> Tensor:
    return latents.flatten(2)[0].t().contiguous()


def _told(callback: Callback | None) -> Callback | None:
    """A callback that takes the runtime's latents."""
    return None if callback is None else lambda step, latents: callback(step, _tokens(latents))


def branch_inputs(inputs: Sequence[Text | Image]) -> tuple[tuple[Text | Image, ...], ...]:
    """What the three branches see: everything; everything before the text at the end (all, where an image is the last); the
    texts alone. Source: upstream inferencer.py."""
    full = tuple(inputs)
    without_text = full[:-1] if full and isinstance(full[-1], Text) else full
    return full, without_text, tuple(item for item in full if isinstance(item, Text))


def branch_contexts(model: Any, inputs: Sequence[Text | Image], ids: TokenIds) -> tuple[Context, Context, Context]:
    """The contexts of the three branches."""
    full, without_text, texts = branch_inputs(inputs)
    before = model.context(without_text, ids)
    whole = before if len(full) == len(without_text) else model.append(before, full[-1], ids)
    return whole, before, model.context(texts, ids)


def check_inputs(model: Any, inputs: Any, token_ids: Any) -> TokenIds:
    """Raise for a sequence that the model cannot read; its marker ids."""
    config, device = config_of(model), model.vae2llm.weight.device
    if isinstance(token_ids, Mapping):
        names = set(TokenIds.__dataclass_fields__)
        if set(token_ids) != names:
            raise ValueError(f"token_ids: expected {', '.join(sorted(names))}, got {', '.join(map(str, token_ids))}")
        token_ids = TokenIds(**token_ids)
    if not isinstance(token_ids, TokenIds):
        raise TypeError(f"token_ids: expected TokenIds, got {type(token_ids).__name__}")
    for name, value in vars(token_ids).items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < config.vocab:
            raise IndexError(f"token_ids.{name}: expected a token id in [0, {config.vocab}), got {value!r}")
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(f"inputs: expected a list of Text and Image, got {type(inputs).__name__}")
    for index, item in enumerate(inputs):
        name = f"inputs[{index}]"
        if isinstance(item, Text):
            check_tensor(f"{name}.ids", item.ids, 1, "int64", device)
            if item.ids.numel() and not 0 <= int(item.ids.min()) <= int(item.ids.max()) < config.vocab:
                raise IndexError(f"{name}.ids: expected token ids in [0, {config.vocab})")
        elif isinstance(item, Image):
            _check_image(name, item, config, device)
        else:
            raise TypeError(f"{name}: expected a Text or an Image, got {type(item).__name__}")
    return token_ids


def _check_image(name: str, item: Image, config: Any, device: torch.device) -> None:
    if item.latents is None and item.vit_tokens is None:
        raise ValueError(f"{name}: expected latents, vit_tokens or both, got neither")
    if (item.vit_tokens is None) != (item.vit_position_ids is None):
        raise ValueError(f"{name}.vit_tokens, vit_position_ids: expected both or none")
    if item.latents is not None:
        check_tensor(f"{name}.latents", item.latents, 4, "a floating-point tensor", device)
        one, channels, height, width = item.latents.shape
        patch, most = config.latent_patch, config.latent_patch * config.latent_side
        whole = not (height % patch or width % patch) and 0 < height <= most and 0 < width <= most
        if one != 1 or channels != config.latent_channels or not whole:
            raise ValueError(
                f"{name}.latents: expected [1, {config.latent_channels}, H, W] with H and W multiples of {patch} up to {most}, "
                f"got {tuple(item.latents.shape)}"
            )
    if item.vit_tokens is not None:
        check_tensor(f"{name}.vit_tokens", item.vit_tokens, 2, "a floating-point tensor", device)
        check_tensor(f"{name}.vit_position_ids", item.vit_position_ids, 1, "int64", device)
        assert item.vit_position_ids is not None
        tokens, numbers = item.vit_tokens.shape
        if tokens == 0 or numbers != 3 * config.vit_patch**2 or len(item.vit_position_ids) != tokens:
            raise ValueError(
                f"{name}.vit_tokens: expected [n >= 1, {3 * config.vit_patch**2}] and as many vit_position_ids, got "
                f"{tuple(item.vit_tokens.shape)} and {len(item.vit_position_ids)}"
            )
        if not 0 <= int(item.vit_position_ids.min()) <= int(item.vit_position_ids.max()) < config.vit_side**2:
            raise IndexError(f"{name}.vit_position_ids: expected places in [0, {config.vit_side**2})")


def size_grid(model: Any, size: Any) -> tuple[int, int]:
    """The grid of latent tokens of an image of (height, width) pixels. Raises ValueError where it has none."""
    config = config_of(model)
    pixels, most = config.token_pixels, config.token_pixels * config.latent_side
    fits = isinstance(size, (list, tuple)) and len(size) == 2
    if not fits or not all(isinstance(each, int) and 0 < each <= most and each % pixels == 0 for each in size):
        raise ValueError(f"size: expected (height, width) in pixels, multiples of {pixels} up to {most}, got {size!r}")
    return grid_of((size[0], size[1]), config)


def check_size(model: Any, tokens: Any, size: Any, name: str = "noise") -> tuple[int, int]:
    """Raise for latent tokens that are not of the size; their grid."""
    rows, columns = size_grid(model, size)
    width = config_of(model).patch_width
    check_tensor(name, tokens, 2, "a floating-point tensor", model.vae2llm.weight.device)
    if tuple(tokens.shape) != (rows * columns, width):
        raise ValueError(f"{name}: expected [{rows * columns}, {width}], got {tuple(tokens.shape)}")
    return rows, columns
