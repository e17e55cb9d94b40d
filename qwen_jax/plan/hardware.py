"""What is planned for: chips, their published figures, and topologies that XLA compiles for.

The figures of `CHIPS` are the makers' (data sheets of Google Cloud TPUs and of NVIDIA SXM modules)
or those of the Scaling Book (jax-ml.github.io/scaling-book) for links, unless said otherwise. The
last four are ours: what real programs reach of a peak.
"""

import dataclasses
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from qwen_jax.allocator import GPU_SHARE


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; a TPU 7x chip is two devices.

    platform: of JAX. peak_flops: dense bf16, FLOP/s. memory: bytes that a program may use.
    memory_bandwidth: bytes/s. link: bytes/s of one link in one direction, on TPUs of each of the
    `torus` axes, on GPUs of NVLink as a whole. network: bytes/s of one device to other slices or
    nodes. host: bytes/s between device and host. wraps: a torus axis at least this long closes to a
    ring. matmul, attention: shares of the peak that large products and fused attention reach.
    """

    platform: str
    peak_flops: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float
    host: float
    torus: int = 0
    wraps: int = 0
    matmul: float = 0.85
    attention: float = 0.5


GIB = 2**30
# Memory of TPUs: what their compiler grants. Of GPUs: the share that `train` gives to XLA.
CHIPS = {
    "v4": Chip("tpu", 275e12, 30.75 * GIB, 1.2e12, 4.5e10, 6.25e9, 1.6e10, torus=3, wraps=4),
    "v5e": Chip("tpu", 197e12, 15.75 * GIB, 8.1e11, 4.5e10, 3.1e9, 1.6e10, torus=2, wraps=16),
    "v5p": Chip("tpu", 459e12, 95.74 * GIB, 2.76e12, 9e10, 6.25e9, 1.6e10, torus=3, wraps=4),
    "v6e": Chip("tpu", 918e12, 31.25 * GIB, 1.6e12, 9e10, 1.25e10, 3.2e10, torus=2, wraps=16,
                matmul=0.75),
    "7x": Chip("tpu", 1153e12, 94.75 * GIB, 3.69e12, 4.5e10, 6.25e9, 3.2e10, torus=3, wraps=4,
               matmul=0.75),
    "h100": Chip("gpu", 989.4e12, GPU_SHARE * 79.1 * GIB, 3.35e12, 4.5e11, 5e10, 5.5e10,
                 matmul=0.75, attention=0.42),
    "h200": Chip("gpu", 989.4e12, GPU_SHARE * 139.7 * GIB, 4.8e12, 4.5e11, 5e10, 5.5e10,
                 matmul=0.75, attention=0.42),
    "b200": Chip("gpu", 2250e12, GPU_SHARE * 178.3 * GIB, 7.7e12, 9e11, 5e10, 5.5e10,
                 matmul=0.7, attention=0.42),
}  # fmt: skip

# XLA's names of the TPU generations, and what it must be told of them.
_TPU_NAMES = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "7x": "tpu7x"}
GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Topology:
    """A set of devices that is not here. name: as it was asked for."""

    name: str
    chip: Chip
    devices: list[Any]
    slices: int

    def slice_of(self, device: Any) -> int:
        """Which slice of a pod, or which node of a GPU cluster, a device is in."""
        if self.chip.platform == "gpu":
            return device.id // GPUS_PER_NODE
        return device.slice_index if self.slices > 1 else 0


def find_topology(name: str, slices: int = 1) -> Topology:
    """The devices of a topology.

    name: `v5p:2x4x4` (TPU generation and shape of a slice), `h100:8` (GPUs of one node) or
    `h100:4x8` (nodes x GPUs). slices: of TPUs, joined by the network of the data centre.

    Raises:
      ValueError: the name cannot be read, or what compiles for it is not installed.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not found or found[1] not in CHIPS:
        raise ValueError(
            f"--topology={name}: write a chip and a shape, v5p:2x4x4, h100:8 or h100:4x8; chips: "
            f"{', '.join(CHIPS)}"
        )
    chip, sizes = CHIPS[found[1]], [int(n) for n in found[2].split("x")]
    if slices < 1 or (slices > 1 and chip.platform == "gpu"):
        raise ValueError(f"--slices={slices}: 1, or more for TPUs; nodes of GPUs: h100:4x8")
    if chip.platform == "gpu":
        return Topology(name, chip, _gpus(found[1], sizes, name), 1)
    if len(sizes) != chip.torus and not (chip.torus == 3 and len(sizes) == 2):
        raise ValueError(f"--topology={name}: a slice of {found[1]} has {chip.torus} dimensions")
    return Topology(name, chip, _tpus(found[1], sizes, slices), slices)


def _tpus(generation: str, sizes: list[int], slices: int) -> list[Any]:
    # Without the first, two processes that compile would fight for a lock; without the second,
    # libtpu looks for the metadata server of a virtual machine.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    shape = sizes + [1] * (CHIPS[generation].torus - len(sizes))
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if math.prod(shape) < 4:
        options["chips_per_host_bounds"] = tuple(shape) + (1,) * (3 - len(shape))
    if generation == "v4":
        options["chip_config_name"] = "megacore"
    name = f"{_TPU_NAMES[generation]}:{'x'.join(map(str, shape))}"
    return _describe("tpu", name, "libtpu", options)


def _gpus(model: str, sizes: list[int], name: str) -> list[Any]:
    nodes, per_node = (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[-1])
    if len(sizes) > 2 or per_node > GPUS_PER_NODE or (nodes > 1 and per_node != GPUS_PER_NODE):
        raise ValueError(
            f"--topology={name}: at most {GPUS_PER_NODE} GPUs a node: h100:8, h100:4x8"
        )
    shape = f"1x{nodes}x{per_node}"
    options = {"topology": shape, "target_config": _GPU_CONFIGS[model]}
    return _describe("cuda", shape, "jax_cuda13_plugin", options)


def _describe(platform: str, name: str, package: str, options: dict[str, Any]) -> list[Any]:
    try:
        found = topologies.get_topology_desc(platform=platform, topology_name=name, **options)
    except (RuntimeError, ImportError, NotImplementedError) as error:
        raise ValueError(
            f"the compiler for {platform} {name} does not start: {error}; is {package} installed? "
            "`make plan-env` makes an environment with it, then use "
            "`.venv-plan/bin/python -m qwen_jax.plan`"
        ) from error
    return found.devices


def use_cpu_for_the_rest() -> None:
    """No device of this machine is touched: whatever is not compiled for the topology runs here."""
    jax.config.update("jax_platforms", "cpu")
    # Programs with sharded cuDNN attention cannot be written to the cache.
    jax.config.update("jax_enable_compilation_cache", False)


# XLA's description of a GPU, from NVIDIA's public tables; only what the compiler asks for.
_GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {memory} cuda_compute_capability {{ major: {major} minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""
_GPU_CONFIGS = {
    "h100": _GPU_CONFIG.format(
        cores=132, bandwidth=3_352_320_000_000, cache=52_428_800, clock=1.98,
        memory=84_978_434_048, major=9, name="NVIDIA H100 80GB HBM3",
    ),
    "h200": _GPU_CONFIG.format(
        cores=132, bandwidth=4_800_000_000_000, cache=62_914_560, clock=1.98,
        memory=150_000_000_000, major=9, name="NVIDIA H200",
    ),
    "b200": _GPU_CONFIG.format(
        cores=148, bandwidth=7_672_000_000_000, cache=132_644_864, clock=1.965,
        memory=191_441_600_512, major=10, name="NVIDIA B200",
    ),
}  # fmt: skip
