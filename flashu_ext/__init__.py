"""Training-free acceleration of native unified multimodal models: CPU and CUDA kernels, and a runtime for Show-o2.

`import flashu_ext as fx` needs torch only; kernels, transformers and plots are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import ops as ops
    from . import parallel as parallel
    from . import reference as reference
    from . import showo2 as showo2
    from .calibrate import GenerationSample as GenerationSample
    from .calibrate import UnderstandingSample as UnderstandingSample
    from .calibrate import calibrate as calibrate
    from .config import FlashUConfig as FlashUConfig
    from .plan import TaskPlan as TaskPlan
    from .schedule import StepPlan as StepPlan
    from .swap import Handle as Handle
    from .swap import accelerate as accelerate

_HOMES = {
    "GenerationSample": "calibrate",
    "UnderstandingSample": "calibrate",
    "calibrate": "calibrate",
    "FlashUConfig": "config",
    "TaskPlan": "plan",
    "StepPlan": "schedule",
    "Handle": "swap",
    "accelerate": "swap",
}
_MODULES = ("nano", "ops", "parallel", "reference", "showo2")

__all__ = [*_HOMES, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value  # also settles names shared by a function and its module, such as calibrate
        return value
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
