"""Memory that the C library keeps between training steps on a CPU."""

import ctypes

# Numbers of malloc.h, and the largest values that glibc takes on 64-bit machines.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER_TRIM, _MOST_BYTES_FROM_HEAP = 2**31 - 1, 32 * 2**20


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed gradients and activations for the next step.

    Every step frees about as much as it allocates. By default glibc gives memory that is freed at the top of its heap
    back to the kernel, which then hands it out again page by page, zeroed: up to a third of a small network's backward.
    The most that the process ever holds does not grow by this.

    Returns whether the C library took the advice. Others than glibc do as they always do.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM) == 1 and mallopt(_M_MMAP_THRESHOLD, _MOST_BYTES_FROM_HEAP) == 1
