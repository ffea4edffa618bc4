"""One run at a time in a folder, whose ranks share its lock; waiting for ranks that do not come ends on a signal."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from click.testing import CliRunner
from support.ranks import LIMIT, environment, free_port

from flashu_ext.batch import Heartbeat, Ranks
from flashu_ext.batch.folder import MANIFEST, open_folder
from flashu_ext.batch.lock import LOCK, FolderLock
from flashu_ext.batch.prompts import make_jobs
from flashu_ext.batch.ranks import wait_for
from flashu_ext.cli.main import cli
from flashu_ext.models.showo2 import Pipeline

TAKEN = "another run is drawing into this folder"


def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=TAKEN):
        call(*arguments, **options)


# ---- the lock


def test_one_run_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    with FolderLock(out) as first:
        first.begin()
        with FolderLock(out) as second, pytest.raises(ValueError, match=f"{TAKEN} .process {os.getpid()} on "):
            second.begin()
        first.share()
        refused(FolderLock(out).begin)
    assert list(out.iterdir()) == []
    with FolderLock(out) as third:
        third.begin()


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_ranks_share_it_and_the_last_one_deletes_it(order: tuple[int, ...], tmp_path: Path) -> None:
    ranks = [FolderLock(tmp_path) for _ in range(3)]
    run = ranks[0].begin()
    refused(ranks[1].join, run)  # the folder is not ready yet
    ranks[0].share()
    for rank in ranks:
        rank.join(run)
    for rank in order:
        assert (tmp_path / LOCK).exists()
        refused(FolderLock(tmp_path).begin)
        ranks[rank].__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_of_another_run_does_not_join(tmp_path: Path) -> None:
    """It was started by a run whose other ranks have died, and comes when the next run is in the folder."""
    with FolderLock(tmp_path) as old:
        run = old.begin()
    with FolderLock(tmp_path) as new, FolderLock(tmp_path) as late:
        new.begin()
        new.share()
        refused(late.join, run)


HOLDING = """
import sys, time
from flashu_ext.batch.lock import FolderLock
lock = FolderLock(sys.argv[1])
lock.begin()
print("held", flush=True)
time.sleep(600)
"""


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, tmp_path], env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=f"process {process.pid} on"):
                FolderLock(tmp_path).begin()
        finally:
            process.kill()
    assert (tmp_path / LOCK).exists()
    with FolderLock(tmp_path) as lock:
        lock.begin()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/etc/hostname")])
def test_what_stands_in_its_place(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / LOCK)
    with pytest.raises((ValueError, OSError), match=LOCK):
        FolderLock(tmp_path).begin()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 5000])
def test_what_is_written_in_it_only_names_the_other_run(content: bytes, tmp_path: Path) -> None:
    with FolderLock(tmp_path) as lock:
        lock.begin()
        (tmp_path / LOCK).write_bytes(content)
        refused(FolderLock(tmp_path).begin)


# ---- folders


def _open(out: Path, batch: int, start: Any, accepted: Any) -> None:
    jobs = make_jobs(["a"])
    start.wait()
    try:
        open_folder(out, {"batch": batch}, jobs)
    except ValueError:
        return
    with accepted.get_lock():
        accepted.value += 1


def test_of_two_settings_at_the_same_time_one_is_accepted(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(10):
        start, accepted = context.Barrier(2), context.Value("i", 0)
        both = [context.Process(target=_open, args=(tmp_path / str(number), b, start, accepted)) for b in (1, 2)]
        for process in both:
            process.start()
        for process in both:
            process.join(LIMIT)
        assert accepted.value == 1


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--seed", "3", "--overwrite"]])
def test_a_run_beside_another_one_changes_nothing(more: list[str], tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red circle")
    with FolderLock(out) as lock:
        lock.begin()
        open_folder(out, {"batch": 1}, make_jobs(["a red circle"]), lock=lock)
        lock.share()
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        result = CliRunner().invoke(cli, ["generate", "--prompts", str(prompts), "--out", str(out), *more])
        assert result.exit_code == 1 and TAKEN in result.output and result.output.count("\n") == 1, result.output
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_folder_is_held_while_images_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, prompts, out = Pipeline.generate_batch, tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red circle")

    def generate_batch(*arguments: Any, **options: Any) -> Any:
        refused(FolderLock(out).begin)
        return whole(*arguments, **options)

    monkeypatch.setattr(Pipeline, "generate_batch", generate_batch)
    result = CliRunner().invoke(cli, ["generate", "--prompts", str(prompts), "--out", str(out), "--steps", "2"])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["0000-a-red-circle.png", MANIFEST]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_an_images_place_that_is_taken_by_no_file(make: Callable[[Path], Any], tmp_path: Path) -> None:
    jobs = make_jobs(["a", "b"])
    make(tmp_path / jobs[1].name)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=f"{jobs[1].name}: expected a regular file or none"):
            open_folder(tmp_path, {"batch": 1}, jobs, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == [jobs[1].name]


# ---- waiting for ranks

WAITING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background has it ignored
from flashu_ext.batch import ranks
real = ranks.wait_for

def wait_for(*arguments):
    print("waiting", flush=True)
    return real(*arguments)

ranks.wait_for = wait_for
from flashu_ext.cli.main import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
def test_waiting_for_a_missing_rank_ends_on_a_signal(rank: int, number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle")
    shared = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = ["generate", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out"]
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, *arguments],
        env=environment(**shared),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "waiting\n"
            process.send_signal(number)
            said, _ = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
    assert process.returncode == 1, said
    expected = {
        signal.SIGTERM: f"Error: rank {rank}: stopped before all 2 ranks met\n",
        signal.SIGINT: "Aborted!\n",
    }
    assert said.endswith(expected[number]), said


def test_a_call_is_waited_for_as_long_as_it_is_said() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        wait_for(lambda: time.sleep(LIMIT), 0.2)
    with pytest.raises(InterruptedError):
        wait_for(lambda: time.sleep(LIMIT), LIMIT, lambda: True)
    assert time.monotonic() - began < LIMIT / 2
    with pytest.raises(KeyError):
        wait_for(lambda: {}["x"], LIMIT)
    assert wait_for(lambda: 3, LIMIT) == 3


def test_ranks_that_were_told_to_stop_wait_for_nobody() -> None:
    store = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    asked = iter([False, True])
    with pytest.raises(RuntimeError, match="rank 1: stopped before rank 0 said what to generate"):
        Heartbeat(Ranks(1, 2), store, stop=lambda: next(asked, True)).share("todo", list)
    for rank in (0, 1):
        assert Heartbeat(Ranks(rank, 2), store, stop=lambda: True).finish("stopped") == {}
