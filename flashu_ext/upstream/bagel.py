"""BAGEL's own entry points on an accelerated model.

Upstream fills a context's cache text by text and image by image, and its drawing and answering read keys and values from it.
Here a cache only records what it is made of (`contexts`), and the runtime computes what a drawing or an answer needs. A call
of another layout than upstream's scripts make, or over a cache of unknown contents, runs upstream's own code.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.bagel.adapter import with_places
from ..models.bagel.latents import latent_places
from ..models.bagel.model import Image, Text, TokenIds
from ..models.bagel.sampling import MARKERS, Guidance, SampleInputs, TaylorSeer, tokens_of
from ..models.decoding import TokenSampler
from ..models.sampling import integrate
from ..runtime.runner import Runner
from .contexts import Call, Contents, UnknownContents, contents_of

__all__ = ["UpstreamMethods"]

Original = Callable[..., Any]

_TEXT, _VIT, _VAE = (f"forward_cache_update_{kind}" for kind in ("text", "vit", "vae"))


class UpstreamMethods:
    """The model's own methods that fill contexts, draw and answer, with their arguments and results.

    A cache is computed when it is read: after weights were written to, it is of the weights then. TaylorSeer's state is the
    image's own, while upstream's switch stays on after its first image.
    """

    evicted = 0

    def __init__(self, runner: Runner, originals: Mapping[str, Original]):
        """originals: the class's methods, bound to the model."""
        self.runner = runner
        self.originals = originals
        self._signatures = {name: inspect.signature(method) for name, method in originals.items()}
        self._texts: weakref.WeakValueDictionary[bytes, Text] = weakref.WeakValueDictionary()

    # ---- contexts

    def forward_cache_update_text(self, *args: Any, **kwargs: Any) -> Any:
        """Append a text to a context."""
        return self._append(_TEXT, args, kwargs)

    def forward_cache_update_vit(self, *args: Any, **kwargs: Any) -> Any:
        """Append an image as the image encoder reads it."""
        return self._append(_VIT, args, kwargs)

    def forward_cache_update_vae(self, *args: Any, **kwargs: Any) -> Any:
        """Append an image as the VAE encodes it."""
        return self._append(_VAE, args, kwargs)

    @torch.no_grad()
    def _append(self, method: str, args: Any, kwargs: Any) -> Any:
        arguments = self._bound(method, args, kwargs)
        cache = arguments["past_key_values"]
        with self.runner.lock.held:
            if not self.runner.active:
                return self.originals[method](**arguments)
            self.runner.ready()
            try:
                contents = contents_of(cache)
                if method == _VAE:  # it draws random numbers, so it is not put off
                    encoded = arguments["vae_model"].encode(arguments["padded_images"])
                    arguments["vae_model"] = Encoded(encoded)
                call, item = _READERS[method](self, arguments, contents)
            except UnknownContents as error:
                return self._original(method, error, arguments)
            given = {name: _kept(value) for name, value in arguments.items() if name != "past_key_values"}
            contents.append(Call(self.originals[method], given, item, *call))
            return cache

    def _text(self, arguments: Mapping[str, Any], contents: Contents) -> tuple[tuple[int, int], Text]:
        ids = arguments["packed_text_ids"].tolist()
        _check(contents, arguments, len(ids), "text_token_lens", "packed_text_indexes", key="packed_text_position_ids")
        if len(ids) < MARKERS:
            raise UnknownContents("a text without its markers")
        contents.marks("text", (ids[0], ids[-1]))
        return (len(ids), len(ids)), self._interned(ids[1:-1])

    def _interned(self, ids: Sequence[int]) -> Text:
        """Equal texts are one object, by which the runtime knows that two contexts begin alike."""
        tensor = torch.tensor(ids, dtype=torch.int64, device="cpu")
        key = tensor.numpy().tobytes()
        text = self._texts.get(key)
        if text is None or text.ids.device != self.runner.parts.device:
            self._texts[key] = text = Text(tensor.to(self.runner.parts.device))
        return text

    def _vit(self, arguments: Mapping[str, Any], contents: Contents) -> tuple[tuple[int, int], Image]:
        device = self.runner.parts.device
        tokens, places = (arguments[f"packed_vit_{name}"] for name in ("tokens", "position_ids"))
        if arguments["vit_token_seqlens"].tolist() != [len(tokens)]:
            raise UnknownContents("several images at once")
        self._check_image(arguments, contents, len(tokens), arguments["packed_vit_token_indexes"])
        contents.marks("image", tuple(arguments["packed_text_ids"].tolist()))
        image = Image(None, tokens.detach().to(device, copy=True), places.to(device, torch.int64, copy=True))
        return (len(tokens) + MARKERS, 1), image

    def _vae(self, arguments: Mapping[str, Any], contents: Contents) -> tuple[tuple[int, int], Image]:
        device, config = self.runner.parts.device, self.runner.parts.config  # type: ignore[attr-defined]
        shapes, patch = arguments["patchified_vae_latent_shapes"], config.latent_patch
        if len(shapes) != 1 or torch.any(arguments["packed_timesteps"] != 0):
            raise UnknownContents("several images at once, or noisy ones")
        rows, columns = shapes[0]
        self._check_image(arguments, contents, rows * columns, arguments["packed_vae_token_indexes"])
        contents.marks("image", tuple(arguments["packed_text_ids"].tolist()))
        _same(
            "packed_vae_position_ids", arguments, latent_places((rows, columns), config, torch.device("cpu")).tolist()
        )
        latents = arguments["vae_model"].latents[0][:, : rows * patch, : columns * patch]
        return (rows * columns + MARKERS, 1), Image(latents.detach().to(device, copy=True)[None])

    def _check_image(self, arguments: Mapping[str, Any], contents: Contents, tokens: int, indexes: Tensor) -> None:
        _check(
            contents, arguments, tokens + MARKERS, "packed_seqlens", "packed_indexes", key="packed_position_ids", step=0
        )
        _same("packed_text_indexes", arguments, [0, tokens + 1])
        if len(arguments["packed_text_ids"]) != MARKERS:
            raise UnknownContents("an image without its markers")
        if indexes.tolist() != list(range(1, tokens + 1)):
            raise UnknownContents("an image's tokens in another order")

    # ---- drawing

    @torch.no_grad()
    def generate_image(self, *args: Any, **kwargs: Any) -> Any:
        """Latent tokens of an image, as a tuple with one tensor [n, numbers]."""
        arguments = self._bound("generate_image", args, kwargs)
        with self.runner.lock.held:
            if not self.runner.active:
                return self.originals["generate_image"](**arguments)
            self.runner.ready()
            noise = arguments["packed_init_noises"]
            try:
                drawn = self._drawing(arguments, noise)
            except UnknownContents as error:
                return self._original("generate_image", error, arguments)
        tokens = tokens_of(integrate(self.runner.stepper(drawn)))
        return (tokens.to(noise.device, noise.dtype),)

    def _drawing(self, arguments: Mapping[str, Any], noise: Tensor) -> SampleInputs:
        device, config = self.runner.parts.device, self.runner.parts.config  # type: ignore[attr-defined]
        count, side = len(noise), config.latent_side
        places = arguments["packed_vae_position_ids"].tolist()
        if not places or len(places) != count or arguments["num_timesteps"] < 2:
            raise UnknownContents("several images at once, or no steps")
        grid = places[-1] // side + 1, places[-1] % side + 1
        _same("packed_vae_position_ids", arguments, latent_places(grid, config, torch.device("cpu")).tolist())
        _same("packed_seqlens", arguments, [count + MARKERS])
        try:
            guidance = Guidance(
                arguments["cfg_text_scale"],
                arguments["cfg_img_scale"],
                tuple(arguments["cfg_interval"]),
                arguments["cfg_renorm_type"],
                arguments["cfg_renorm_min"],
            )
            seer = TaylorSeer() if arguments["enable_taylorseer"] else None
            guidance.check_forecast(seer)
        except ValueError as error:  # upstream's own code takes more
            raise UnknownContents(str(error)) from error
        contents = [contents_of(arguments["past_key_values"])]
        self._check_image(arguments, contents[0], count, arguments["packed_vae_token_indexes"])
        for name, counts in (("text", guidance.text > 1), ("img", guidance.text > 1 and guidance.image > 1)):
            if counts:
                contents.append(contents_of(arguments[f"cfg_{name}_past_key_values"]))
                names = [f"cfg_{name}_{part}" for part in ("packed_query_indexes", "packed_position_ids")]
                _check(
                    contents[-1],
                    arguments,
                    count + MARKERS,
                    None,
                    names[0],
                    key=names[1],
                    step=0,
                    prefix=f"cfg_{name}_",
                )
        ids = _ids(contents, image=tuple(arguments["packed_text_ids"].tolist()))
        branches = [each.items for each in contents]
        told = (int(arguments["num_timesteps"]), guidance, float(arguments["timestep_shift"]), seer)
        return SampleInputs.build(config, noise.to(device), branches, grid, ids, *told)

    # ---- answering

    @torch.no_grad()
    def generate_text(self, *args: Any, **kwargs: Any) -> Any:
        """The start token and the words after it, without the end token: int64 [words, 1]."""
        arguments = self._bound("generate_text", args, kwargs)
        with self.runner.lock.held:
            if not self.runner.active:
                return self.originals["generate_text"](**arguments)
            self.runner.ready()
            try:
                contents, ids, sampler = self._answering(arguments)
            except UnknownContents as error:
                return self._original("generate_text", error, arguments)
            most, end = arguments["max_length"], arguments["end_token_id"]
            # Upstream computes one word more than it gives, which costs random numbers where words are drawn.
            most -= 0 if arguments["do_sample"] else 1
            items = contents.items
            images = [with_places(item) for item in items if isinstance(item, Image)]
            words: list[int] = []
            if most:
                (answer,) = self.runner.answer_tokens([images], [items], [ids], most, end, sampler)
                words = answer.tolist()
            if words and (words[-1] == end or len(words) == arguments["max_length"]):
                words.pop()
            start = arguments["packed_start_tokens"]
            fed = torch.cat([start, start.new_tensor(words)])
            contents.append(self._fed(contents, fed, arguments))
            return fed[:, None]

    def _answering(self, arguments: Mapping[str, Any]) -> tuple[Contents, TokenIds, TokenSampler]:
        contents = contents_of(arguments["past_key_values"])
        start = arguments["packed_start_tokens"].tolist()
        if len(start) != 1 or arguments["max_length"] < 1:
            raise UnknownContents("several answers at once, or none")
        _check(contents, arguments, 1, None, None, key="packed_query_position_ids")
        if any(isinstance(item, Image) and item.latents is not None for item in contents.items):
            raise UnknownContents("the context has an image as the VAE encodes it")
        if arguments["do_sample"] and not arguments["temperature"] > 0:
            raise UnknownContents("temperature 0")
        sampler = TokenSampler(float(arguments["temperature"]) if arguments["do_sample"] else 0.0)
        return contents, _ids([contents], start=start[0]), sampler

    def _fed(self, contents: Contents, words: Tensor, arguments: Mapping[str, Any]) -> Call:
        """An answer's words as the cache has them behind its context; no text, for it has no end."""
        count, length, position = len(words), contents.length, contents.position
        device = words.device
        given = {
            "packed_text_ids": words,
            "packed_text_position_ids": torch.arange(position, position + count, device=device),
            "text_token_lens": torch.tensor([count], dtype=torch.int32, device=device),
            "packed_text_indexes": torch.arange(length, length + count, device=device),
            "packed_key_value_indexes": torch.arange(length, device=device),
            "key_values_lens": torch.tensor([length], dtype=torch.int32, device=device),
        }
        return Call(self.originals[_TEXT], given, None, count, count)

    # ---- upstream's own

    def _bound(self, method: str, args: Any, kwargs: Any) -> dict[str, Any]:
        bound = self._signatures[method].bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def _original(self, method: str, reason: Exception, arguments: Mapping[str, Any]) -> Any:
        """Call the model's own method, which reads what its caches hold, and count the reason."""
        self.runner.fallbacks[f"{method}: {reason}"] += 1
        return self.originals[method](**arguments)


