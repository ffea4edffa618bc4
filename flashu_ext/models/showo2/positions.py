"""Which grids the table of SigLIP's position embeddings serves."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["stored_table", "table_side"]


def table_side(model: Any) -> int | None:
    """Side of the square position table that other grids than the model's own are resampled from.

    None where the table has no square grid: it then serves the model's own grid alone.
    """
    rows, config = int(model.position_embedding.weight.shape[0]), model.config
    side = math.isqrt(rows)
    own = (config.image_latent_height, config.image_latent_width)
    stored = rows != model.image_position_ids.shape[-1] or own == (side, side)
    return side if stored and side * side == rows else None


def stored_table(model: Any, patches: int) -> bool:
    """Whether a grid of so many patches takes the position table as it is: upstream compares the numbers alone."""
    return model.position_embedding.weight.shape[0] == model.image_position_ids.shape[-1] == patches
