"""The forms of a neuron list that `bench calls` compares."""

from __future__ import annotations

import json

import torch
from click.testing import CliRunner

from flashu_ext.bench import calls


def test_every_form_computes_the_same():
    outputs = [run() for run in calls.variants(16).values()]
    shape = outputs[0].shape
    assert shape == (1, 16)
    # "one run" has as many neurons, but other ones: it shows what a short list would cost.
    for output in outputs[2:]:
        assert torch.equal(output, outputs[1])
    assert not torch.equal(outputs[0], outputs[1])


def test_the_command_writes_what_it_prints(tmp_path):
    path = tmp_path / "calls.json"
    result = CliRunner().invoke(calls.main, ["--seconds", "0", "--json", str(path)])
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())
    assert list(rows) == ["16", "1536"]
    assert all(f"{value:,.1f}" in result.output for row in rows.values() for value in row.values())
