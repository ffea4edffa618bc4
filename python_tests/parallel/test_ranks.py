"""Several processes: ranks from the environment, the heartbeat, lists on two ranks compared with one process, a killed rank."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from support.ranks import DYING, free_port, run_ranks, torchrun

from flashu_ext.batch import Heartbeat, Ranks, guidance_group, shard
from flashu_ext.batch.folder import MANIFEST
from flashu_ext.cli.main import cli

PROMPTS = ["a red circle", "a blue square", "a green triangle", "a red square above a blue circle", "a yellow circle"]
BATCH = 2
ARGUMENTS = ("--batch", str(BATCH), "--steps", "4", "--preset", "paper", "--seed", "7")
LIMIT = 20


# ---- ranks from the environment


def test_ranks_from_the_environment() -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert Ranks.from_environment({}) == Ranks() == Ranks.from_environment({"LOCAL_RANK": "3"})
    assert Ranks.from_environment({"RANK": "0", "WORLD_SIZE": "1"}) == Ranks()
    found = Ranks.from_environment({"RANK": "5", "WORLD_SIZE": "8", "TORCHELASTIC_RESTART_COUNT": "2", **meeting})
    assert found == Ranks(5, 8, 5, 2)
    assert Ranks.from_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **meeting}) == Ranks(5, 8, 1)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: expected a number in the environment beside"),
        ({"WORLD_SIZE": "2"}, "RANK: expected a number in the environment beside"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK: expected a number in the environment, got 'one'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: expected a number in the environment, got '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "world: expected an integer >= 1, got 0"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, r"rank: expected a number in \[0, 2\)"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: expected it in the environment"),
    ],
)  # fmt: skip
def test_wrong_environments(environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=message):
        Ranks.from_environment(environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(cli, ["generate", "a circle"])
    assert result.exit_code == 2, result.output


def test_one_image_on_two_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(cli, ["generate", "a circle"])
    assert result.exit_code == 2 and "PROMPT: expected --prompts or --parallel guidance on 2 ranks" in result.output


def test_a_gpu_for_each_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Ranks(3, 4, 1).device() == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"LOCAL_RANK: expected a number in \[0, 2\), one rank for each GPU, got 2"):
        Ranks(2, 4, 2).device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Ranks(3, 4, 3).device() == torch.device("cpu")


def test_each_rank_draws_on_the_gpu_of_its_number_or_as_asked(monkeypatch):
    from click import UsageError

    from flashu_ext.cli.generate import _device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for asked, device in ((None, "cuda:1"), ("cuda", "cuda:1"), ("cpu", "cpu")):
        assert _device(Ranks(1, 2, 1), {"device": asked}) == torch.device(device)
    assert _device(Ranks(), {"device": "cuda:1"}) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"device: expected a GPU in \[0, 2\), got 'cuda:2'"):
        _device(Ranks(), {"device": "cuda:2"})
    with pytest.raises(UsageError, match="--device: expected cuda or cpu on 2 ranks, got 'cuda:0'"):
        _device(Ranks(1, 2, 1), {"device": "cuda:0"})


@pytest.mark.parametrize("count", [0, 1, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_shards_have_every_item_once(count: int, world: int) -> None:
    shards = [shard(range(count), rank, world) for rank in range(world)]
    assert sorted(item for items in shards for item in items) == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    with pytest.raises(ValueError, match="rank: expected a number in"):
        shard([1], world, world)


# ---- the heartbeat: two ranks in one process


@pytest.fixture
def store() -> Iterator[Any]:
    yield dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)


def both(*calls: Any) -> list[Any]:
    """Runs the ranks' calls concurrently; returns what each returned or raised."""
    results: list[Any] = [None] * len(calls)

    def run(rank: int) -> None:
        try:
            results[rank] = calls[rank]()
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), "a rank hangs"
    return results


def test_all_ranks_end(store: Any) -> None:
    heartbeats = [Heartbeat(Ranks(rank, 2), store) for rank in range(2)]
    assert both(lambda: heartbeats[0].share("a", lambda: [1]), lambda: heartbeats[1].share("a", lambda: [2])) == [
        [1],
        [1],
    ]
    assert both(heartbeats[0].finish, heartbeats[1].finish) == [{}, {}]
    assert heartbeats[0].reporter and not heartbeats[1].reporter
    alone = Heartbeat(Ranks(), None)
    assert alone.share("a", lambda: (1,)) == (1,) and alone.finish() == {} and alone.reporter


def test_errors_reach_the_other_rank(store: Any) -> None:
    def rank(number: int) -> None:
        with Heartbeat(Ranks(number, 2), store) as heartbeat:
            heartbeat.share("a", lambda: [][number])

    first, second = both(lambda: rank(0), lambda: rank(1))
    assert isinstance(first, IndexError) and isinstance(second, ValueError) and str(first) == str(second)


