"""Bytes of the messages between ranks, and the layout of partials in a message.

Holds arithmetic on shapes, shared by the ranks that send and by the cost model. Must not know torch, or senders.
Read next: `longspan.cp.wire`, messages as tensors; `longspan.costmodel.predict`, which predicts their times.

Note [Layout of partials]
    A message of n rows of H heads holds `lse` [n, H], then `out` [n, H, Dv], so that `out` is aligned for every n.
    `out` is rounded once to the group's dtype of partials. `lse` keeps float32, or float64 beside an `out` of float64:
    the error then does not grow with the number of ranks (a partial that a leader merges is rounded twice, whatever
    that number). Example: 3 rows of 2 heads with Dv 4, in bfloat16:

        bytes 0..23     lse    3 x 2 float32
        bytes 24..71    out    3 x 2 x 4 bfloat16
"""

from dataclasses import dataclass

from longspan.kv.layout import DTYPE_BYTES, KVGroup
from longspan.plan.types import Operand


@dataclass(frozen=True, slots=True)
class PartialFormat:
    """Format in which the partials of one KV group travel. See Note [Layout of partials]."""

    num_heads: int
    """Query heads."""
    v_width: int
    """Elements of one head of `out`."""
    lse_dtype: str
    out_dtype: str
    lse_bytes: int
    """Bytes of one row of `lse`; `out` begins at this number times the rows of the message."""
    row_bytes: int
    """Bytes of one row of `lse` and `out` together."""

    @classmethod
    def of(cls, group: KVGroup) -> "PartialFormat":
        """Format of a KV group's partials."""
        heads, width, out_dtype = group.num_query_heads, group.spec.out_width, group.partial_dtype
        lse_dtype = "float64" if out_dtype == "float64" else "float32"
        lse_bytes = heads * DTYPE_BYTES[lse_dtype]
        return cls(heads, width, lse_dtype, out_dtype, lse_bytes, lse_bytes + heads * width * DTYPE_BYTES[out_dtype])


def row_bytes(operand: Operand, group: KVGroup) -> int:
    """Bytes of one row of a message: one token's keys and values, its queries, or its partial."""
    if operand == "kv":
        return group.spec.layout.token_bytes
    if operand == "query":
        return group.query_row_bytes
    assert operand == "partial", operand
    return PartialFormat.of(group).row_bytes
