"""The operations that the fidelity table counts, against torch's own count, and the share of tokens that fits a budget."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flashu_ext import FlashUConfig, accelerate
from flashu_ext.bench import fidelity
from flashu_ext.models.showo2 import Pipeline, sample
from flashu_ext.ops.kernel_sets import FAMILIES


def flops(pipe: Pipeline, **changes) -> tuple[float, float]:
    """(torch's count of all operations, our count of the language model) for one image, in plain torch."""
    kernels = dict.fromkeys(tuple(f"{family}_kernels" for family in FAMILIES), False)
    inputs = vars(pipe.layout.generation(["a red circle"]))
    noise = torch.randn(1, 16, 72, 2, generator=torch.Generator().manual_seed(0))
    with accelerate(pipe.model, FlashUConfig(steps=7, **kernels, **changes)) as handle:
        # torch counts no fused attention on a CPU
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            sample(pipe.model, noise, **inputs, guidance_scale=2.5)
        return counter.get_total_flops(), fidelity.llm_flops(pipe.model, handle.runner.last_image)


@pytest.mark.parametrize(
    "changes",
    [
        {"token_skip": True, "token_skip_ratio": 0.5, "token_skip_interval": 3},
        {"token_skip": True, "token_skip_ratio": 0.9, "token_skip_interval": 2, "full_network_steps": 3},
    ],
)
def test_operations_saved_by_routing_equal_torchs_count(changes) -> None:
    pipe = Pipeline.from_pretrained("nano")
    dense, routed = flops(pipe), flops(pipe, **changes)
    assert routed[1] < dense[1]
    assert dense[0] - routed[0] == pytest.approx(dense[1] - routed[1], rel=1e-9)


def test_the_share_of_tokens_is_the_smallest_that_fits() -> None:
    assert int(fidelity.token_ratio_within(36, 70.0, lambda share: 100 - int(share * 36)) * 36) == 30
    assert int(fidelity.token_ratio_within(36, 100.0, lambda share: 100 - int(share * 36)) * 36) == 0
    with pytest.raises(ValueError, match="budget"):
        fidelity.token_ratio_within(36, 10.0, lambda share: 100 - int(share * 36))
