"""The sparse kernels for CPUs: numba, the same bits as `sparse_reference.py`.

The largest values are found without sorting. The bits of a magnitude are an integer of 31 bits. One pass over all
values counts the leading 11 bits, a second collects those that can still be among the largest, where they are few; of
them the next 10 and the last 10 bits are counted in the same way, and what lies above the threshold is collected. The
passes share the values evenly between threads, whatever the layers' sizes.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...layers import Ints
from ...sparse_plans import SparsePlan
from ..reference.sparse import damage
from .compiling import jit_with_arrays
from .threads import split

_BINS = 2048
_TILE = 1024
_MAGNITUDE = np.int32(0x7FFFFFFF)


@jit_with_arrays
def _count(
    parts: np.ndarray, keys: np.ndarray, known: np.ndarray, shift: int, counts: np.ndarray, begin: int, end: int
) -> None:
    """counts[p, d]: values of part p whose leading bits are the layer's known ones, followed by the digit d."""
    step = np.int32(shift)
    even, odd = np.empty(_BINS, np.int32), np.empty(_BINS, np.int32)
    for p in range(begin, end):
        layer, start, stop = parts[p, 0], parts[p, 1], parts[p, 2]
        run = keys[start:stop]
        even[:], odd[:] = 0, 0  # two tables, so that equal neighbors need not wait for one another
        half = len(run) // 2
        one, other = run[:half], run[half : 2 * half]
        if shift == 20:
            for i in range(half):
                even[(one[i] & _MAGNITUDE) >> step] += 1
                odd[(other[i] & _MAGNITUDE) >> step] += 1
        else:
            before = np.int32(known[layer])
            for i in range(half):
                key = (one[i] & _MAGNITUDE) >> step
                if key >> np.int32(10) == before:
                    even[key & np.int32(1023)] += 1
                key = (other[i] & _MAGNITUDE) >> step
                if key >> np.int32(10) == before:
                    odd[key & np.int32(1023)] += 1
        for i in range(2 * half, len(run)):
            key = (run[i] & _MAGNITUDE) >> step
            if shift == 20:
                even[key] += 1
            elif key >> np.int32(10) == known[layer]:
                even[key & np.int32(1023)] += 1
        for d in range(_BINS):
            counts[p, d] = even[d] + odd[d]


@jit_with_arrays
def _descend(
    parts: np.ndarray,
    counts: np.ndarray,
    missing: np.ndarray,
    known: np.ndarray,
    shift: int,
    above: np.ndarray,
    equal: np.ndarray,
) -> None:
    """Append to every layer's known bits the digit in which its k-th largest key lies.

    missing[l]: how many of the values that begin with the known bits are to be kept. above[p]: how many values of
    part p lie above those; equal[p]: how many begin with them, and after the last digit, how many of these are kept,
    lower indices first.
    """
    totals = np.empty(_BINS, np.int64)
    first = 0
    while first < len(parts):
        layer, last = parts[first, 0], first
        totals[:] = 0
        while last < len(parts) and parts[last, 0] == layer:
            for d in range(_BINS):
                totals[d] += counts[last, d]
            last += 1
        digit = _BINS - 1
        while totals[digit] < missing[layer]:
            missing[layer] -= totals[digit]
            digit -= 1
        known[layer] = (known[layer] << 10) | digit
        for p in range(first, last):
            for d in range(digit + 1, _BINS):
                above[p] += counts[p, d]
            equal[p] = counts[p, digit]
            if shift == 0:
                equal[p] = min(equal[p], missing[layer])
                missing[layer] -= equal[p]
        first = last


@jit_with_arrays
def _collect(
    parts: np.ndarray,
    keys: np.ndarray,
    least: np.ndarray,
    equal: np.ndarray,
    to: np.ndarray,
    indices: np.ndarray,
    begin: int,
    end: int,
) -> None:
    """Write the indices of every part's values above the least, and of the first equal[p] that equal it."""
    for p in range(begin, end):
        layer, start, stop, offset = parts[p, 0], parts[p, 1], parts[p, 2], parts[p, 3]
        threshold = np.int32(least[layer])
        run = keys[start:stop]
        at, left = to[p], equal[p]
        for i in range(len(run)):
            key = run[i] & _MAGNITUDE
            if key >= threshold:
                if key == threshold:
                    if left == 0:
                        continue
                    left -= 1
                indices[at] = offset + i
                at += 1


