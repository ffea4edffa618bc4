"""From the JSON of a request to what the model is asked for. Every argument is read, known not to matter, or refused by name."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..planning.groups import is_int, is_real
from ..planning.reading import decoded_image, printable, shown, strict_json
from .errors import ApiError, invalid
from .limits import Limits

__all__ = ["ChatArguments", "ImageArguments", "chat_arguments", "image_arguments", "read_object"]

FORMATS = ("PNG", "JPEG", "WEBP")
"""Of images that are sent."""

_DATA = re.compile(r"data:image/(?:png|jpeg|jpg|webp);base64,", re.IGNORECASE)
_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")

# These say who asks, or how the answer is kept and paid for.
IGNORED = (
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
    "store",
    "parallel_tool_calls",
)
# Arguments that this server has no other value of: name -> the values that ask for nothing.
CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([],),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}
IMAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": ("b64_json",),
    "output_format": ("png",),
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "stream": (False,),
    "partial_images": (0,),
}


@dataclass(frozen=True)
class ImageArguments:
    """Images to draw: image i of `n` has the seed `seed + i`. size: (height, width) in pixels; None: the model's own."""

    model: str
    prompt: str
    n: int
    seed: int
    size: tuple[int, int] | None
    steps: int | None
    guidance_scale: float | None


@dataclass(frozen=True)
class ChatArguments:
    """A question to answer. pictures: PIL images in RGB."""

    model: str
    pictures: list[Any]
    question: str
    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    stream: bool
    include_usage: bool


class Fields:
    """The members of a JSON object, taken one by one. null is as if it were left out, as OpenAI's API has it."""

    def __init__(self, value: Any, name: str = ""):
        if not isinstance(value, dict):
            raise invalid(name or "body", f"expected a JSON object, got {shown(value)}", "invalid_type")
        self._name = name
        self._left: dict[str, Any] = {key: item for key, item in value.items() if item is not None}

    def path(self, key: str) -> str:
        """The name of a member, for messages."""
        return f"{self._name}.{key}" if self._name else key

    def any(self, key: str) -> Any:
        """A member of any kind, or None."""
        return self._left.pop(key, None)

    def string(self, key: str, most: int, default: str | None = None) -> str:
        """A string that is not blank, of at most `most` characters; without a default it must be there."""
        value = self.any(key)
        if value is None:
            if default is None:
                raise invalid(self.path(key), "expected a string, got none", "missing_required_parameter")
            return default
        if not isinstance(value, str):
            raise invalid(self.path(key), f"expected a string, got {shown(value)}", "invalid_type")
        if len(value) > most:
            raise invalid(
                self.path(key), f"expected at most {most} characters, got {len(value)}", "string_above_max_length"
            )
        if not value.strip():
            raise invalid(self.path(key), f"expected a text, got {shown(value)}", "empty_string")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise invalid(self.path(key), f"expected Unicode, got a lone surrogate at {error.start}") from error
        return value

    def integer(self, key: str, least: int, most: int, default: int | None = None) -> Any:
        """An integer in [least, most]."""
        value = self.any(key)
        if value is None:
            return default
        if not is_int(value) or not least <= value <= most:
            raise invalid(self.path(key), f"expected an integer in [{least}, {most}], got {shown(value)}")
        return value

    def number(self, key: str, least: float, most: float, default: float | None = None, least_out: bool = False) -> Any:
        """A number in [least, most], or in (least, most]."""
        value = self.any(key)
        if value is None:
            return default
        if not is_real(value) or not least <= value <= most or (least_out and value == least):
            bracket = "(" if least_out else "["
            raise invalid(self.path(key), f"expected a number in {bracket}{least:g}, {most:g}], got {shown(value)}")
        return value

    def flag(self, key: str) -> bool:
        """true or false; false where it is left out."""
        value = self.any(key)
        if value is not None and not isinstance(value, bool):
            raise invalid(self.path(key), f"expected true or false, got {shown(value)}", "invalid_type")
        return bool(value)

    def model(self, served: Sequence[str], needed: bool) -> str:
        """The model asked for, one of those that are served; the first where none need be named."""
        value = self.any("model")
        if value is None and not needed:
            return served[0]
        if not isinstance(value, str):
            raise invalid("model", f"expected a string, got {shown(value)}", "invalid_type")
        if value not in served:
            names = " or ".join(shown(each) for each in served[:10])
            raise invalid("model", f"expected {names}, got {shown(value)}", "model_not_found", 404)
        return value

    def neutral(self, known: Mapping[str, Sequence[Any]]) -> None:
        """Take arguments that may only have the values here."""
        for key, values in known.items():
            value = self.any(key)
            if value is not None and not any(_same(value, each) for each in values):
                shown_values = " or ".join(shown(each) for each in values)
                raise invalid(
                    self.path(key),
                    f"expected {shown_values} or none, all that this server has, got {shown(value)}",
                    "unsupported_value",
                )

    def end(self, ignored: Sequence[str] = ()) -> None:
        """Refuse what is left."""
        unknown = next((key for key in self._left if key not in ignored), None)
        if unknown is not None:
            raise invalid(self.path(unknown), "unknown argument", "unknown_parameter")


