"""Training-free acceleration of native unified multimodal models: CPU and CUDA kernels, and a runtime.

`import flashu_ext as fx` needs torch only; transformers and plots are loaded when they are first used. `torch.ops.flashu.*` are
there as soon as torch is imported too, before or after.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import ops as ops
    from .calibration.calibrate import calibrate as calibrate
    from .models import bagel as bagel
    from .models import janusflow as janusflow
    from .models import showo2 as showo2
    from .models.accelerated import handle_of as handle_of
    from .models.adapter import Adapter as Adapter
    from .models.adapter import Question as Question
    from .models.adapter import Sizes as Sizes
    from .models.calibration import TokenSample as TokenSample
    from .models.folders import load_pipeline as load_pipeline
    from .models.showo2.calibration import GenerationSample as GenerationSample
    from .models.showo2.calibration import UnderstandingSample as UnderstandingSample
    from .ops import reference as reference
    from .planning.config import FlashUConfig as FlashUConfig
    from .planning.decoders import Family as Family
    from .planning.decoders import register_family as register_family
    from .planning.groups import Answers as Answers
    from .planning.groups import EncoderSharing as EncoderSharing
    from .planning.groups import Execution as Execution
    from .planning.groups import FfnPruning as FfnPruning
    from .planning.groups import Guidance as Guidance
    from .planning.groups import HeadCaching as HeadCaching
    from .planning.groups import LayerSkip as LayerSkip
    from .planning.groups import TokenSkip as TokenSkip
    from .planning.plan import TaskPlan as TaskPlan
    from .planning.schedule import StepPlan as StepPlan
    from .runtime import kernel_sets as kernel_sets
    from .runtime.handle import Handle as Handle
    from .runtime.handle import accelerate as accelerate
    from .runtime.order import EditedWeightsError as EditedWeightsError
    from .runtime.pruned import PrunedFFNs as PrunedFFNs
    from .runtime.pruned import prune_ffn as prune_ffn

_HOMES = {
    "GenerationSample": "models.showo2.calibration",
    "TokenSample": "models.calibration",
    "UnderstandingSample": "models.showo2.calibration",
    "calibrate": "calibration.calibrate",
    "FlashUConfig": "planning.config",
    "Answers": "planning.groups",
    "EncoderSharing": "planning.groups",
    "Execution": "planning.groups",
    "FfnPruning": "planning.groups",
    "Guidance": "planning.groups",
    "HeadCaching": "planning.groups",
    "LayerSkip": "planning.groups",
    "TokenSkip": "planning.groups",
    "TaskPlan": "planning.plan",
    "Adapter": "models.adapter",
    "Family": "planning.decoders",
    "Question": "models.adapter",
    "Sizes": "models.adapter",
    "register_family": "planning.decoders",
    "StepPlan": "planning.schedule",
    "Handle": "runtime.handle",
    "accelerate": "runtime.handle",
    "PrunedFFNs": "runtime.pruned",
    "prune_ffn": "runtime.pruned",
    "EditedWeightsError": "runtime.order",
    "handle_of": "models.accelerated",
    "load_pipeline": "models.folders",
}
_MODULES = ("bench", "hosts", "nano", "ops")
# Public modules that lie in a folder: `import flashu_ext.showo2.sampling` finds `flashu_ext.models.showo2.sampling`.
_ALIASES = {
    "bagel": "models.bagel",
    "janusflow": "models.janusflow",
    "kernel_sets": "runtime.kernel_sets",
    "parallel": "batch",
    "reference": "ops.reference",
    "showo2": "models.showo2",
}

__all__ = [*_HOMES, *_MODULES, *_ALIASES, "__version__", "cmake_dir", "include_dir"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _ALIASES:
        return import_module(f".{_ALIASES[name]}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AliasFinder(MetaPathFinder, Loader):
    """Imports a public module name as the very module that it stands for, so that no class exists twice."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        return ModuleSpec(name, self) if package == __name__ and rest.split(".")[0] in _ALIASES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        alias, _, rest = spec.name.removeprefix(f"{__name__}.").partition(".")
        module = import_module(".".join(filter(None, (__name__, _ALIASES[alias], rest))))
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has just put the alias's there


sys.meta_path.insert(0, _AliasFinder())  # before the one that would load an alias's files a second time


def include_dir() -> Path:
    """The folder of the C and C++ headers, `flashu/flashu.h` and so on; the library is libflashu.so in `lib` beside it.

    Raises:
        FileNotFoundError: nothing is built here.
    """
    return _installed("include")


def cmake_dir() -> Path:
    """The folder for CMake's flashu_DIR or CMAKE_PREFIX_PATH, so that find_package(flashu) finds this package's library.

    Raises:
        FileNotFoundError: nothing is built here.
    """
    return _installed("lib/cmake/flashu")


def _installed(folder: str) -> Path:
    path = Path(__file__).resolve().parent / folder
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: the C and C++ library is not built; in the source folder: pip install -e .")
    return path


def _register_ops() -> None:
    """Registers the ops with their fake kernels and autograd guards. If that fails, the first op that is used says why."""
    ops = import_module(".ops", __name__)
    try:
        getattr(ops, ops.OPS[0])
    except ImportError:
        pass


class _AfterTorch(MetaPathFinder):
    """Registers the ops right after torch is imported. torch itself is not imported here: commands such as `flashu-ext --help`
    start fast without it."""

    _looking = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch" or self._looking:
            return None
        self._looking = True
        try:
            spec = find_spec(name)
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                # Only now: others ask whether torch can be found and do not import it.
                sys.meta_path.remove(self)
                load(module)
                _register_ops()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if "torch" in sys.modules:
    _register_ops()
else:
    sys.meta_path.insert(0, _AfterTorch())
