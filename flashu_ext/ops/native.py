"""Loads the compiled ops on first use. Imports no torch; all native code is loaded by `load()`."""

from __future__ import annotations

import functools
from pathlib import Path

from ._ops import LIBRARY, NAMESPACE

PACKAGE = LIBRARY.parent
OLDEST_TORCH = (2, 11)


def missing() -> list[str]:
    """Every reason why the compiled ops cannot be loaded here, as sentences; empty if they can."""
    causes = []
    try:
        import torch

        version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if version < OLDEST_TORCH:
            causes.append(f"torch {torch.__version__} is installed, and 2.11 or newer is needed.")
    except ImportError as error:
        causes.append(f"torch cannot be imported: {error}.")
    if not LIBRARY.is_file():
        where = "this is a source folder" if (PACKAGE.parent / "setup.py").is_file() else "the installed package"
        causes.append(
            f"{LIBRARY.name} is not in {PACKAGE} ({where}). Build it with: pip install -e . in the source folder."
        )
        built = _built_elsewhere()
        if built is not None:
            causes.append(
                f"A built flashu_ext is installed in {built}, but {PACKAGE.parent} comes before it in sys.path: run outside of "
                "that folder."
            )
    return causes


def _built_elsewhere() -> Path | None:
    """The folder of another, built copy of this package that a path of sys.path has."""
    from importlib.metadata import distributions

    for found in distributions(name="flashu_ext"):
        folder = Path(str(found.locate_file("flashu_ext"))).resolve()
        if folder != PACKAGE and (folder / LIBRARY.name).is_file():
            return folder.parent
    return None


@functools.cache
def load() -> None:
    """Register the ops (`torch.ops.flashu.*`) once per process.

    Raises:
        ImportError: the library cannot be loaded; the message lists every cause.
    """
    causes = missing()
    if not causes:
        import torch

        if torch._C._dispatch_has_kernel(f"{NAMESPACE}::rms_norm") and str(LIBRARY) not in torch.ops.loaded_libraries:
            # A second library would replace the first one's kernels, and the process would crash.
            loaded = sorted(path for path in torch.ops.loaded_libraries if Path(path).name == LIBRARY.name)
            causes.append(
                f"{LIBRARY} was found, but torch.ops.{NAMESPACE} is there from another file ({', '.join(loaded) or 'unknown'}): "
                "a process can load one copy of it."
            )
        else:
            try:
                torch.ops.load_library(str(LIBRARY))
                return
            except OSError as error:
                causes.append(f"{LIBRARY} was found, but loading it failed: {error}.")
    lines = "\n".join(f"  - {cause}" for cause in causes)
    raise ImportError(f"flashu_ext: the compiled ops are not available:\n{lines}\nSee `flashu-ext info`.")


def is_available() -> bool:
    """Whether `load()` succeeds here."""
    try:
        load()
    except ImportError:
        return False
    return True


_KINDS: dict[str, type[Exception]] = {
    "flashu value error: ": ValueError,
    "flashu type error: ": TypeError,
    "flashu index error: ": IndexError,
    "flashu unsupported error: ": NotImplementedError,
}


def translate(error: RuntimeError) -> Exception:
    """The Python exception for a failed C++ check, which torch raises as RuntimeError.

    Returns the error itself if it is not from our checks.
    """
    text = str(error)
    for prefix, kind in _KINDS.items():
        at = text.find(prefix)
        if at >= 0:
            return kind(text[at + len(prefix) :].splitlines()[0])
    return error