_READERS: Mapping[str, Callable[..., tuple[tuple[int, int], Text | Image]]] = {
    _TEXT: UpstreamMethods._text,
    _VIT: UpstreamMethods._vit,
    _VAE: UpstreamMethods._vae,
}


class Encoded:
    """Takes the VAE's place when a recorded call is made: what it has encoded."""

    def __init__(self, latents: Tensor):
        self.latents = latents

    def encode(self, images: Tensor) -> Tensor:
        return self.latents


def _kept(value: Any) -> Any:
    """An argument that the caller may write to later."""
    return value.clone() if isinstance(value, Tensor) else value


def _same(name: str, arguments: Mapping[str, Any], expected: Sequence[int]) -> None:
    if not isinstance(arguments[name], Tensor) or arguments[name].tolist() != list(expected):
        raise UnknownContents(f"{name} of another layout")


def _check(
    contents: Contents,
    arguments: Mapping[str, Any],
    count: int,
    lengths: str | None,
    indexes: str | None,
    key: str,
    step: int = 1,
    prefix: str = "",
) -> None:
    """Raise UnknownContents where a call is not over one context, whose next tokens follow its last.

    Args:
        count: tokens of the call.
        lengths, indexes, key: names of the arguments with its number of tokens, their places in the cache and their rotary
            positions, which grow by `step`.
        prefix: of the names of the context's own arguments.
    """
    length, position = contents.length, contents.position
    if lengths is not None:
        _same(lengths, arguments, [count])
    if indexes is not None:
        _same(indexes, arguments, range(length, length + count))
    _same(key, arguments, [position + step * index for index in range(count)])
    _same(f"{prefix}key_values_lens", arguments, [length])
    _same(f"{prefix}packed_key_value_indexes", arguments, range(length))


def _ids(contents: Sequence[Contents], image: tuple[int, ...] | None = None, start: int | None = None) -> TokenIds:
    """The markers' ids, which all contexts agree in; those that none has do not matter."""
    texts = {each.markers["text"] for each in contents if "text" in each.markers}
    images = {each.markers["image"] for each in contents if "image" in each.markers}
    images |= {image} if image is not None else set()
    starts = {first for first, _ in texts} | ({start} if start is not None else set())
    if len(texts) > 1 or len(images) > 1 or len(starts) > 1:
        raise UnknownContents("markers of several kinds")
    first, last = next(iter(texts), (start or 0, 0))
    return TokenIds(first, last, *next(iter(images), (0, 0)))
