"""What this package adds to lmms-eval, by its entry-point group 'lmms_eval.models'."""

from __future__ import annotations

from typing import Any

__all__ = ["manifests"]


def manifests() -> list[Any]:
    """The models 'flashu_ext' and 'flashu_ext_showo2', whose classes are imported when they are asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(model_id="flashu_ext", simple_class_path="flashu_ext.evaluation.lmms.FlashU"),
        ModelManifest(model_id="flashu_ext_showo2", simple_class_path="flashu_ext.evaluation.upstream_lmms.Showo2"),
    ]
