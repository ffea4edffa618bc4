"""One accelerated model in many threads and forked processes: the bits of a serial run, or a named error."""

from __future__ import annotations

import multiprocessing
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.models import generation_inputs, small_model
from support.work import (
    STEPS,
    accelerate,
    answer,
    answer_as_upstream,
    everything,
    generate,
    generate_as_upstream,
    plan,
    settings,
)
from torch import Tensor

import flashu_ext as fx
from flashu_ext import reference
from flashu_ext.models.showo2.sampling import DenseStepper, SampleInputs

Job = tuple[str, int]
THREADS = 4
WAIT = 120.0


def streamed(model: Any, seed: int) -> Tensor:
    """An answer as streamed, token by token."""
    tokens: list[int] = []
    answer(model, seed, on_token=lambda _, token: tokens.append(token))
    return torch.tensor(tokens)


KINDS: dict[str, Callable[[Any, int], Tensor]] = {
    "generate": generate,
    "generate as upstream": generate_as_upstream,
    "answer": answer,
    "answer as upstream": answer_as_upstream,
    "stream": streamed,
}


def run(model: Any, job: Job) -> Tensor:
    kind, seed = job
    return KINDS[kind](model, seed)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("setting", ["exact", "paper", "adaptive"])
def test_threads_get_the_bits_of_a_serial_run(setting: str) -> None:
    model = small_model()
    jobs = [(kind, seed) for kind in KINDS for seed in (1, 2, 3)]
    with accelerate(model, setting) as handle:
        expected = {job: run(model, job) for job in jobs}
        shuffled = random.Random(0).sample(jobs * 3, len(jobs) * 3)
        with ThreadPoolExecutor(THREADS) as pool:
            for job, got in zip(shuffled, pool.map(lambda job: run(model, job), shuffled), strict=True):
                assert torch.equal(got, expected[job]), job
        assert handle.summary().evicted == 0


@pytest.mark.usefixtures("one_thread")
def test_threads_with_one_prompt_generate_their_own_images() -> None:
    """With upstream's loop, which passes the same tensors in every call."""
    model = small_model()
    inputs = generation_inputs(model)
    noises = [
        torch.randn(inputs["noise"].shape, generator=torch.Generator().manual_seed(seed)) for seed in range(THREADS)
    ]
    built = [SampleInputs.build(model, **{**inputs, "noise": noise}, steps=STEPS) for noise in noises]
    steppers = [DenseStepper(model, each) for each in built]
    for stepper in steppers[1:]:
        object.__setattr__(stepper.inputs, "tokens", steppers[0].inputs.tokens)
        object.__setattr__(stepper.inputs, "positions", steppers[0].inputs.positions)
        stepper._mask = steppers[0]._mask

    together = threading.Barrier(THREADS)

    def one(stepper: DenseStepper, with_others: bool) -> Tensor:
        for index in range(stepper.evaluations):
            if with_others:
                together.wait(WAIT)
            stepper.step(index)
        return stepper.latents()

    with accelerate(model, "paper"):
        expected = [one(DenseStepper(model, each), with_others=False) for each in built]
        with ThreadPoolExecutor(THREADS) as pool:
            got = list(pool.map(lambda stepper: one(stepper, with_others=True), steppers))
    for mine, serial in zip(got, expected, strict=True):
        assert torch.equal(mine, serial)


@pytest.mark.usefixtures("one_thread")
def test_a_summary_may_be_asked_for_during_work() -> None:
    model = small_model()
    with accelerate(model, "adaptive") as handle, ThreadPoolExecutor(3) as pool:
        work = [
            pool.submit(run, model, job) for job in [("generate", 1), ("stream", 1), ("generate as upstream", 2)] * 4
        ]
        while not all(each.done() for each in work):
            assert sum(handle.summary().steps.values()) <= STEPS - 1
        for each in work:
            each.result()


@pytest.mark.usefixtures("one_thread")
def test_remove_during_an_image_is_named_and_the_model_restored() -> None:
    model, dense = small_model(), small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    handle = accelerate(model, "paper")
    begun, removed = threading.Event(), threading.Event()

    def callback(step: int, latents: Tensor) -> None:
        begun.set()
        assert removed.wait(WAIT)

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(fx.showo2.sample, model, **generation_inputs(model), steps=STEPS, callback=callback)
        assert begun.wait(WAIT)
        handle.remove()
        removed.set()
        with pytest.raises(RuntimeError, match="its handle was removed"):
            work.result(WAIT)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(generate(model, 1), generate(dense, 1))


@pytest.mark.usefixtures("one_thread")
def test_remove_waits_for_an_answer() -> None:
    model = small_model()
    handle = accelerate(model, "paper")
    expected = answer(model, 1)
    begun, removers = threading.Event(), ThreadPoolExecutor(1)
    removal: list[Any] = []

    def on_token(_: int, token: int) -> None:
        if not begun.is_set():
            begun.set()
            removal.append(removers.submit(handle.remove))
        assert not removal[0].done()

    got = answer(model, 1, on_token=on_token)
    removal[0].result(WAIT)
    removers.shutdown()
    assert torch.equal(got, expected) and not handle.active


@pytest.mark.usefixtures("one_thread")
def test_remove_from_a_callback_is_named() -> None:
    model = small_model()
    handle = accelerate(model, "paper")
    with pytest.raises(RuntimeError, match="its handle was removed"):
        answer(model, 1, on_token=lambda *_: handle.remove())
    assert fx.handle_of(model) is None and torch.equal(answer(model, 1), answer(small_model(), 1))


