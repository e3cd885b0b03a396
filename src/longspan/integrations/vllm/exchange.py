"""What ranks tell each other beside attention: hidden states to the rank that samples, tokens from it.

Holds two messages per step, and neither where it is not needed. Must not know plans, models or vLLM.
Read next: `longspan.integrations.vllm.worker`, Note: who samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.comm.base import Communicator, Pending
from longspan.integrations.vllm.planning import Row
from longspan.integrations.vllm.requests import RequestState


class StepExchange:
    """One rank's part. cp_rank 0 samples."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._arriving: tuple[Pending, Tensor, list[RequestState]] | None = None

    def gather(self, hidden: Tensor, wanted: Sequence[Row]) -> Tensor | None:
        """[len(wanted), hidden] rows of all ranks on cp_rank 0, None elsewhere.

        Collective: once per step, cp_rank 0 and the ranks with wanted rows.
        """
        mine = [row.row for row in wanted if row.rank == self._comm.rank]
        if self._comm.rank:
            if mine:
                self._comm.exchange([(0, hidden[mine])], []).wait()
            return None
        if len(mine) == len(wanted):
            return hidden[mine]
        rows = hidden.new_empty(len(wanted), hidden.shape[-1])
        places = [[i for i, row in enumerate(wanted) if row.rank == rank] for rank in range(self._comm.size)]
        arriving = {rank: hidden.new_empty(len(at), hidden.shape[-1]) for rank, at in enumerate(places) if rank and at}
        self._comm.exchange([], list(arriving.items())).wait()
        rows[places[0]] = hidden[mine]
        for rank, part in arriving.items():
            rows[places[rank]] = part
        return rows

    def tell_tokens(self, token_ids: list[int]) -> None:
        """Tell all ranks what cp_rank 0 has sampled. Collective: as `expect_tokens`."""
        tokens = torch.tensor(token_ids)
        self._comm.exchange([(peer, tokens) for peer in range(1, self._comm.size)], []).wait()

    def expect_tokens(self, states: list[RequestState]) -> None:
        """Let `hear_tokens` add a token to each of these requests. Collective: once per step that samples any."""
        if states:
            tokens = torch.empty(len(states), dtype=torch.int64)
            self._arriving = (self._comm.exchange([], [(0, tokens)]), tokens, states)

    def hear_tokens(self) -> None:
        """Take in what the last step has sampled: with the next one, or at once by a rank that has no other work."""
        if self._arriving is not None:
            (pending, tokens, states), self._arriving = self._arriving, None
            pending.wait()
            for state, token_id in zip(states, tokens.tolist(), strict=True):
                state.output_token_ids.append(token_id)
