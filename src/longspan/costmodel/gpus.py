"""Known GPUs: their vendors' published figures, per device.

Holds figures. Must not know which share of them a program reaches: `longspan.costmodel.published` does.
Read next: `longspan.costmodel.published`.

Sources: the vendors' data sheets of each product. Flops are dense (vendors print twice as many, "with sparsity"),
16-bit ones with float32 accumulation, float32 ones without tensor cores (PyTorch's default). Bytes are 10^9 per GB,
per direction (vendors print both directions of NVLink and PCIe together).

    a10, l4, l40s    NVIDIA A10, L4 and L40S data sheets; PCIe Gen4 x16
    a100-40g, -80g   NVIDIA A100 data sheet, SXM4; NVLink 3; DGX A100: a 200 Gbit/s adapter per GPU
    h100, h200       NVIDIA H100 and H200 data sheets, SXM5; NVLink 4; DGX H100: a 400 Gbit/s adapter per GPU
    b200             NVIDIA DGX B200 and HGX data sheets; NVLink 5; a 400 Gbit/s adapter per GPU
    gb200            NVIDIA GB200 NVL72 data sheet, a 72nd of the rack; a 400 Gbit/s adapter per GPU
    mi300x           AMD Instinct MI300X data sheet; a link of Infinity Fabric to each of seven others; 400 Gbit/s
    rtx4090          NVIDIA Ada GPU architecture paper; PCIe Gen4 x16

Assumed, because no vendor publishes it: every card on PCIe has a 100 Gbit/s adapter of its own.
"""

import msgspec


class GPU(msgspec.Struct, frozen=True):
    """Published figures of one device."""

    name: str
    """Usual name, for output."""
    memory_bytes: float
    bfloat16_flops_per_s: float
    float32_flops_per_s: float
    read_bytes_per_s: float
    """Bandwidth of the device's memory."""
    inside_bytes_per_s: float
    """Bandwidth to another device of the same node, in one direction."""
    between_bytes_per_s: float
    """Bandwidth to a device of another node, in one direction."""


_GB, _TF = 1e9, 1e12
_PCIE4, _ETHERNET_100 = 32 * _GB, 12.5 * _GB

GPUS = {
    "a10": GPU("A10", 24 * _GB, 125 * _TF, 31.2 * _TF, 600 * _GB, _PCIE4, _ETHERNET_100),
    "l4": GPU("L4", 24 * _GB, 121 * _TF, 30.3 * _TF, 300 * _GB, _PCIE4, _ETHERNET_100),
    "l40s": GPU("L40S", 48 * _GB, 362 * _TF, 91.6 * _TF, 864 * _GB, _PCIE4, _ETHERNET_100),
    "a100-40g": GPU("A100 SXM 40 GB", 40 * _GB, 312 * _TF, 19.5 * _TF, 1555 * _GB, 300 * _GB, 25 * _GB),
    "a100-80g": GPU("A100 SXM 80 GB", 80 * _GB, 312 * _TF, 19.5 * _TF, 2039 * _GB, 300 * _GB, 25 * _GB),
    "h100": GPU("H100 SXM", 80 * _GB, 989 * _TF, 67 * _TF, 3350 * _GB, 450 * _GB, 50 * _GB),
    "h200": GPU("H200 SXM", 141 * _GB, 989 * _TF, 67 * _TF, 4800 * _GB, 450 * _GB, 50 * _GB),
    "b200": GPU("B200", 180 * _GB, 2250 * _TF, 75 * _TF, 8000 * _GB, 900 * _GB, 50 * _GB),
    "gb200": GPU("GB200", 186 * _GB, 2500 * _TF, 80 * _TF, 8000 * _GB, 900 * _GB, 50 * _GB),
    "mi300x": GPU("MI300X", 192 * _GB, 1307 * _TF, 163.4 * _TF, 5300 * _GB, 64 * _GB, 50 * _GB),
    "rtx4090": GPU("RTX 4090", 24 * _GB, 165 * _TF, 82.6 * _TF, 1008 * _GB, _PCIE4, _ETHERNET_100),
}
"""Known GPUs by the name that users give."""

_NAMED = {
    "NVIDIA A10": "a10",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}
"""Names that CUDA reports, of the same boards: an H100 on PCIe has another name, and other links."""


def gpu_named(name: str) -> GPU | None:
    """Figures of the GPU that CUDA calls so; None for one that is not known."""
    known = _NAMED.get(name)
    return None if known is None else GPUS[known]
