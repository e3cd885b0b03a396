"""Layout of what a recurrent layer keeps of a request: a state of fixed size, in place of keys and values per token.

Holds frozen data and arithmetic; all of it can travel between driver and workers. Must not know torch, slots, ranks or
models.
Read next: `longspan.kv.state_pool`, which makes tensors of it; `longspan.cp.relay`, which hands states from rank to
rank; `docs/decisions/0060-states-in-slots.md`.
"""

from math import prod
from typing import Literal

import msgspec

from longspan.kv.layout import DTYPE_BYTES


class StateComponent(msgspec.Struct, frozen=True, gc=False):
    """One tensor of a layer's state."""

    role: Literal["conv", "recurrent"]
    """What it is: the last inputs of a convolution, or what a recurrence carries on."""
    idx: int
    """Which of the layer's tensors in this role."""
    shape: tuple[int, ...]
    """Of one request."""
    dtype: str
    """Name of the torch dtype; a recurrence usually carries float32 whatever the weights are."""

    @property
    def num_bytes(self) -> int:
        """Bytes of one request's tensor."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class StateGroup(msgspec.Struct, frozen=True):
    """Recurrent layers with like states."""

    layers: tuple[int, ...]
    """Layer indices of the model, ascending; a layer may have attention too."""
    components: tuple[StateComponent, ...]
    """Tensors of one layer, in the order of pools and messages."""

    @property
    def state_bytes(self) -> int:
        """Bytes of one request's state in all layers of the group."""
        return len(self.layers) * sum(component.num_bytes for component in self.components)
