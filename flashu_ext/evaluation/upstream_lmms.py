"""lmms-eval's own class for Show-o2, which runs upstream's code, accelerated after it has loaded its model.

`python -m lmms_eval --model flashu_ext_showo2 --model_args pretrained=DIR,vae_model_path=FILE,preset=exact --tasks mme`
"""

from __future__ import annotations

from typing import Any

from ..planning.config import preset as preset_config
from ..planning.plan import TaskPlan
from ..runtime.handle import accelerate

__all__ = ["accelerated"]


def accelerated(base: type) -> type:
    """A subclass of a model class of lmms-eval whose `model` attribute is upstream's Show-o2.

    Two model arguments are added: preset (dense, exact, paper or fast) and plan (a task plan's file, for one that prunes).
    Answers kept from an earlier run are not used (`continual_mode`): they may be those of another preset.
    """

    class Accelerated(base):
        def __init__(self, *arguments: Any, preset: str = "exact", plan: str | None = None, **options: Any):
            options.setdefault("continual_mode", False)
            super().__init__(*arguments, **options)
            config = preset_config(preset)
            if config is not None:
                own = TaskPlan.load(plan, model=self.model) if plan is not None else None
                self.handle = accelerate(self.model, config, own)

    Accelerated.__name__ = Accelerated.__qualname__ = f"Accelerated{base.__name__}"
    return Accelerated


def __getattr__(name: str) -> Any:
    """`Showo2`, made when lmms-eval asks for it: not every version has the class."""
    if name != "Showo2":
        raise AttributeError(name)
    try:
        from lmms_eval.models.simple.showo2 import Showo2
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is needed: lmms-eval 0.7.3 and earlier releases have no class for Show-o2; a checkout that has "
            "lmms_eval/models/simple/showo2.py does. --model flashu_ext needs none"
        ) from error
    return accelerated(Showo2)
