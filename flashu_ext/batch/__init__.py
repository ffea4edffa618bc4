"""Lists of prompts generated into folders, by one process or by several ranks. `flashu_ext.parallel` is this package."""

from .guidance import check_guidance_parallel, guidance_group, sample_guided
from .ranks import Heartbeat, Ranks, shard

__all__ = ["Heartbeat", "Ranks", "check_guidance_parallel", "guidance_group", "sample_guided", "shard"]
