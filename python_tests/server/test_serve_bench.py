"""The load test runs every row, on servers in this process, and says what it leaves out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from support.serving import running

from flashu_ext.bench import serving
from flashu_ext.bench.arrivals import Settings
from flashu_ext.cli.main import cli
from flashu_ext.server.limits import Limits


@pytest.fixture
def here(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def inside(settings: Settings, at_once: int) -> Iterator[serving._Server]:
        with running(pipe, Limits(at_once=at_once, waiting=settings.requests + 64)) as server:
            yield serving._Server(server.host, server.port)

    monkeypatch.setattr(serving, "_serving", inside)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("task", ["images", "answers"])
def test_every_row_is_measured(task: str, tmp_path: Path) -> None:
    options = ["--task", task, "--requests", "4", "--steps", "4", "--tokens", "3", "--load", "0.9", "--load", "2"]
    result = CliRunner().invoke(cli, ["bench", "serve", *options, "--json", str(tmp_path / "serve.json")])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "serve.json").read_text())["results"]
    ways = [(load, way) for load in (0.9, 2.0) for way in serving.WAYS] + [(0.9, way) for way in serving.TROUBLE]
    assert [(row["load"], row["way"]) for row in rows] == ways
    assert all(len(row["latencies"]) == 4 and min(row["latencies"]) > 0 for row in rows)
    assert all(way in result.output for way in (*serving.WAYS, *serving.TROUBLE))


@pytest.mark.usefixtures("here")
def test_time_is_bounded_and_failures_are_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    report = serving.run(Settings(requests=2, steps=2), budget=0.0, say=said.append)
    assert report.results == [] and len(said) == 7 and all("left out" in text for text in said)
    with pytest.raises(RuntimeError, match="expected 200, got 400"):
        serving.run(Settings(requests=2, steps=9999))