def test_a_failure_is_reported_after_the_others_finish(store: Any) -> None:
    order: list[int] = []

    def failing() -> None:
        with Heartbeat(Ranks(1, 2), store):
            raise RuntimeError("no memory\nand more")

    def working() -> dict[int, str]:
        with Heartbeat(Ranks(0, 2), store) as heartbeat:
            threading.Event().wait(0.5)
            order.append(0)
            return heartbeat.finish()

    lost, error = both(working, lambda: (failing(), order.append(1)))
    assert lost == {1: "failed: no memory"} and isinstance(error, RuntimeError) and order == [0]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_silent_rank_counts_as_lost(store: Any, dead: int) -> None:
    heartbeats = [Heartbeat(Ranks(rank, 2), store, patience=1.0) for rank in range(2)]
    heartbeats[dead].leave()
    (lost,) = both(heartbeats[1 - dead].finish)
    assert list(lost) == [dead] and lost[dead].startswith("is gone: not heard of for") and heartbeats[1 - dead].reporter
    with pytest.raises(ValueError, match="patience: expected more than"):
        Heartbeat(Ranks(), None, patience=0.1)
    with pytest.raises(ValueError, match="store: expected one for 2 ranks"):
        Heartbeat(Ranks(0, 2), None)


def test_waiting_for_a_lost_rank_ends_with_an_error(store: Any) -> None:
    with Heartbeat(Ranks(1, 2), store, patience=1.0) as heartbeat, pytest.raises(RuntimeError, match="rank 0 is gone"):
        heartbeat.share("todo", list)


def slowly(value: int) -> int:
    """Slow enough that the other rank asks first: it must wait, not read an older value."""
    time.sleep(0.3)
    return value


def test_an_attempt_does_not_read_what_the_last_one_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    server = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)  # of the launcher: it outlives the ranks
    for name, value in (("ADDR", "127.0.0.1"), ("PORT", str(server.port))):
        monkeypatch.setenv(f"MASTER_{name}", value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for attempt in range(2):
        ranks = [Ranks(rank, 2, rank, attempt) for rank in range(2)]
        heartbeats = both(*(functools.partial(Heartbeat.join, own) for own in ranks))
        number = functools.partial(slowly, attempt)
        shared = both(*(functools.partial(heartbeat.share, "todo", number) for heartbeat in reversed(heartbeats)))
        assert shared == [attempt, attempt]
        assert both(*(functools.partial(heartbeat.finish, "out of luck") for heartbeat in heartbeats))[0] == {
            1: "failed: out of luck"
        }


def test_a_missing_rank_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(RuntimeError, match="rank 0: not all 2 ranks met within 1 s"):
        Heartbeat.join(Ranks(0, 2), timeout=1)
    with (
        pytest.raises(ValueError, match="guidance-parallel: expected 2 ranks"),
        guidance_group(Heartbeat(Ranks(), None), torch.device("cpu")),
    ):
        pass


# ---- lists on two ranks


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The file of prompts, and the folder that one process generated."""
    folder = tmp_path_factory.mktemp("alone")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    result = generate(prompts, folder / "images")
    assert result.exit_code == 0, result.output
    return prompts, folder / "images"


def generate(prompts: Path, out: Path) -> Any:
    return CliRunner().invoke(cli, ["generate", "--prompts", str(prompts), "--out", str(out), *ARGUMENTS])


def test_torchrun_generates_the_images_of_one_process(alone: tuple[Path, Path], tmp_path: Path) -> None:
    prompts, expected = alone
    done = torchrun(["generate", "--prompts", str(prompts), "--out", str(tmp_path), *ARGUMENTS])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 images, 5 of them generated now") == 1
    assert images(tmp_path) == images(expected)
    assert (tmp_path / MANIFEST).read_bytes() == (expected / MANIFEST).read_bytes()


@pytest.mark.parametrize(
    ("victim", "fatal", "lost"), [(1, 0, [2, 3]), (0, 1, [4])], ids=["rank 1", "rank 0, with the store"]
)
def test_a_rank_that_dies(alone: tuple[Path, Path], tmp_path: Path, victim: int, fatal: int, lost: list[int]) -> None:
    prompts, expected = alone
    arguments = ("generate", "--prompts", str(prompts), "--out", str(tmp_path), *ARGUMENTS, "--patience", "3")
    begun = tmp_path / list(images(expected))[BATCH * (1 - victim)]  # the other rank's first image: its work has begun
    codes = run_ranks(DYING, *arguments, VICTIM=str(victim), FATAL=str(fatal), AWAIT=str(begun))
    assert codes[victim][0] == -9
    code, said = codes[1 - victim]
    names = list(images(expected))
    assert code == 1 and said.startswith(f"Error: rank {victim} is gone"), said
    assert f"{len(lost)} of 5 images are missing ({', '.join(names[index] for index in lost)})" in said
    assert said.count("\n") == 1
    # All finished images exist and are right, on both ranks; one process then generates the rest, bit for bit.
    kept = images(tmp_path)
    assert kept == {name: data for i, (name, data) in enumerate(images(expected).items()) if i not in lost}
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in kept}
    rest = generate(prompts, tmp_path)
    assert rest.exit_code == 0 and f"{len(lost)} of them generated now" in rest.output, rest.output
    assert images(tmp_path) == images(expected)
    assert times == {name: (tmp_path / name).stat().st_mtime_ns for name in kept}
