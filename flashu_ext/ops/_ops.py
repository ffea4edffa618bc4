"""Where the compiled ops are: their library, and their namespace in torch.ops.

A Hugging Face kernel has the other files of this folder and an `_ops.py` of its own (`.ci/kernels-hub`).
"""

from __future__ import annotations

from pathlib import Path

NAMESPACE = "flashu"
LIBRARY = Path(__file__).resolve().parents[1] / "libflashu_torch.so"
