"""The command `flashu-ext info`: facts about build and machine, with reasons for what is missing. Works without a build."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from importlib import metadata
from typing import Any

from ..ops import native

__all__ = ["collect", "describe"]

_OPTIONAL = {
    "transformers": "the Show-o2 model (pip install 'flashu_ext[showo2]')",
    "tokenizers": "prompts (pip install 'flashu_ext[showo2]')",
    "diffusers": "decoding images of Show-o2 checkpoints with the Wan VAE (pip install 'flashu_ext[vae]')",
    "matplotlib": "the demo's report (pip install 'flashu_ext[report]')",
    "jinja2": "the demo's report (pip install 'flashu_ext[report]')",
    "PIL": "images (pip install 'flashu_ext[showo2]')",
    "fastapi": "the server (pip install 'flashu_ext[serve]')",
    "lmms_eval": "evaluating answers (pip install 'flashu_ext[evaluate]')",
    "flashu_ext_nano": "the embedded JanusFlow and BAGEL, where this is no source folder",
}


def collect() -> dict[str, Any]:
    """Facts by section (package, ops, build, machine, optional); for missing ones the reason."""
    return {
        "package": {
            "version": _version("flashu_ext"),
            "python": platform.python_version(),
            "where": str(native.PACKAGE),
        },
        "ops": _ops(),
        "build": _build(),
        "machine": _machine(),
        "optional": {name: _optional(name, purpose) for name, purpose in _OPTIONAL.items()},
    }


def describe(facts: dict[str, Any]) -> str:
    """`collect`'s facts as indented text."""
    lines: list[str] = []
    for section, entries in facts.items():
        lines.append(section)
        for name, value in entries.items():
            values = value if isinstance(value, list) else [value]
            for number, text in enumerate(values):
                lines.append(f"  {name if number == 0 else '':<16} {text}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed (this is a source folder)"


def _ops() -> dict[str, Any]:
    causes = native.missing()
    if not causes:
        try:
            native.load()
        except ImportError as error:
            causes = [" ".join(str(error).split())]
    if causes:
        return {"loaded": "no", "why": causes}
    from .. import ops

    cpu = [name for name in ops.OPS if getattr(ops, name).is_supported("cpu", _float32())]
    cuda = [name for name in ops.OPS if getattr(ops, name).is_supported("cuda", _float32())]
    return {
        "loaded": str(native.LIBRARY),
        "on the CPU": f"{len(cpu)} of {len(ops.OPS)} ops",
        "on CUDA": f"{len(cuda)} of {len(ops.OPS)} ops",
    }


def _float32() -> Any:
    import torch

    return torch.float32


def _build() -> dict[str, Any]:
    if not native.is_available():
        return {"loaded": "no", "why": "see ops"}
    from ..ops.explain import build_facts

    return dict(build_facts())


def _machine() -> dict[str, Any]:
    found: dict[str, Any] = {"system": platform.platform(), "cores": len(os.sched_getaffinity(0))}
    try:
        import torch
    except ImportError as error:
        found["torch"] = f"missing: {error}; pip install 'torch>=2.11'"
    else:
        found["torch"] = (
            f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        )
        if torch.cuda.is_available():
            found["gpu"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        elif torch.version.cuda is None:
            found["gpu"] = "none: this torch is a CPU build"
        else:
            found["gpu"] = f"none: torch is built for CUDA {torch.version.cuda}, and no driver or device answers"
    for tool in ("nvcc", "cmake", "ninja", "c++"):
        found[tool] = shutil.which(tool) or (
            "not on PATH: CPU kernels only" if tool == "nvcc" else "not on PATH: cannot build"
        )
    if found["nvcc"].startswith("not") and os.path.exists("/usr/local/cuda/bin/nvcc"):
        found["nvcc"] = "/usr/local/cuda/bin/nvcc"
    found["executable"] = sys.executable
    return found


def _optional(name: str, purpose: str) -> str:
    if importlib.util.find_spec(name) is None:
        return f"missing: {purpose}"
    return _version({"PIL": "pillow"}.get(name, name))