def _same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def read_object(body: bytes) -> Fields:
    """A body as JSON; errors name it."""
    try:
        return Fields(strict_json(body.decode("utf-8"), "body", len(body)))
    except ValueError as error:
        message = printable(str(error))
        raise ApiError(
            400, message if message.startswith("body") else f"body: {message}", None, "invalid_json"
        ) from error


# ---- images


def image_arguments(fields: Fields, served: Sequence[str], limits: Limits) -> ImageArguments:
    """served: models that may be asked for. Raises ApiError, which names the argument."""
    model = fields.model(served, needed=False)
    n = fields.integer("n", 1, limits.n, 1)
    arguments = ImageArguments(
        model=model,
        prompt=fields.string("prompt", limits.prompt_characters),
        n=n,
        seed=fields.integer("seed", 0, 2**63 - n, 0),
        size=_size(fields, limits),
        steps=fields.integer("steps", 2, limits.steps),
        guidance_scale=fields.number("guidance_scale", 0, 100),
    )
    fields.neutral(IMAGE_NEUTRAL)
    fields.end((*IGNORED, "moderation"))
    return arguments


def _size(fields: Fields, limits: Limits) -> tuple[int, int] | None:
    text = fields.string("size", 100, "auto")
    if text == "auto":
        return None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise invalid("size", f"expected 'auto', or width x height in pixels as '512x512', got {shown(text)}")
    width, height = int(match[1]), int(match[2])
    if not 1 <= min(width, height) or max(width, height) > limits.side:
        raise invalid("size", f"expected sides of 1 to {limits.side} pixels, got {width}x{height}")
    return height, width


# ---- chat


def chat_arguments(fields: Fields, served: Sequence[str], limits: Limits) -> ChatArguments:
    """served: models that may be asked for. Raises ApiError, which names the argument. Decodes the images, which takes time."""
    model = fields.model(served, needed=True)
    most = _most_tokens(fields, limits)
    temperature = fields.number("temperature", 0, 100, 0.0)
    top_k = fields.integer("top_k", 1, 2**31 - 1)
    top_p = fields.number("top_p", 0, 1, least_out=True)
    seed = fields.integer("seed", 0, 2**63 - 1)
    stream = fields.flag("stream")
    options, include_usage = fields.any("stream_options"), False
    if options is not None:
        if not stream:
            raise invalid("stream_options", "expected with stream only")
        known = Fields(options, "stream_options")
        include_usage = known.flag("include_usage")
        known.end(("include_obfuscation",))
    messages = fields.any("messages")
    fields.neutral(CHAT_NEUTRAL)
    fields.end(IGNORED)
    pictures, question = _asked(messages, limits)  # the last, because it decodes images
    return ChatArguments(model, pictures, question, most, temperature, top_k, top_p, seed, stream, include_usage)


