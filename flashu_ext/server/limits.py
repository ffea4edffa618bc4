"""What a server takes, and for how long it waits."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..planning.groups import is_int, is_real
from ..planning.reading import shown

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Limits of a server; each is an option of `flashu-ext serve`.

    Attributes:
        at_once: images, and answers, in progress together.
        waiting: images, and answers, that may wait for their turn; further ones are refused by 429.
        body_bytes: of a request.
        bodies_bytes: of all bodies that are held at a time; what would exceed it is refused by 429.
        image_bytes: of an image's file.
        image_pixels: of a question's images together, which small files may exceed.
        images: of a question.
        prompt_characters: of a prompt or a question.
        n: images of one request.
        side: pixels of a side of an image that is drawn.
        steps: grid points of an image.
        tokens: of an answer.
        request_seconds: from the whole request to its result.
        read_seconds: for a client to send a request's head, and then its body.
        refusal_seconds: that the reply to a wrong request is held back at most, where many come.
        write_seconds: for a client to take what waits for it.
        connections: open at a time; a request on a further one is refused by 503.
    """

    at_once: int = 8
    waiting: int = 32
    body_bytes: int = 16 << 20
    bodies_bytes: int = 256 << 20
    image_bytes: int = 8 << 20
    image_pixels: int = 1 << 24
    images: int = 8
    prompt_characters: int = 8000
    n: int = 4
    side: int = 2048
    steps: int = 200
    tokens: int = 512
    request_seconds: float = 300.0
    read_seconds: float = 30.0
    refusal_seconds: float = 1.0
    write_seconds: float = 60.0
    connections: int = 512

    def __post_init__(self) -> None:
        """Raises ValueError, naming the limit."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_seconds"):
                if not is_real(value) or value <= 0:
                    raise ValueError(f"{field.name}: expected seconds > 0, got {shown(value)}")
            elif not is_int(value) or value < (0 if field.name == "waiting" else 1):
                least = 0 if field.name == "waiting" else 1
                raise ValueError(f"{field.name}: expected an integer >= {least}, got {shown(value)}")
        if self.n > self.at_once + self.waiting:
            most = self.at_once + self.waiting
            raise ValueError(f"n: expected at most {most}, which is at_once + waiting, got {self.n}")
        if self.body_bytes > self.bodies_bytes:
            raise ValueError(f"bodies_bytes: expected at least body_bytes = {self.body_bytes}, got {self.bodies_bytes}")
