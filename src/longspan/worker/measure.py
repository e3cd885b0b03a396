"""Measures one rank: kernels at the model's shapes, links, and what a layer takes outside attention.

Holds the order of measurements. Must not know what is predicted from them.
Read next: `longspan.attention.measure`, `longspan.comm.measure`; `longspan.policy.measured`.
"""

import msgspec
import torch

from longspan.attention.measure import measure_kernels
from longspan.comm.measure import barrier, measure_links
from longspan.policy.measured import RankMeasurement
from longspan.worker.messages import Measure
from longspan.worker.runner import ModelRunner


@torch.inference_mode()
def measure(runner: ModelRunner, message: Measure) -> RankMeasurement:
    """All numbers of this rank.

    Collective: all ranks, with the same message, while no plan is under way.
    """
    comm, group = runner.comm, runner.spec.kv_groups[0]

    def sync() -> None:
        barrier(comm)

    rates = measure_kernels(
        runner.backend,
        group,
        runner.spec.layer_params[group.layers[0]],
        ranks_per_device=message.ranks_per_device,
        sync=sync,
        device=runner.device,
    )
    sync()
    layer_s = runner.measure_layer_s(rates.read_bytes_per_s)
    links = measure_links(comm, message.nodes)
    comm.forget()
    return RankMeasurement(runner.rank, msgspec.structs.replace(rates, layer_s=layer_s), links)
