"""Peak rates of chips, from their makers' tables; programs stay below them."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One accelerator, as JAX counts devices."""

    flops: float  # dense bfloat16 operations per second; a product and a sum count as two
    memory: float  # bytes
    bandwidth: float  # bytes per second between memory and chip
    link: float  # bytes per second to its neighbours, over all links together
    links: int  # number of these links; one step of a ring uses one
    joined: int  # chips that the links can connect: a pod of TPUs, a server of GPUs
    beyond: float  # bytes per second of each chip beyond these; 0: not known
    per_host: int


GIB = 2**30
CHIPS = {
    # cloud.google.com/tpu/docs/v4: 275 teraflops, 32 GiB, 1200 GBps, pods of 4,096. Links: Jouppi et al. 2023, arXiv
    # 2304.01433, six of 50 GB/s each way.
    "v4": Chip(275e12, 32 * GIB, 1200e9, 300e9, 6, 4096, 0, 4),
    # .../v5e: 197 TFLOPs, 16 GB, 819 GBps, 400 GBps both ways over four ports, pods of 256, 6.4 Tbps beyond a pod.
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 4, 256, 6.4e12 / 8 / 256, 8),
    # .../v5p: 459 TFLOPs, 95 GB, 2765 GBps, 4800 Gbps, a 3D torus (six links), pods of 8,960.
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 6, 8960, 0, 4),
    # .../v6e: 918 TFLOPs, 32 GB, 1638 GBps, 800 GBps both ways over four ports, pods of 256; beyond: unknown.
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9, 4, 256, 0, 8),
    # NVIDIA's data sheet of the A100 80GB SXM: 312 TFLOPS, 2039 GB/s, NVLink 600 GB/s both ways; DGX A100: eight, with
    # one 200 Gb/s port each.
    "A100": Chip(312e12, 80e9, 2039e9, 300e9, 1, 8, 25e9, 8),
    # NVIDIA's data sheet of the H100 SXM: 1979 TFLOPS with sparsity, half of it dense; 3.35 TB/s, NVLink 900 GB/s both
    # ways; DGX H100: eight, with one 400 Gb/s port each.
    "H100": Chip(989.5e12, 80e9, 3350e9, 450e9, 1, 8, 50e9, 8),
}
