"""Interface of movement strategies, and what they are given.

Holds the protocol and small helpers that several strategies share. Must not know which strategy is chosen, models or
schedulers.
Read next: `longspan.cp.local`, `longspan.cp.gather_kv`, `longspan.cp.pass_kv`, `longspan.cp.pass_q`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from longspan.attention.base import AttentionBackend, RowSegment, RowSegments
from longspan.attention.partial import PartialAttention, merge_rows_
from longspan.comm.base import Communicator
from longspan.cp.resolve import PoolLayout, query_rows
from longspan.kv.layout import KVGroup, KVLayout
from longspan.kv.stored import holds
from longspan.plan.segments import cut_runs, make_segments
from longspan.plan.types import GroupStep, QueryRun, Range, Segment
from longspan.sharding.pages import KeyRun, PageTable
from longspan.types import AttentionParams


@dataclass(frozen=True, slots=True)
class RankStep:
    """One rank's view of one KV group in one step."""

    comm: Communicator
    backend: AttentionBackend
    group: KVGroup
    step: GroupStep
    query_runs: Sequence[QueryRun]
    """Query runs of all ranks, in plan order."""
    tables: Mapping[int, PageTable]
    """Page table of every request in this KV group, by request id."""
    segments: Sequence[Segment]
    """Segments of this rank's queries, and of other ranks' queries over this rank's keys, in plan order."""

    @classmethod
    def of(
        cls,
        comm: Communicator,
        backend: AttentionBackend,
        group: KVGroup,
        step: GroupStep,
        query_runs: Sequence[QueryRun],
        tables: Mapping[int, PageTable],
    ) -> "RankStep":
        """Derive a rank's view from a plan's query runs and its page tables."""
        segments = make_segments(query_runs, tables, group.spec.window, group.spec.chunk, comm.rank)
        check_participants(step, segments)
        return cls(comm, backend, group, step, query_runs, tables, segments)

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def pool_layout(self) -> PoolLayout:
        """Places of this rank's keys in its pool."""
        return PoolLayout(self.tables, self.rank)

    def local_query_rows(self) -> dict[Range, int]:
        """First packed row of every query run that this rank computes, runs being cut where chunks end."""
        return query_rows(cut_runs(self.query_runs, self.group.spec.chunk), self.rank)


def check_participants(step: GroupStep, segments: Iterable[Segment]) -> None:
    """Assert that a plan knows of every pair of ranks that segments bring together: a message that it does not know of
    would be sent and expected by nobody."""
    met = {rank for s in segments if s.query_rank != s.key_rank for rank in (s.query_rank, s.key_rank)}
    assert met <= set(step.participants), "plan and page tables disagree"


def check_rows(step: RankStep, num_sent: int, num_received: int) -> None:
    """Assert that a rank moves as many rows in a layer as the plan says; both ends of a message do so."""
    group_step, participants = step.step, step.step.participants
    said = (0, 0)
    if step.rank in participants:
        index = participants.index(step.rank)
        said = (group_step.num_sent[index], group_step.num_received[index])
    assert (num_sent, num_received) == said, "plan and page tables disagree"


class MovementStrategy(Protocol):
    """Strategy that brings the queries of a step and their keys together. Made once per step and KV group."""

    def run_layer(self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> PartialAttention:
        """Compute attention of this rank's queries over all their keys, on whichever rank the keys lie.

        Args:
            q: [T, H, D] this rank's packed queries, T may be 0.
            k: [Hkv, rows, D] this rank's pool of the layer, this step's tokens included.
            v: [Hkv, rows, Dv] this rank's pool of the layer, this step's tokens included.
            params: the layer's attention parameters.

        Returns:
            One partial over all visible keys, [T, H, Dv].

        Collective: all ranks that the step's exchanges name must call it, in the same order of layers; once per layer.
        """


class KeyShare:
    """Keys in one tensor that this rank's queries see."""

    def __init__(self, segments: Sequence[RowSegment]) -> None:
        """Take the segments.

        Args:
            segments: segments over the tensor's keys; their query rows are this rank's packed rows.
        """
        self._first = min((s.query_row for s in segments), default=0)
        self._last = max((s.query_row + s.num_queries for s in segments), default=0)
        self._segments = RowSegments(replace(s, query_row=s.query_row - self._first) for s in segments)

    def accumulate_(
        self, acc: PartialAttention, backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams
    ) -> None:
        """Merge the attention over these keys into `acc` [T, H, Dv], touching only the rows that see them."""
        if self._segments:
            part = backend.partial_attention(q[self._first : self._last], k, v, self._segments, params)
            merge_rows_(acc, self._first, part)


class KVBlock:
    """Buffer for the KV of up to `capacity` tokens in one layer, sent as one message.

    A message holds the layout's components one after the other, each as [heads, rows, stored width].
    """

    def __init__(self, layout: KVLayout, capacity: int, device: torch.device) -> None:
        (dtype,) = {holds(component) for component in layout.components}  # a message is one tensor
        self._layout = layout
        self._flat = torch.empty(capacity * layout.stored_elements, dtype=dtype, device=device)

    def message(self, num_rows: int) -> Tensor:
        """Part of the buffer [elements] that `num_rows` tokens take."""
        return self._flat[: num_rows * self._layout.stored_elements]

    def views(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """K [Hkv, num_rows, stored D] and V [Hkv, num_rows, stored Dv] in the buffer."""
        stored, width = self._stored(num_rows), self._layout.v_width_in_k
        return stored[0], stored[1] if width is None else stored[0][:, :, :width]

    def _stored(self, num_rows: int) -> list[Tensor]:
        """Views [heads, num_rows, stored width] of the buffer, one per component."""
        stored: list[Tensor] = []
        start = 0
        for component in self._layout.components:
            heads, width = component.num_heads, component.stored_width
            stored.append(self._flat.as_strided((heads, num_rows, width), (num_rows * width, width, 1), start))
            start += heads * num_rows * width
        return stored

    def pack(self, k: Tensor, v: Tensor, runs: Sequence[tuple[int, KeyRun]]) -> int:
        """Copy runs of a pool into the buffer, one behind the other.

        Returns:
            Number of rows packed.
        """
        num_rows = sum(run.num_tokens for _, run in runs)
        for packed, source in zip(self._stored(num_rows), (k, v), strict=False):  # values may be a part of keys
            parts = [source.narrow(1, run.row, run.num_tokens) for _, run in runs]
            if len(parts) == 1:
                packed.copy_(parts[0])
            else:
                torch.cat(parts, dim=1, out=packed)
        return num_rows
