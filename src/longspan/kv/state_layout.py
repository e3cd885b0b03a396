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
    num_heads: int = 1
    """First dimension of `shape`, where it counts heads that can be computed one after the other; else 1."""

    def __post_init__(self) -> None:
        assert self.num_heads in (1, *self.shape[:1])

    @property
    def num_bytes(self) -> int:
        """Bytes of one request's tensor."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def parts(self, num_parts: int) -> list[range]:
        """Cut the heads to so many ranges, or to one for each head if they are fewer."""
        num_parts = min(num_parts, self.num_heads)
        return [range(self.num_heads * i // num_parts, self.num_heads * (i + 1) // num_parts) for i in range(num_parts)]


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

    @property
    def num_heads(self) -> int:
        """Heads of its states that can be computed one after the other: most parts in which they can be handed on."""
        return max(component.num_heads for component in self.components)
