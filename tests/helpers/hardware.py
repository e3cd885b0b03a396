"""Named hardware for tests of the policy: round numbers of its class."""

from longspan.costmodel.parameters import Costs, KernelRates, Link, Topology

NVLINK, NETWORK = Link(5e-6, 450e9), Link(10e-6, 50e9)
"""Per GPU and direction: inside a node of 8, and one 400 Gbit/s card per GPU between nodes."""


def gpus(num_nodes: int, gpus_per_node: int = 8) -> Costs:
    """Nodes of 8 GPUs of the H100 class, bfloat16."""
    nodes = tuple(node for node in range(num_nodes) for _ in range(gpus_per_node))
    rates = KernelRates(
        matmul_flops_per_s=600e12,
        read_bytes_per_s=2.8e12,
        copy_bytes_per_s=1.4e12,
        attention_flops_per_s=((1, 20e12), (16, 200e12), (128, 450e12)),
        call_s=5e-6,
        exchange_s=2e-6,
        layer_s=20e-6,
        merge_s=4e-6,
    )
    return Costs(Topology(nodes, NVLINK, NETWORK), rates)


def cores(num_ranks: int) -> Costs:
    """A machine with one core per rank, float32: messages are as fast as memory, so almost only work counts."""
    link = Link(15e-6, 2e9, short_bytes=32768, long_latency_s=100e-6)
    rates = KernelRates(
        matmul_flops_per_s=100e9,
        read_bytes_per_s=15e9,
        copy_bytes_per_s=10e9,
        attention_flops_per_s=((1, 60e9), (64, 90e9)),
        call_s=30e-6,
        exchange_s=6e-6,
        layer_s=100e-6,
        merge_s=25e-6,
    )
    return Costs(Topology((0,) * num_ranks, link, link), rates)


MEASURED = {
    "dtype": "float32",
    "memory_bytes": "4GiB",
    "topology": {
        "nodes": [0, 0, 1, 1],
        "inside": {"latency_s": 1e-4, "bytes_per_s": 2e9},
        "between": {"latency_s": 1e-3, "bytes_per_s": 1e8},
    },
    "rates": {
        "matmul_flops_per_s": 8e10,
        "read_bytes_per_s": 1e10,
        "copy_bytes_per_s": 5e9,
        "attention_flops_per_s": [[16, 4e10], [512, 6e10]],
        "call_s": 2e-5,
    },
}
