"""What a server counts, in Prometheus' text form."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..planning.extras import extra
from .worker import Worker

with extra("serve"):
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one application, in a registry of their own.

    Attributes:
        requests: by route and status; 499 are those whose client went away.
        seconds: of requests by route, from the head to the end of the reply.
        images, tokens: that were sent to clients. given_up: images and answers whose client went away or ran out of time.
        unanswered: requests that were cancelled because the server stops.
    """

    def __init__(self, workers: Mapping[str, Worker]):
        self.unanswered = 0
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("flashu_requests", "Requests", ["route", "status"], registry=registry)
        self.seconds = Histogram("flashu_request_seconds", "Time", ["route"], buckets=SECONDS, registry=registry)
        self.images = Counter("flashu_images", "Images drawn", registry=registry)
        self.tokens = Counter("flashu_tokens", "Tokens of answers", registry=registry)
        self.given_up = Counter("flashu_given_up", "Cancelled, by kind", ["kind"], registry=registry)
        asked = Gauge("flashu_asked", "Not ended, in progress or waiting", ["kind"], registry=registry)
        under_way = Gauge("flashu_in_progress", "In progress together", ["kind"], registry=registry)
        failures = Gauge("flashu_failed_steps", "Steps that ended everything in progress", ["kind"], registry=registry)
        for kind, worker in workers.items():
            self.given_up.labels(kind)  # present from the start
            asked.labels(kind).set_function(partial(getattr, worker, "asked"))
            under_way.labels(kind).set_function(partial(getattr, worker, "under_way"))
            failures.labels(kind).set_function(partial(getattr, worker, "failures"))

    def text(self) -> bytes:
        """All of them."""
        return bytes(generate_latest(self._registry))
