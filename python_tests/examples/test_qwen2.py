"""The example of one op in a model of transformers, and what it says where the results differ."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "qwen2.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("qwen2_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("keep", ["0.8", "0.01"])
def test_the_neurons_kept_are_those_cut_out(example, keep: str, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qwen2.py", "--keep", keep])
    example.main()
    assert "logits differ by" in capsys.readouterr().out


def test_other_neurons_are_noticed(example, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qwen2.py"])
    keep = example.keep_neurons
    monkeypatch.setattr(example, "keep_neurons", lambda model, runs: keep(model, [(1, 400), (500, 418)]))
    with pytest.raises(SystemExit):
        example.main()


def test_training_is_refused_by_name(example):
    model = example.Qwen2ForCausalLM(example.CONFIG)
    example.keep_neurons(model, [(8, 40)])
    with pytest.raises(NotImplementedError, match="no backward"):
        model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
