"""Generates lists of prompts into folders, on one rank or several. Public as `flashu_ext.parallel`."""

from .guidance import check_guidance_parallel, guidance_group, sample_guided
from .ranks import Heartbeat, Ranks, shard

__all__ = ["Heartbeat", "Ranks", "check_guidance_parallel", "guidance_group", "sample_guided", "shard"]
