"""Costs that all ranks agree on, since every rank chooses strategies by itself.

Holds the measurement at start. Must not know vLLM, or what is predicted from the costs.
Read next: `longspan.costmodel.measured`, which combines measurements; `longspan.integrations.vllm.planning`.
"""

import os

import torch
import torch.distributed as dist

from longspan.attention.base import AttentionBackend
from longspan.attention.measure import measure_kernels
from longspan.comm.base import Communicator
from longspan.comm.measure import measure_links
from longspan.costmodel.measured import RankMeasurement, combine
from longspan.costmodel.parameters import Costs, costs_by_bytes
from longspan.cp.measure import measure_messages
from longspan.integrations.vllm.options import Options
from longspan.kv.layout import KVGroup
from longspan.types import AttentionParams


@torch.inference_mode()
def agree_on_costs(
    options: Options,
    backend: AttentionBackend,
    group: KVGroup,
    params: AttentionParams,
    comm: Communicator,
    device: torch.device,
) -> Costs:
    """Measure all processes of this machine at the same time, and take the slowest's numbers.

    Strategies are chosen by bytes, without a measurement, with one rank, a forced strategy, or `measure: never`.

    Args:
        options: the user's options.
        backend: this process's kernels.
        group: the model's KV group, as this process holds it.
        params: attention parameters of one layer.
        comm: the cp_group's communicator, without an exchange under way.
        device: where the model runs.

    Returns:
        Costs that are equal in every process, to the bit: each gets all measurements, in one order.

    Collective: every process of the default group, once, before the first step; half a second to a second.
    """
    nodes = (0,) * comm.size
    if comm.size == 1 or options.forced_strategy or options.measure == "never":
        return costs_by_bytes(nodes)
    num_threads = dist.get_world_size() * torch.get_num_threads()
    ranks_per_device = max(1.0, num_threads / (os.cpu_count() or 1))  # vLLM binds this process to some of the cores
    rates = measure_kernels(backend, group, params, ranks_per_device=ranks_per_device, sync=dist.barrier, device=device)
    dist.barrier()
    rates = measure_messages(group, device).add_to(rates)
    mine = RankMeasurement(comm.rank, rates, measure_links(comm, nodes))
    all_measured: list[RankMeasurement | None] = [None] * dist.get_world_size()
    dist.all_gather_object(all_measured, mine)
    return combine([measured for measured in all_measured if measured is not None], nodes)