def _most_tokens(fields: Fields, limits: Limits) -> int:
    names = ("max_completion_tokens", "max_tokens")
    given = {name: value for name in names if (value := fields.integer(name, 1, limits.tokens)) is not None}
    if len(set(given.values())) > 1:
        raise invalid("max_tokens", f"expected max_completion_tokens or this, got {given}")
    return next(iter(given.values()), min(64, limits.tokens))


def _asked(messages: Any, limits: Limits) -> tuple[list[Any], str]:
    """Images and question of the only message."""
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", f"expected a list of messages, got {shown(messages)}", "invalid_type")
    if len(messages) > 1:
        raise invalid(
            "messages",
            f"expected one message of the user, because this model reads no earlier ones and has a system prompt of its own, got "
            f"{len(messages)}",
            "unsupported_value",
        )
    message = Fields(messages[0], "messages[0]")
    role = message.any("role")
    if role != "user":
        raise invalid("messages[0].role", f"expected 'user', got {shown(role)}", "unsupported_value")
    content = message.any("content")
    message.end(("name",))
    if isinstance(content, str) or not isinstance(content, list):
        raise invalid(
            "messages[0].content",
            f"expected a list of parts, a text and at least one image_url, got {shown(content)}",
            "invalid_type",
        )
    if len(content) > limits.images + 1:
        raise invalid(
            "messages[0].content", f"expected a text and at most {limits.images} images, got {len(content)} parts"
        )
    urls: list[tuple[str, str]] = []
    questions: list[str] = []
    for index, item in enumerate(content):
        part = Fields(item, f"messages[0].content[{index}]")
        kind = part.any("type")
        if kind == "text":
            questions.append(part.string("text", limits.prompt_characters))
        elif kind == "image_url":
            urls.append((part.path("image_url.url"), _url(part)))
        else:
            raise invalid(part.path("type"), f"expected 'text' or 'image_url', got {shown(kind)}", "unsupported_value")
        part.end()
    if len(questions) != 1:
        raise invalid("messages[0].content", f"expected one part with a text, got {len(questions)}")
    if not 1 <= len(urls) <= limits.images:
        raise invalid("messages[0].content", f"expected 1 to {limits.images} images, got {len(urls)}")
    pictures: list[Any] = []
    left = limits.image_pixels
    for name, url in urls:
        pictures.append(_picture(name, url, limits, left))
        left -= pictures[-1].width * pictures[-1].height
    return pictures, questions[0]


def _url(part: Fields) -> str:
    image = Fields(part.any("image_url"), part.path("image_url"))
    url = image.any("url")
    image.neutral({"detail": ("auto",)})
    image.end()
    if not isinstance(url, str):
        raise invalid(image.path("url"), f"expected a string, got {shown(url)}", "invalid_type")
    return url


def _picture(name: str, url: str, limits: Limits, pixels: int) -> Any:
    """The image in a data: URL. pixels: that it may have."""
    match = _DATA.match(url)
    if match is None:
        raise invalid(
            name,
            f"expected data:image/png;base64,... (or jpeg, webp), because this server fetches nothing, got {shown(url, 60)}",
            "unsupported_url",
        )
    if (len(url) - match.end()) * 3 // 4 > limits.image_bytes + 2:
        raise invalid(name, f"expected an image of at most {limits.image_bytes} bytes, got more", "image_too_large")
    try:
        content = base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(name, f"expected base64: {error}", "invalid_base64") from error
    if len(content) > limits.image_bytes:
        raise invalid(
            name, f"expected an image of at most {limits.image_bytes} bytes, got {len(content)}", "image_too_large"
        )
    try:
        return decoded_image(io.BytesIO(content), name, pixels, FORMATS)
    except ValueError as error:
        raise ApiError(400, str(error), name, "invalid_image") from error
