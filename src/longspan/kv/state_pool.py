"""State pool: the slots of one rank for the states of recurrent layers.

Holds tensors. Must not know requests, positions, or which slots are free.
Read next: `longspan.cp.relay`, which reads and writes it.

A slot is one request's state in all recurrent layers. Layout: `[slots, *shape]` per layer and component, so that a
slot's tensors are contiguous messages, and states of many requests are gathered by one call.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from longspan.kv.state_layout import StateComponent, StateGroup


class StatePool:
    """States of every recurrent layer on one rank."""

    def __init__(self, groups: Sequence[StateGroup], num_slots: int, device: torch.device) -> None:
        """Make the tensors.

        Args:
            groups: recurrent layers and their layouts.
            num_slots: slots of the pool.
            device: where the tensors lie.
        """
        self.device = device
        by_layer = {layer: group.components for group in groups for layer in group.layers}
        self.components: dict[int, Sequence[StateComponent]] = {layer: by_layer[layer] for layer in sorted(by_layer)}
        """Layout of a state by layer, ascending."""
        # empty, not zeros: a slot is written before it is read
        self.tensors: dict[int, list[Tensor]] = {
            layer: [_empty(component, num_slots, device) for component in components]
            for layer, components in self.components.items()
        }
        """[slots, *shape] by layer, one tensor per component."""

    def state(self, layer: int, slot: int) -> list[Tensor]:
        """Views [1, *shape] of one slot in one layer, per component."""
        return [tensor[slot : slot + 1] for tensor in self.tensors[layer]]

    def gather(self, layer: int, slots: Tensor) -> list[Tensor]:
        """Copies [B, *shape] of the slots [B] int64 in one layer, per component."""
        return [tensor[slots] for tensor in self.tensors[layer]]

    def scatter(self, layer: int, slots: Tensor, states: Iterable[Tensor]) -> None:
        """Write states [B, *shape] of one layer, per component, to the slots [B] int64."""
        for tensor, state in zip(self.tensors[layer], states, strict=True):
            tensor.index_copy_(0, slots, state)

    def by_slot(self) -> list[Tensor]:
        """Views of all states, [1, slots, elements], of all layers and components in one order on every rank."""
        return [tensor.flatten(1).unsqueeze(0) for tensors in self.tensors.values() for tensor in tensors]

    def empty(self, layer: int) -> list[Tensor]:
        """New tensors [1, *shape] for a state of one layer that needs no slot, per component."""
        return [_empty(component, 1, self.device) for component in self.components[layer]]


def _empty(component: StateComponent, num_slots: int, device: torch.device) -> Tensor:
    return torch.empty((num_slots, *component.shape), dtype=getattr(torch, component.dtype), device=device)
