"""One embedded model, and one server on it, for the tests of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

import flashu_ext as fx

if TYPE_CHECKING:
    from support.serving import Running


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
    from support.serving import LIMITS, running

    with running(pipe, LIMITS) as server:
        yield server


@pytest.fixture(scope="session")
def picture(pipe: Any) -> Any:
    return pipe.generate("a red circle above a blue square", 1, 8)
