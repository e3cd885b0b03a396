"""Work that waits on every rank, by which short requests choose theirs.

Holds sums that change with the requests, so that no admission goes through all of them. Must not know pages or plans.
Read next: `longspan.scheduler.admission`, which compares loads; `longspan.scheduler.scheduler`, which notes changes.
"""

from collections.abc import Sequence

from longspan.scheduler.request import Request

DECODE_COST = 16
"""Cost of a decoding request to its rank's next prefill, in tokens computed: it takes part in every step."""


class RankLoad:
    """Work of running requests per rank, in tokens to compute."""

    def __init__(self, num_ranks: int) -> None:
        """Begin without requests."""
        self._on_one = [0] * num_ranks  # of requests on one rank
        self._noted: dict[int, tuple[int, int]] = {}  # request on one rank: the rank, and what it counts for
        self._on_several: dict[int, Request] = {}

    def per_rank(self, shares: Sequence[int]) -> list[float]:
        """Load of every rank. Args: `shares` are what the ranks' parts of a striped prompt are in proportion to."""
        found = [float(load) for load in self._on_one]
        for _, request in sorted(self._on_several.items()):
            assert request.allocation is not None
            ranks = request.allocation.ranks
            left, whole = _left(request), sum([shares[rank] for rank in ranks])
            for rank in ranks:
                found[rank] += DECODE_COST + left * shares[rank] / whole
        return found

    def note(self, request: Request) -> None:
        """Take down that a running request is new, has been computed further, or has got pages on another rank."""
        self.remove(request)
        assert request.allocation is not None
        if len(request.allocation.ranks) > 1:
            self._on_several[request.request_id] = request
            return
        (rank,) = request.allocation.ranks
        work = DECODE_COST + _left(request)
        self._noted[request.request_id] = (rank, work)
        self._on_one[rank] += work

    def remove(self, request: Request) -> None:
        """Take out a request, if it is there."""
        self._on_several.pop(request.request_id, None)
        noted = self._noted.pop(request.request_id, None)
        if noted is not None:
            rank, work = noted
            self._on_one[rank] -= work

    def clear(self) -> None:
        """Take out all requests."""
        self._on_one = [0] * len(self._on_one)
        self._noted.clear()
        self._on_several.clear()


def _left(request: Request) -> int:
    """Prompt tokens that are to be computed."""
    return max(0, request.prompt_len - request.num_computed)
