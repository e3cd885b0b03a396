"""Messages between ranks beside attention: hidden states to the rank that samples, and its tokens to the others.

Holds the two messages of a step, each left out where it is not needed. Must not know plans, models or vLLM.
Read next: `longspan.integrations.vllm.worker`, Note [Who samples].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.comm.base import Communicator, Pending
from longspan.integrations.vllm.planning import Row
from longspan.integrations.vllm.requests import RequestState


class StepExchange:
    """One rank's side of the messages; cp_rank 0 samples."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._arriving: tuple[Pending, Tensor, list[RequestState]] | None = None

    def gather(self, hidden: Tensor, wanted: Sequence[Row]) -> Tensor | None:
        """Return the wanted rows of all ranks, [len(wanted), hidden], on cp_rank 0, and None on other ranks.

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
        """Send the other ranks what cp_rank 0 has sampled.

        Collective: once per step that samples, cp_rank 0, while the others call `expect_tokens`.
        """
        tokens = torch.tensor(token_ids)
        self._comm.exchange([(peer, tokens) for peer in range(1, self._comm.size)], []).wait()

    def expect_tokens(self, states: list[RequestState]) -> None:
        """Let `hear_tokens` add a token to each of these requests.

        Collective: once per step that samples, all ranks but cp_rank 0.
        """
        if states:
            tokens = torch.empty(len(states), dtype=torch.int64)
            self._arriving = (self._comm.exchange([], [(0, tokens)]), tokens, states)

    def hear_tokens(self) -> None:
        """Take in the tokens of the last step; called with the next step, or at once by a rank without other work."""
        if self._arriving is not None:
            (pending, tokens, states), self._arriving = self._arriving, None
            pending.wait()
            for state, token_id in zip(states, tokens.tolist(), strict=True):
                state.output_token_ids.append(token_id)
