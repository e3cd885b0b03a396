"""vLLM's place for context parallelism in its V2 model runner, where rows go to the owners of their blocks.

Holds the manager that vLLM asks for this rank's rows. Must not know block ids, layers or kernels.
Read next: `longspan.integrations.vllm.runner.rows`; vLLM's `v1/worker/gpu/pcp_manager.py`, which does the rest:
padding, hidden states of all rows back on all ranks, sampling.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.distributed.parallel_state import get_pcp_group
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.pcp_manager import PCPManager

from longspan.integrations.vllm.runner.messages import RankMessages
from longspan.integrations.vllm.runner.rows import RankRun, Scheduled, cut_runs, rows_of_rank
from longspan.integrations.vllm.runner.step import RankedStep


class OwnerManager(PCPManager):
    """A `PCPManager` under which a token is computed by the rank that stores it."""

    def __init__(self, *args: Any, max_num_tokens: int, block_tables: Any = None, **kwargs: Any) -> None:
        """Make buffers for as many runs as a step has rows: a run may be one token.

        vLLM's own limit, two per request, is too low where a chunk has many stripes. `block_tables` come here in vLLM
        0.32, and by `set_block_tables` in 0.33.
        """
        kwargs["max_num_reqs"] = -(-max_num_tokens // 2)  # vLLM doubles it
        super().__init__(*args, max_num_tokens=max_num_tokens, block_tables=None, **kwargs)
        self.messages = RankMessages(get_pcp_group().device_group)
        self.step: RankedStep | None = None
        """Attention of the step that is being prepared; None for a dummy run, which stores and attends to nothing."""
        self._tables = block_tables
        self._scheduled: Sequence[Scheduled] = ()
        self._runs: list[list[RankRun]] = [[] for _ in range(self.pcp_world_size)]
        self._no_blocks = torch.zeros(max_num_tokens, 1, dtype=torch.int32, device=self.device)
        self._no_slots = torch.full((1, max_num_tokens), PAD_SLOT_ID, dtype=torch.int64, device=self.device)

    @staticmethod
    def validate_config(vllm_config: Any, supports_mm_inputs: bool) -> None:
        """Accept: `longspan.integrations.vllm.runner.checks` has refused what does not work."""

    def set_block_tables(self, block_tables: Any) -> None:
        """Take over vLLM's block tables, in which the runner keeps this rank's blocks only."""
        self._tables = block_tables

    def begin(self, scheduled: Sequence[Scheduled]) -> None:
        """Say what the step computes, before vLLM asks for its rows.

        Args:
            scheduled: the requests in the order of vLLM's batch.
        """
        self._scheduled = scheduled
        self._runs = cut_runs(scheduled, self.pcp_world_size)

    def replicated_requests(
        self, num_scheduled_tokens: NDArray[np.int32], is_prefilling: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Return that no request's rows are computed on all ranks."""
        return np.zeros(len(num_scheduled_tokens), dtype=np.bool_)

    def _iter_rank_chunks(
        self, rank: int, num_scheduled_tokens: NDArray[np.int32], is_prefilling: NDArray[np.bool_]
    ) -> Iterator[tuple[int, int, int]]:
        """Yield (request of the batch, first of its scheduled tokens, number of tokens) of one rank, by row."""
        for run in self._runs[rank]:
            start = self._scheduled[run.request].start
            yield run.request, run.start - start, run.num_tokens

    def prepare_attn(self, input_batch: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        """Prepare the step's attention; vLLM gets tables that nobody reads."""
        assert self._tables is not None, "vLLM attaches block tables before the first step"
        assert int(input_batch.num_tokens) == sum(run.num_tokens for run in self._runs[self.pcp_rank])
        (block_table,), (block_size,) = self._tables.block_tables, self._tables.block_sizes
        rows = rows_of_rank(self.pcp_rank, self._scheduled, self._runs)
        self.step = RankedStep(rows, block_table.gpu, block_size, self.messages, self._upload)
        return self._placeholders(input_batch.num_reqs_after_padding, input_batch.num_tokens_after_padding)

    def get_dummy_block_tables(self, num_reqs: int) -> tuple[Tensor, ...]:
        """Begin a dummy run."""
        self.step = None
        return self._placeholders(num_reqs, 0)[0]

    def get_dummy_slot_mappings(self, num_tokens: int) -> Tensor:
        """Return slots for nothing."""
        return self._placeholders(0, num_tokens)[1]

    def _placeholders(self, num_reqs: int, num_tokens: int) -> tuple[tuple[Tensor, ...], Tensor]:
        return (self._no_blocks[:num_reqs],), self._no_slots[:, :num_tokens]

    def _upload(self, numbers: NDArray[np.int64]) -> Tensor:
        found: Tensor = async_tensor_h2d(numbers, device=self.device)
        return found
