"""The memory allocator of the process, where it decides how fast a CPU computes."""

import ctypes
import platform

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**30


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
