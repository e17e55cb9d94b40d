"""The memory allocators of the process: of the host's memory and of its GPUs'."""

import ctypes
import os
import platform

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**30
# Of a GPU's memory, for XLA's programs; the rest is left to CUDA, cuDNN and NCCL.
GPU_SHARE = 0.92
_GPU_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the old name last


def keep_freed_memory() -> bool:
    """Keeps freed blocks up to 1 GiB for the next allocation; False where malloc is not glibc's.

    XLA:CPU allocates the buffers of a program anew in each call. glibc hands blocks above 32 MiB
    back to the system each time, and their pages, touched for the first time in every step, cost up
    to a third of it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(name, _KEPT_BYTES) for name in (_MMAP_THRESHOLD, _TRIM_THRESHOLD)])


def take_gpu_memory() -> None:
    """Lets XLA have `GPU_SHARE` of each GPU, which `qwen_jax.plan` counts on, instead of 75 %.

    Before JAX looks for devices. A share that the environment sets stays as it is.
    """
    if not any(name in os.environ for name in _GPU_VARIABLES):
        os.environ[_GPU_VARIABLES[0]] = str(GPU_SHARE)
