"""Starts ranks as real processes, with a time limit on every wait; and the programs they run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LIMIT = 90
"""Seconds after which a process is killed and its test fails."""

ROOT = Path(__file__).resolve().parents[2]

# The command line; rank VICTIM is killed at the begin of batch FATAL (from 0) by SIGKILL, as by a kernel
# that is out of memory, once the file AWAIT exists.
DYING = """
import os, signal, time
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line does, before the next line imports torch
from flashu_ext.cli.main import main
from flashu_ext.models.showo2 import Pipeline

generate, batches = Pipeline.generate_batch, 0

def generate_batch(self, *arguments, **options):
    global batches
    if os.environ["RANK"] == os.environ["VICTIM"] and batches == int(os.environ["FATAL"]):
        while not os.path.exists(os.environ["AWAIT"]):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    batches += 1
    return generate(self, *arguments, **options)

Pipeline.generate_batch = generate_batch
main()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | more


def run_ranks(program: str, *arguments: str, world: int = 2, **more: str) -> list[tuple[int, str]]:
    """Runs a program on every rank without a launcher: (exit code, output) of each."""
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=environment(RANK=str(rank), **shared, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        printed = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


def torchrun(arguments: Sequence[str], world: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return subprocess.run(
        [*launcher, "-m", "flashu_ext.cli", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
