"""Decides for each layer where its neurons lie, in plan order or in the model's own, and moves them there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..planning.neurons import NeuronLayout, ffn_weights
from .forked import ForkedLock
from .network import Network
from .order import FfnOrder, check_not_planned, why_not_moved

__all__ = ["Placement"]


@dataclass
class Placement:
    """For each layer of a network where its neurons lie."""

    orders: list[FfnOrder | None]
    """None: in the model's own order."""
    layouts: list[NeuronLayout | None]
    """The tasks' neurons there; None: every task uses all."""
    whys: dict[int, str]
    """Why a layer that the plan prunes is not in plan order."""

    @classmethod
    def choose(
        cls, network: Network, planned: Sequence[NeuronLayout], held: Sequence[FfnOrder], lock: ForkedLock
    ) -> Placement:
        """Changes nothing.

        Args:
            planned: the plan's layout of each layer; empty without a plan.
            held: orders of the same model.
            lock: of the model.

        Raises:
            RuntimeError: weights lie in another accelerated model's plan order.
        """
        chosen = cls([None] * len(network.layers), [None] * len(network.layers), {})
        by_ffn = {id(order.ffn): order for order in held}
        ffns = [layer.ffn.module if layer.ffn.computed else None for layer in network.layers]
        # The experts read their weights in the model's own order.
        read = [*ffns, *(layer.ffn.module for layer in network.experts if layer.ffn.computed)]
        uses = Counter(id(weight) for ffn in read if ffn is not None for weight in ffn_weights(ffn))
        for index, (ffn, layout) in enumerate(zip(ffns, planned, strict=False)):
            if ffn is None:
                continue
            if (neurons := ffn.gate_proj.out_features) != layout.intermediate:
                chosen.whys[index] = f"has {neurons} neurons, the plan {layout.intermediate}; all are used"
                continue
            chosen.layouts[index] = layout
            order = by_ffn.get(id(ffn))
            if (why := network.layers[index].ffn.why_in_place) is not None:
                chosen._stay(index, why)
            elif any(uses[id(weight)] > 1 for weight in ffn_weights(ffn)):
                chosen._stay(index, "its weights are shared within the model")
            elif order is not None and order.layout is layout and order.holds(ffn):
                chosen.orders[index] = order
            else:
                chosen.orders[index] = FfnOrder(ffn, layout, lock)
        check_not_planned([order.ffn for order in chosen.orders if order is not None and not order.planned], held)
        return chosen

    def move(self, held: list[FfnOrder]) -> list[FfnOrder]:
        """Give `held` orders that are not chosen back, and bring the chosen ones into plan order. Returns these.

        `held` receives every order before it changes a weight, so that an interrupt leaves none unknown.
        """
        chosen = [order for order in self.orders if order is not None]
        left = [order for order in held if order not in chosen]
        held.extend(order for order in chosen if order not in held)
        for order in left:
            order.arrange(planned=False)
        new = [(i, order) for i, order in enumerate(self.orders) if order is not None and not order.planned]
        for _, order in new:
            order.guard()
        # After the guard: what another thread has taken by now is found, and what it takes later is a copy.
        for (index, order), why in zip(new, why_not_moved([order.ffn for _, order in new]), strict=True):
            if why is not None:
                order.arrange(planned=False)
                self._stay(index, why)
        moved = [order for order in self.orders if order is not None]
        for order in moved:
            order.arrange(planned=True)
        return moved

    def _stay(self, index: int, why: str) -> None:
        """Leave a layer's neurons in the model's own order."""
        layout = self.layouts[index]
        assert layout is not None
        self.orders[index], self.layouts[index] = None, layout.in_place()
        self.whys[index] = f"{why}; neurons read where they are"

    def reasons(self, paths: Sequence[str]) -> dict[str, str]:
        """The whys by the FFNs' paths in the model."""
        return {paths[index]: why for index, why in self.whys.items()}
