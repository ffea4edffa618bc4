"""Facts about machine, versions and command line, printed with every measurement."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

__all__ = ["command_line", "describe", "facts"]

_PACKAGES = ("torch", "transformers", "numpy")


def facts() -> dict[str, str]:
    """Processor, threads, memory, GPU, versions and commit, as name -> text; unknown ones are omitted."""
    import torch

    found = {
        "cpu": _cpu_name(),
        "cores": str(len(os.sched_getaffinity(0))),
        "torch threads": str(torch.get_num_threads()),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "memory": _memory(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "flashu_ext": _version("flashu_ext"),
    }
    found |= {name: _version(name) for name in _PACKAGES}
    found["commit"] = _commit()
    return {name: value for name, value in found.items() if value}


def describe() -> str:
    """`facts` in one line."""
    return ", ".join(f"{name} {value}" for name, value in facts().items())


def command_line() -> str:
    """The command that is running, as typed in a shell."""
    path = Path(sys.argv[0] if sys.argv else "python")
    if path.parts[-2:] == ("cli", "__main__.py"):
        return shlex.join(["flashu-ext", *sys.argv[1:]])
    if path.suffix == ".py" and "flashu_ext" in path.parts:  # python -m flashu_ext...
        parts = path.parts[len(path.parts) - 1 - path.parts[::-1].index("flashu_ext") :]
        module = ".".join(parts).removesuffix(".py").removesuffix(".__main__")
        return shlex.join(["python", "-m", module, *sys.argv[1:]])
    return shlex.join([path.name, *sys.argv[1:]])


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (OSError, ValueError):
        return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Commit of a source folder, marked if tracked files differ from it; otherwise empty."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + (" with local changes" if changed.stdout.strip() else "")
