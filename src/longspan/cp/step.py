"""Interface of one step's attention on one rank, for its host: our engine, or vLLM.

Holds the protocol. Must not know models, schedulers or processes.
Read next: `longspan.cp.eager`, which runs any step; `longspan.cp.fixed`, which runs decode steps that a CUDA graph can
repeat; `longspan.worker.forward`, which calls a model with either.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class StepAttention(Protocol):
    """Attention of all layers in one step on one rank."""

    @property
    def rank(self) -> int:
        """Position of this rank in the cp_group."""

    @property
    def num_rows(self) -> int:
        """Number of rows that this rank's model computes; 0 on a rank that only joins."""

    @property
    def read_rows(self) -> Tensor | None:
        """Rows [n] int64 whose output of the last layer is needed, or None for all."""

    @property
    def bytes_sent(self) -> Mapping[str, int]:
        """Bytes that this rank sends in this step, per strategy; complete when all layers have run."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        """Store the keys and values of this rank's new tokens in one layer, and compute their attention.

        Args:
            layer: layer of the model.
            q: [T, H, D] queries after RoPE; T is `num_rows`, in the plan's order.
            k: [Hkv, T, D] keys of the same tokens, after RoPE.
            v: [Hkv, T, Dv] values.
            sinks: [H] attention sinks, natural-log logits, or None.

        Returns:
            [T, H, Dv] in q's dtype; 0 in rows of the last layer that are not read.

        Collective: all ranks of the plan call it (or `join`) for every layer in ascending order.
        """

    def join(self, layer: int) -> None:
        """Take part in one layer's exchanges, on a rank without rows.

        Collective: all ranks of the plan call `attend` or this for every layer in ascending order.
        """
