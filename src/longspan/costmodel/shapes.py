"""What planning must know of a model: its facts, and how many weights there are.

Holds arithmetic on shapes. Must not know configs or families: `longspan.models.shape` reads those.
Read next: `longspan.costmodel.model_time`.
"""

from typing import Literal

import msgspec

from longspan.errors import ConfigError
from longspan.kv.layout import DTYPE_BYTES, KVGroup
from longspan.types import ModelSpec

PlannedDType = Literal["bfloat16", "float32"]


class ModelShape(msgspec.Struct, frozen=True):
    """A dense attention model, or one device's part of it."""

    spec: ModelSpec
    dtype: PlannedDType
    """Of weights and activations; that of KV stands in its layout."""
    hidden_size: int
    intermediate_size: float
    """Of the feed-forward part."""
    num_weights: float
    """All of them; what memory must hold."""
    num_logit_weights: float
    """Those between the last layer and the logits."""
    not_run: str | None = None
    """Why the engine refuses this model today, or None if it runs it."""

    @property
    def itemsize_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def weight_bytes(self) -> float:
        """What memory must hold."""
        return self.num_weights * self.itemsize_bytes

    @property
    def kv_token_bytes(self) -> int:
        """KV of one token in all layers."""
        return sum(group.token_bytes for group in self.spec.kv_groups)

    @property
    def num_unread_weights(self) -> float:
        """Weights of the last layer that a prompt's inner tokens do not meet: all but those of q, k and v."""
        (last,) = [group for group in self.spec.kv_groups if self.spec.num_layers - 1 in group.layers]
        widths = last.query_elements + last.spec.layout.token_elements
        return max(0.0, self.spec.num_parameters / self.spec.num_layers - self.hidden_size * widths)

    def is_divisible(self, tensor_parallel_size: int) -> bool:
        """Whether `divided` takes this size."""
        return all(_is_divisible(group, tensor_parallel_size) for group in self.spec.kv_groups)

    def divided(self, tensor_parallel_size: int) -> "ModelShape":
        """One device's part where so many devices share heads and weights.

        Where there are fewer KV heads than devices, several devices hold the same ones.

        Raises:
            ConfigError: the heads cannot be divided.
        """
        size = tensor_parallel_size
        if size == 1:
            return self
        groups: list[KVGroup] = []
        for group in self.spec.kv_groups:
            query_heads, kv_heads = group.num_query_heads, group.spec.layout.num_kv_heads
            if not _is_divisible(group, size):
                raise ConfigError(
                    f"tensor_parallel_size: got {size} with {query_heads} query and {kv_heads} KV heads, legal is a "
                    "divisor of the query heads that divides the KV heads or is a multiple of them"
                )
            layout = group.spec.layout.with_kv_heads(max(1, kv_heads // size))
            spec = msgspec.structs.replace(group.spec, layout=layout)
            groups.append(msgspec.structs.replace(group, spec=spec, num_query_heads=query_heads // size))
        parameters = -(-self.spec.num_parameters // size)
        return msgspec.structs.replace(
            self,
            spec=msgspec.structs.replace(self.spec, kv_groups=tuple(groups), num_parameters=parameters),
            intermediate_size=self.intermediate_size / size,
            num_weights=self.num_weights / size,
            num_logit_weights=self.num_logit_weights / size,
        )


def _is_divisible(group: KVGroup, size: int) -> bool:
    kv_heads = group.spec.layout.num_kv_heads
    return group.num_query_heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
