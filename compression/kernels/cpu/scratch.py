"""What the compiled kernels work in. Arrays made in compiled code would take a second more to compile."""

import threading
from typing import NamedTuple

import numpy as np
import torch

from ...plans import Plan
from ..reference.arithmetic import TERNARY_TILE, TREE
from .families import BINS

TILE = TERNARY_TILE  # values worked on at a time: a multiple of TREE, of NARROWED, of 8 and of 5
_SCALES = 256
_BLOCK = 1 << 13  # values of several buckets that stay in the second-level cache


class Scratch(NamedTuple):
    """For buckets of up to some length. What a kernel finds in it is undefined."""

    codes: np.ndarray  # uint8 [TILE + 8]
    words: np.ndarray  # uint32 [TILE]
    places: np.ndarray  # float32 [TILE]
    scales: np.ndarray  # float32, as many as a record may have
    bins: np.ndarray  # int32, of a quantile's histogram
    terms: np.ndarray  # float32, of two trees
    sums: np.ndarray  # float32, of two times as many blocks as a bucket has
    block: np.ndarray  # float32, the values of several buckets, at least one
    starts: np.ndarray  # int64, where each bucket of a plan lies in its block


_kept = threading.local()


def scratch(plan: Plan, quantiles: bool) -> tuple[np.ndarray, ...]:
    """The fields of a `Scratch` for a plan's buckets. A thread keeps its own from call to call, unless they are long.

    A plain tuple, since numba takes microseconds more to tell the types of a named one.
    """
    made: Scratch | None = getattr(_kept, "scratch", None)
    short = plan.longest <= _BLOCK
    if made is None or not short or len(made.starts) < len(plan.count) or len(made.bins) < quantiles:
        made = _scratch(max(plan.longest, _BLOCK), len(plan.count), quantiles)
        if short:
            _kept.scratch = made
    return tuple(made)


def _scratch(longest: int, buckets: int, quantiles: bool) -> Scratch:
    blocks = -(-longest // TREE**2) * TREE
    lengths = (
        (TILE + 8, torch.uint8), (TILE, torch.int32), (TILE, torch.float32), (_SCALES, torch.float32),
        (BINS + 2 if quantiles else 0, torch.int32), (2 * TREE, torch.float32), (2 * blocks, torch.float32),
        (longest, torch.float32), (buckets, torch.int64),
    )  # fmt: skip
    codes, words, *others = (torch.empty(length, dtype=kind).numpy() for length, kind in lengths)  # aligned to 64 bytes
    return Scratch(codes, words.view(np.uint32), *others)
