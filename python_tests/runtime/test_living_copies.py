"""What leaves an accelerated model, in files, copies and other processes: dense, in the model's own order."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.living import PRUNED, UP, State, accelerated, equal, outputs, outputs_to, plan, same, state
from support.models import small_model

import flashu_ext as fx
from flashu_ext.models.accelerated import handle_of

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(model: Any) -> State:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()))


def pickled(model: Any) -> State:
    return state(pickle.loads(pickle.dumps(model)))


def part_copied(model: Any) -> State:
    ffn = copy.deepcopy(model.showo.model.layers[2].mlp)
    return {**state(model), UP: ffn.up_proj.weight.detach()}


OUT: dict[str, Callable[[Any], State]] = {
    "state_dict": state,
    "torch.save": saved,
    "deepcopy": lambda model: state(copy.deepcopy(model)),
    "deepcopy of an FFN": part_copied,
    "pickle": pickled,
}


@pytest.mark.parametrize("way", OUT)
def test_what_leaves_the_model_is_in_its_own_order(way: str) -> None:
    model, handle, before = accelerated()
    generated = outputs(model)
    assert same(OUT[way](model), before)
    assert equal(outputs(model), generated)
    handle.remove()
    assert same(state(model), before)


def test_files_of_an_accelerated_model_are_those_of_the_dense_one(tmp_path: Any) -> None:
    model, _, before = accelerated()
    model.save_pretrained(tmp_path)
    assert same(state(fx.showo2.Showo2.from_pretrained(tmp_path)), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_dense_and_on_its_own(copied: Callable[[Any], Any]) -> None:
    model, _, before = accelerated()
    generated = outputs(model)
    clone = copied(model)
    assert handle_of(clone) is None and "t2i_generate" not in vars(clone)
    assert equal(outputs(clone), outputs(small_model()))
    with fx.accelerate(clone, PRUNED, plan()):
        assert equal(outputs(clone), generated)
    with torch.no_grad():
        clone.get_parameter(UP).zero_()
    assert equal(outputs(model), generated) and same(state(model), before)


def test_a_process_that_is_started_with_the_model_gets_the_dense_one() -> None:
    model, handle, before = accelerated()
    generated = outputs(model)
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    process = context.Process(target=outputs_to, args=(queue, model))
    process.start()
    dense, weights, *got = queue.get(timeout=120)
    process.join(60)
    assert dense and same({name: torch.from_numpy(value) for name, value in weights.items()}, before)
    assert equal(tuple(map(torch.from_numpy, got)), outputs(small_model()))
    assert equal(outputs(model), generated)
    handle.remove()
    assert same(state(model), before)


def test_handles_of_pipelines_and_of_what_has_none() -> None:
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    assert fx.handle_of(pipe) is None
    with pipe.accelerate() as handle:
        assert fx.handle_of(pipe) is handle and fx.handle_of(pipe.model) is handle
    assert fx.handle_of(pipe) is None
    for other in (3, None, "nano"):
        with pytest.raises(TypeError, match="model: expected a model or a pipeline, got"):
            fx.handle_of(other)


def test_a_pipelines_copy_is_dense_and_its_pickle_is_refused() -> None:
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    before = state(pipe.model)
    with pipe.accelerate(*pipe.preset("paper")) as handle:
        clone, shallow = copy.deepcopy(pipe), copy.copy(pipe)
        assert fx.handle_of(clone) is None and same(state(clone.model), before)
        assert fx.handle_of(shallow) is handle
        image = pipe.generate("a red circle", steps=None)
        with clone.accelerate(*clone.preset("paper")):
            assert clone.generate("a red circle", steps=None).tobytes() == image.tobytes()
        with pytest.raises(TypeError, match="pipeline: it cannot be pickled"):
            pickle.dumps(pipe)
        with torch.no_grad():
            clone.model.showo.model.norm.weight.zero_()
    assert same(state(pipe.model), before)
