"""The threads that run what was compiled for CPUs.

They are ours, not numba's: its default pool aborts when two Python threads use it at once, and a pool of our own
follows torch's thread count.
"""

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Result = TypeVar("Result")


def split(weights: NDArray[np.int64], work: Callable[[int, int], Result]) -> list[Result]:
    """Results of `work(start, stop)` on consecutive ranges of items, about equal in weight, one per thread."""
    threads = min(torch.get_num_threads(), len(weights))
    if threads <= 1:
        return [work(0, len(weights))]
    ends = np.cumsum(weights)
    edges = np.searchsorted(ends, ends[-1] * np.arange(1, threads) / threads, side="right")
    bounds = [0, *(int(edge) for edge in edges), len(ends)]
    others = [_pool(threads).submit(work, start, stop) for start, stop in itertools.pairwise(bounds[1:])]
    return [work(bounds[0], bounds[1]), *(other.result() for other in others)]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="codec")