@pytest.mark.usefixtures("one_thread")
def test_of_threads_that_accelerate_and_remove_one_is_first() -> None:
    model, chosen, config = small_model(), plan(small_model()), settings("exact")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(10):
        together = threading.Barrier(THREADS)

        def one(_: int, together: threading.Barrier = together) -> fx.Handle | str:
            together.wait(WAIT)
            try:
                return fx.accelerate(model, config, chosen)
            except RuntimeError as error:
                return str(error)

        with ThreadPoolExecutor(THREADS) as pool:
            results = list(pool.map(one, range(THREADS)))
        handles = [each for each in results if isinstance(each, fx.Handle)]
        assert len(handles) == 1 and fx.handle_of(model) is handles[0]
        assert all("already accelerated" in each for each in results if isinstance(each, str))
        with ThreadPoolExecutor(THREADS) as pool:
            for removal in [pool.submit(handles[0].remove) for _ in range(THREADS)]:
                removal.result(WAIT)
        assert vars(model).keys() == vars(small_model()).keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.usefixtures("one_thread")
def test_a_model_that_is_accelerated_meanwhile_is_ready() -> None:
    """A thread that finds the handle before `accelerate` has returned waits for it."""
    model = small_model()
    with accelerate(model, "exact"):
        expected = generate(model, 1)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            if fx.handle_of(model) is not None:
                try:
                    torch.testing.assert_close(generate(model, 1), expected)
                except RuntimeError as error:
                    assert "its handle was removed" in str(error)

    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(work) for _ in range(2)]
        for _ in range(15):
            with accelerate(model, "exact"):
                assert torch.equal(generate(model, 1), expected)
        stop.set()
        for worker in workers:
            worker.result(WAIT)


# ---- fork


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Starts threads for parallel regions: a forked process does not inherit them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def forked(target: Callable[[], None]) -> int | None:
    """Exit code of a forked process, None if it hangs."""
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(WAIT)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def use_threads() -> tuple[Tensor, Tensor]:
    """Runs a kernel of this library and torch's matrix product, both large enough for several threads."""
    x = torch.linspace(-1, 1, 1 << 20, dtype=torch.float32).view(1024, 1024)
    return fx.ops.rms_norm(x, x[0].contiguous(), 1e-6), x @ x


@pytest.mark.usefixtures("two_threads")
def test_kernels_work_in_a_forked_process() -> None:
    expected = use_threads()
    x = torch.linspace(-1, 1, 1 << 20, dtype=torch.float32).view(1024, 1024)
    torch.testing.assert_close(expected[0], reference.rms_norm(x, x[0].contiguous(), 1e-6))

    def child() -> None:
        for mine, parents in zip(use_threads(), expected, strict=True):
            assert torch.equal(mine, parents)
        assert forked(grandchild) == 0

    def grandchild() -> None:
        assert torch.equal(use_threads()[1], expected[1])

    assert forked(child) == 0
    for mine, before in zip(use_threads(), expected, strict=True):
        assert torch.equal(mine, before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("setting", ["exact", "paper"])
def test_a_forked_process_generates_and_answers(setting: str) -> None:
    model = small_model()
    with accelerate(model, setting) as handle:
        expected = everything(model)
        use_threads()

        def child() -> None:
            for name, tensor in everything(model).items():
                assert torch.equal(tensor, expected[name]), name
            handle.remove()
            assert fx.handle_of(model) is None

        assert forked(child) == 0
        assert handle.active and torch.equal(generate(model, 1), expected["generated"])


@pytest.mark.usefixtures("two_threads")
def test_a_forked_process_works_while_other_threads_of_its_parent_did() -> None:
    model = small_model()
    with accelerate(model, "paper"), ThreadPoolExecutor(2) as pool:
        expected = everything(model)
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                everything(model)

        def child() -> None:
            for name, tensor in everything(model).items():
                assert torch.equal(tensor, expected[name]), name

        workers = [pool.submit(work) for _ in range(2)]
        try:
            assert [forked(child) for _ in range(8)] == [0] * 8
        finally:
            stop.set()
        for worker in workers:
            worker.result(WAIT)


@pytest.mark.usefixtures("one_thread")
@torch.no_grad()
def test_a_lock_that_another_thread_held_is_free_in_a_forked_process() -> None:
    """The answer in progress ends; an image of the thread that forks ends with a named error."""
    model = small_model()
    with accelerate(model, "paper") as handle, ThreadPoolExecutor(1) as pool:
        expected = generate(model, 1), answer(model, 1)
        inside, over = threading.Event(), threading.Event()

        def on_token(_: int, token: int) -> None:
            inside.set()
            assert over.wait(WAIT)

        def child() -> None:
            assert handle.summary().steps
            assert torch.equal(generate(model, 1), expected[0]) and torch.equal(answer(model, 1), expected[1])

        def goes_on() -> None:
            with pytest.raises(RuntimeError, match="its handle was removed or reset"):
                stepper.step(1)

        stepper = handle.runner.stepper(SampleInputs.build(model, **generation_inputs(model), steps=STEPS))
        stepper.step(0)
        waiting = pool.submit(answer, model, 1, on_token=on_token)
        assert inside.wait(WAIT)
        assert [forked(child), forked(goes_on)] == [0, 0]
        over.set()
        for index in range(1, stepper.evaluations):
            stepper.step(index)
        assert torch.equal(stepper.latents(), expected[0]) and torch.equal(waiting.result(WAIT), expected[1])
        stepper.close()
