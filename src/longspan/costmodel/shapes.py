"""Shape of a model, as planning needs it: its facts and its numbers of weights.

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
    """Shape of an attention model, or of one device's part of it."""

    spec: ModelSpec
    dtype: PlannedDType
    """Dtype of weights and activations; that of KV is in the layout of `spec`."""
    hidden_size: int
    intermediate_size: float
    """Width of the feed-forward part."""
    num_weights: float
    """All weights that memory holds."""
    num_logit_weights: float
    """Weights between the last layer and the logits."""
    not_run: str | None = None
    """Reason why the engine refuses this model, or None if it runs the model."""

    @property
    def itemsize_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights."""
        return self.num_weights * self.itemsize_bytes

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's KV in all layers."""
        return sum(group.token_bytes for group in self.spec.kv_groups)

    def unread_weights(self, num_tokens: int = 1) -> float:
        """Weights of the last layer that tokens without logits do not read: all but those of q, k and v; none where the
        layer has no attention, or carries a state on.

        Args:
            num_tokens: tokens of the step; only where there are experts the result depends on it.
        """
        last = self.spec.last_group
        if last is None:
            return 0.0
        widths = last.query_elements + last.spec.layout.token_elements
        return max(0.0, self.spec.parameters_read(num_tokens) / self.spec.num_layers - self.hidden_size * widths)

    def is_divisible(self, tensor_parallel_size: int) -> bool:
        """Whether `divided` accepts this size."""
        if self.spec.state_groups and tensor_parallel_size > 1:
            return False
        return all(is_divisible(group, tensor_parallel_size) for group in self.spec.kv_groups)

    def divided(self, tensor_parallel_size: int) -> "ModelShape":
        """One device's part of the model where `tensor_parallel_size` devices share heads and weights.

        Where there are fewer KV heads than devices, several devices hold the same ones.

        Raises:
            ConfigError: the heads cannot be divided.
        """
        size = tensor_parallel_size
        if size == 1:
            return self
        if self.spec.state_groups:
            raise ConfigError(
                f"tensor_parallel_size: got {size} for a model with recurrent layers, plannable is 1: how devices "
                "share a state is not modelled"
            )
        groups: list[KVGroup] = []
        for group in self.spec.kv_groups:
            query_heads, kv_heads = group.num_query_heads, group.spec.layout.num_kv_heads
            if not is_divisible(group, size):
                raise ConfigError(
                    f"tensor_parallel_size: got {size} with {query_heads} query and {kv_heads} KV heads, legal is a "
                    "divisor of the query heads that divides the KV heads or is a multiple of them"
                )
            layout = group.spec.layout.with_kv_heads(max(1, kv_heads // size))
            divided = msgspec.structs.replace(group.spec, layout=layout)
            groups.append(msgspec.structs.replace(group, spec=divided, num_query_heads=query_heads // size))
        spec = msgspec.structs.replace(
            self.spec,
            kv_groups=tuple(groups),
            num_parameters=-(-self.spec.num_parameters // size),
            experts=None if self.spec.experts is None else self.spec.experts.divided(size),
        )
        return msgspec.structs.replace(
            self,
            spec=spec,
            intermediate_size=self.intermediate_size / size,
            num_weights=self.num_weights / size,
            num_logit_weights=self.num_logit_weights / size,
        )


def is_divisible(group: KVGroup, size: int) -> bool:
    """Whether devices can share the heads of a KV group; where there are fewer KV heads, several have the same ones."""
    kv_heads = group.spec.layout.num_kv_heads
    return group.num_query_heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
