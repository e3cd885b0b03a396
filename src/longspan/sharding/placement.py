"""Placement: the rank of each page of a request.

Holds pure functions of integers. Must not know slots, requests or time.
Read next: `longspan.sharding.geometry`; `longspan.scheduler.page_placer`, which places a request's pages.

Note [Snake order]
    Striped placement lays stripes on ranks 0, 1, .., N-1, N-1, .., 1, 0, 0, 1, .. so that early (cheap) and late
    (dear) stripes pair up. Causal attention work of stripe i grows as 2i + 1. With N = 2 and 4 equal stripes:

        stripe        0  1  2  3        work  rank 0: 1 + 7 = 8
        rank          0  1  1  0              rank 1: 3 + 5 = 8      (round-robin: 6 and 10)

    The excess is 0 whenever the number of stripes is a multiple of 2N; `StepGeometry.stripes` cuts chunks that way. A
    *pass* is one stripe on every rank, forwards or backwards.

Note [Weighted stripes]
    A rank with twice the weight of another gets stripes of twice the length, and snake order balances as before: the
    tokens of a rank in a pass and in the pass back lie around the same mean position, whatever the lengths. With
    weights 2 and 1, and passes of 3 tokens:

        token         0 1 2 3 4 5       work  rank 0: 1 + 3 + 9 + 11 = 24
        rank          0 0 1 1 0 0             rank 1: 5 + 7          = 12
"""

from collections.abc import Iterator, Sequence

from longspan.types import Placement


def snake_order(ranks: Sequence[int]) -> Iterator[int]:
    """Endless sequence of ranks: forwards, backwards, forwards, ..."""
    while True:
        yield from ranks
        yield from reversed(ranks)


def snake_rank(stripe_idx: int, home: int, num_ranks: int) -> int:
    """Rank of one stripe in the snake order that starts at rank `home`."""
    step = stripe_idx % (2 * num_ranks)
    return (home + (step if step < num_ranks else 2 * num_ranks - 1 - step)) % num_ranks


def chunk_len(max_tokens_per_rank: int, stripe_len: int, num_ranks: int) -> int:
    """Tokens of a full striped chunk: the most that keeps every rank at or under its budget.

    The chunk is a multiple of `2 * num_ranks` stripes where the budget admits one, else of `num_ranks` stripes. The
    budget holds a stripe at least.
    """
    per_rank = max_tokens_per_rank // stripe_len
    if per_rank > 1:
        per_rank -= per_rank % 2
    return per_rank * stripe_len * num_ranks


def equal_stripes(num_pages: int, stripe_pages: int, cycle: int) -> list[int]:
    """Cut pages into the fewest stripes of at most `stripe_pages` whose number is a multiple of `cycle`.

    They are as equal as pages allow, longer ones first; some are empty when there are fewer pages than stripes.
    """
    num_stripes = cycle * -(-num_pages // (cycle * stripe_pages))
    short, longer = divmod(num_pages, max(1, num_stripes))
    return [short + 1] * longer + [short] * (num_stripes - longer)


def weighted_stripes(num_pages: int, num_passes: int, shares: Sequence[int], order: Sequence[int]) -> list[int]:
    """Cut pages into one stripe per rank and pass, so that every rank gets its share to within a page.

    A rank's own stripes are as equal as pages allow, longer ones first; some are empty where there are few pages.

    Args:
        num_pages: pages to cut.
        num_passes: passes over all ranks.
        shares: what each rank's pages are in proportion to.
        order: rank of every stripe: in each pass every rank once.
    """
    num_ranks, whole = len(shares), sum(shares)
    pages = [num_pages * share // whole for share in shares]
    lacking = sorted(range(num_ranks), key=lambda rank: num_pages * shares[rank] % whole, reverse=True)
    for rank in lacking[: num_pages - sum(pages)]:
        pages[rank] += 1
    return [pages[rank] // num_passes + (i // num_ranks < pages[rank] % num_passes) for i, rank in enumerate(order)]


def place(placement: Placement, stripes: Sequence[int], room: Sequence[int], home: int) -> list[tuple[int, int]] | None:
    """Choose the rank of every page of a request, before its first token is computed.

    Args:
        placement: the policy.
        stripes: pages per stripe, in sequence order.
        room: free pages per rank.
        home: rank that packed and spill fill first, and where snake order starts.

    Returns:
        Runs `(rank, num_pages)` in sequence order, or None when the pages do not fit. A stripe whose rank has no room
        left goes on to the next rank in snake order that has room.
    """
    left = list(room)
    num_ranks = len(room)
    num_pages = sum(stripes)
    order = [(home + i) % num_ranks for i in range(num_ranks)]
    if num_pages > (left[home] if placement is Placement.PACKED else sum(left)):
        return None
    runs: list[tuple[int, int]] = []

    def put(rank: int, pages: int) -> int:
        """Place up to `pages` pages on a rank; return how many did not fit."""
        taken = min(pages, left[rank])
        if taken:
            left[rank] -= taken
            if runs and runs[-1][0] == rank:
                runs[-1] = (rank, runs[-1][1] + taken)
            else:
                runs.append((rank, taken))
        return pages - taken

    if placement is not Placement.STRIPED:
        for rank in order:
            num_pages = put(rank, num_pages)
        return runs
    snake = snake_order(order)
    for stripe in stripes:
        pages = put(next(snake), stripe)
        while pages:
            pages = put(next(snake), pages)
    return runs