@jit_with_arrays
def _encode(
    count: np.ndarray,
    kept: np.ndarray,
    low_bits: np.ndarray,
    first: np.ndarray,
    wire_at: np.ndarray,
    values: np.ndarray,
    at: np.ndarray,
    indices: np.ndarray,
    wire: np.ndarray,
    begin: int,
    end: int,
) -> None:
    floats = np.empty(_TILE, np.float32)
    raw = floats.view(np.uint8)
    for layer in range(begin, end):
        k, width, to = kept[layer], low_bits[layer], wire_at[layer]
        mine = indices[first[layer] : first[layer] + k]
        vector = values[at[layer] : at[layer] + count[layer]]
        for tile in range(0, k, _TILE):
            length = min(_TILE, k - tile)
            for i in range(length):
                floats[i] = vector[mine[tile + i]]
            target = wire[to + 4 * tile : to + 4 * (tile + length)]
            for i in range(4 * length):
                target[i] = raw[i]
        to += 4 * k
        low = wire[to : to + (k * width + 7) // 8]
        blocks = wire[to + len(low) : to + len(low) + (k + ((count[layer] - 1) >> width) + 7) // 8]
        blocks[:] = 0
        waiting, ready, byte = np.uint64(0), 0, 0
        mask = (1 << width) - 1
        for i in range(k):
            waiting |= np.uint64(mine[i] & mask) << np.uint64(ready)
            ready += width
            while ready >= 8:
                low[byte] = np.uint8(waiting & np.uint64(255))
                waiting >>= np.uint64(8)
                ready -= 8
                byte += 1
            place = (mine[i] >> width) + i
            blocks[place >> 3] |= np.uint8(1 << (place & 7))
        if ready > 0:
            low[byte] = np.uint8(waiting)


@jit_with_arrays
def _decode(
    count: np.ndarray,
    kept: np.ndarray,
    low_bits: np.ndarray,
    wire_at: np.ndarray,
    wire: np.ndarray,
    out: np.ndarray,
    at: np.ndarray,
    factor: np.float32,
    begin: int,
    end: int,
) -> int:
    """The first layer whose record is damaged, -1 where none is."""
    floats = np.empty(_TILE, np.float32)
    raw = floats.view(np.uint8)
    for layer in range(begin, end):
        n, k, width, start = count[layer], kept[layer], low_bits[layer], wire_at[layer]
        places = k + ((n - 1) >> width)
        low = wire[start + 4 * k : start + 4 * k + (k * width + 7) // 8]
        blocks = wire[start + 4 * k + len(low) : start + 4 * k + len(low) + (places + 7) // 8]
        block = np.empty(k + 1, np.int64)
        found = 0
        for place in range(places):
            block[found] = place - found
            found += (blocks[place >> 3] >> np.uint8(place & 7)) & 1
            if found > k:
                return layer
        if found < k:
            return layer
        waiting, ready, byte = np.uint64(0), 0, 0
        mask = np.uint64((1 << width) - 1)
        vector = out[at[layer] : at[layer] + n]
        for tile in range(0, k, _TILE):
            length = min(_TILE, k - tile)
            source = wire[start + 4 * tile : start + 4 * (tile + length)]
            for i in range(4 * length):
                raw[i] = source[i]
            for i in range(length):
                while ready < width:
                    waiting |= np.uint64(low[byte]) << np.uint64(ready)
                    ready += 8
                    byte += 1
                index = (block[tile + i] << width) | np.int64(waiting & mask)
                waiting >>= np.uint64(width)
                ready -= width
                if index >= n:
                    return layer
                vector[index] += factor * floats[i]
    return -1


def select(plan: SparsePlan, scores: Tensor, at: Ints) -> Tensor:
    """As `sparse_reference.select`."""
    keys = scores.numpy().view(np.int32)
    parts = _parts(plan.count, at)
    known, missing = np.zeros(len(plan.count), np.int64), plan.kept.copy()
    counts = np.empty((len(parts), _BINS), np.int32)
    above, equal = np.zeros(len(parts), np.int64), np.zeros(len(parts), np.int64)

    def narrow(parts: np.ndarray, keys: np.ndarray, shift: int) -> None:
        split(parts[:, 2] - parts[:, 1], partial(_count, parts, keys, known, shift, counts))
        _descend(parts, counts, missing, known, shift, above, equal)

    def collect(parts: np.ndarray, keys: np.ndarray, least: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices, and where those of each part end."""
        ends = np.cumsum(above + equal)
        indices = np.empty(ends[-1] if len(ends) else 0, np.int64)
        arguments = (parts, keys, least, equal, ends - above - equal, indices)
        split(parts[:, 2] - parts[:, 1], partial(_collect, *arguments))
        return indices, ends

    narrow(parts, keys, 20)
    near = None
    if 4 * (above + equal).sum() < plan.count.sum():
        near, ends = collect(parts, keys, known << 20)
        starts = ends - above - equal
        keys = keys[near + np.repeat(at[parts[:, 0]], ends - starts)]
        parts = np.stack([parts[:, 0], starts, ends, starts], axis=1)
    narrow(parts, keys, 10)
    narrow(parts, keys, 0)
    chosen, _ = collect(parts, keys, known)
    return torch.from_numpy(chosen if near is None else near[chosen])


def encode(plan: SparsePlan, values: Tensor, at: Ints, indices: Tensor, wire: Tensor) -> None:
    """As `sparse_reference.encode`."""
    columns = (plan.count, plan.kept, plan.low_bits, plan.first, plan.wire_at)
    tensors = (values.numpy(), at, indices.numpy(), wire.numpy())
    split(plan.kept, partial(_encode, *columns, *tensors))


def decode(plan: SparsePlan, wire: Tensor, out: Tensor, at: Ints, factor: float = 1.0) -> None:
    """As `sparse_reference.decode`."""
    columns = (plan.count, plan.kept, plan.low_bits, plan.wire_at)
    tensors = (wire.numpy(), out.numpy(), at, np.float32(factor))
    for layer in split(plan.kept, partial(_decode, *columns, *tensors)):
        if layer >= 0:
            raise ValueError(damage(int(plan.kept[layer]), int(plan.count[layer])))


def _parts(count: Ints, at: Ints) -> np.ndarray:
    """The layers cut so that threads share the values evenly: int64 [P, 4], in order.

    Columns: the layer, where the part starts and stops in the buffer, its first index within the layer.
    """
    threads = torch.get_num_threads()
    ends = np.cumsum(count)
    cuts = np.unique(np.concatenate([[0], ends, ends[-1:] * np.arange(1, threads) // threads]))
    starts, stops = cuts[:-1], cuts[1:]
    layer = np.searchsorted(ends, starts, side="right")
    index = starts - (ends - count)[layer]
    start = at[layer] + index
    return np.stack([layer, start, start + stops - starts, index], axis=1).astype(np.int64)
