"""Makes the support modules importable, and runs tests of small models on one thread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flashu_ext.planning.groups import Execution

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def shared_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a batch share one state, as on a GPU, where the config does not say otherwise."""
    monkeypatch.setattr(Execution, "invariant_on", lambda self, device: self.batch_invariant is True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small models are slower on several threads: the synchronisation costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
