"""Measurement of the time that a message of partials takes of the ranks at both ends, beside moving its bytes.

Holds one measurement. Must not know links or kernels.
Read next: `longspan.costmodel.parameters`, which says what the numbers mean; `longspan.comm.measure`.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import torch

from longspan.attention.partial import PartialAttention
from longspan.costmodel.parameters import KernelRates
from longspan.cp.wire import PartialMessage
from longspan.kv.layout import KVGroup
from longspan.plan.message_format import PartialFormat

REPEATS = 60


class MessageTimes(NamedTuple):
    """Seconds for a partial of one row."""

    pack_s: float
    """Seconds to allocate and fill the message."""
    merge_s: float
    """Seconds to merge the message into the home's partial."""

    def add_to(self, rates: KernelRates) -> KernelRates:
        """Return rates that include these times; `exchange_s` gets the time of sending elsewhere."""
        return msgspec.structs.replace(rates, exchange_s=self.pack_s / 2, merge_s=self.merge_s)


def measure_messages(group: KVGroup, device: torch.device) -> MessageTimes:
    """Measure this rank; other ranks may measure at the same time."""
    heads, width = group.num_query_heads, group.spec.out_width
    partial = PartialAttention(torch.randn(1, heads, width, device=device), torch.randn(1, heads, device=device))
    form = PartialFormat.of(group)
    message = PartialMessage(form, 1, device)
    message.pack(partial)
    home = [PartialAttention(partial.out.clone(), partial.lse.clone())]
    return MessageTimes(
        pack_s=_mean_s(lambda: PartialMessage(form, 1, device).pack(partial)),
        merge_s=_mean_s(lambda: message.merge_into_(home, [(0, 0, 1)])),
    )


def _mean_s(call: Callable[[], object]) -> float:
    """Seconds of a call: the mean without the longest tenth, since ranks may take turns on a core."""
    times: list[float] = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.fmean(sorted(times)[: REPEATS - REPEATS // 10])
