"""One embedded model, and one server on it, for the tests of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

for _needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(_needed, reason="the extra `serve` is not installed")

import flashu_ext as fx
from support.serving import LIMITS, Running, running


@pytest.fixture(scope="session")
def pipe() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    with pipe.accelerate(*pipe.preset("exact")):
        yield pipe
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def server(pipe: Any) -> Iterator[Running]:
    with running(pipe, LIMITS) as server:
        yield server


@pytest.fixture(scope="session")
def picture(pipe: Any) -> Any:
    return pipe.generate("a red circle above a blue square", 1, 8)
