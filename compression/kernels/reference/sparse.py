"""The sparse kernels written out in torch: the fast ones are held against them, bit for bit.

Clear before fast. Works on any device, layer by layer, and the host waits for none but the CPU. The format is described
in `sparse_plans.py`.

Shapes: L layers, n values of a layer, k of them kept, K kept values of all layers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...layers import Ints
from ...sparse_plans import SparsePlan
from .arithmetic import pack, unpack

HOST = "cpu"  # whose results may be looked at without waiting
MAGNITUDE = 0x7FFFFFFF  # the bits of a float but its sign: integers in the order of the magnitudes, NaN the largest


def select(plan: SparsePlan, scores: Tensor, at: Ints) -> Tensor:
    """As `SparseKernels.select`."""
    chosen = []
    for layer, (n, k) in enumerate(zip(plan.count, plan.kept, strict=True)):
        keys = scores[int(at[layer]) : int(at[layer] + n)].view(torch.int32) & MAGNITUDE
        least = keys.topk(int(k)).values[-1]
        above, tied = keys > least, keys == least
        tied &= tied.cumsum(0) <= k - above.sum()
        chosen.append(_positions(above | tied, int(k)))
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=scores.device)


def encode(plan: SparsePlan, values: Tensor, at: Ints, indices: Tensor, wire: Tensor) -> None:
    """As `SparseKernels.encode`."""
    for layer, (values_at, low_at, blocks_at, end) in enumerate(_parts(plan)):
        first, k, width = int(plan.first[layer]), int(plan.kept[layer]), int(plan.low_bits[layer])
        mine = indices[first : first + k]
        wire[values_at:low_at] = values[int(at[layer]) + mine].view(torch.uint8)
        if width:
            wire[low_at:blocks_at] = pack((mine & ((1 << width) - 1))[None], width)[0]
        blocks = torch.zeros(k + (int(plan.count[layer] - 1) >> width), dtype=torch.int64, device=wire.device)
        blocks.index_fill_(0, (mine >> width) + torch.arange(k, device=wire.device), 1)
        wire[blocks_at:end] = pack(blocks[None], 1)[0]


def decode(plan: SparsePlan, wire: Tensor, out: Tensor, at: Ints, factor: float = 1.0) -> None:
    """As `SparseKernels.decode`: a record is damaged that does not hold k indices below n."""
    scale = torch.tensor(factor, dtype=torch.float32)
    for layer, (values_at, low_at, blocks_at, end) in enumerate(_parts(plan)):
        n, k, width = int(plan.count[layer]), int(plan.kept[layer]), int(plan.low_bits[layer])
        values = wire[values_at:low_at].clone().view(torch.float32)
        low = unpack(wire[None, low_at:blocks_at], k, width)[0] if width else 0
        blocks = unpack(wire[None, blocks_at:end], k + ((n - 1) >> width), 1)[0]
        positions = _positions(blocks > 0, k)
        indices = ((positions - torch.arange(k, device=wire.device)) << width) | low
        damaged = (blocks.sum() != k) | (indices >= n).any()
        if wire.device.type == HOST and damaged:
            raise ValueError(damage(k, n))
        values = torch.where(damaged, torch.nan, values)
        out[int(at[layer]) + indices.clamp(0, n - 1)] += scale * values


def _positions(mask: Tensor, count: int) -> Tensor:
    """Positions of the first `count` ones of a mask, int64; 0 for those that it lacks."""
    order = mask.cumsum(0) - 1
    slots = torch.where(mask & (order < count), order, count)
    found = torch.zeros(count + 1, dtype=torch.int64, device=mask.device)
    return found.scatter_(0, slots, torch.arange(len(mask), device=mask.device))[:count]


def damage(kept: int, count: int) -> str:
    """The error message for a record that cannot be read."""
    return f"a sparse record is damaged: it should hold {kept} indices below {count}"


def _parts(plan: SparsePlan) -> Iterator[tuple[int, int, int, int]]:
    """Offsets of each record: of its values, low bits and blocks, and of its end."""
    for n, k, width, start in zip(plan.count, plan.kept, plan.low_bits, plan.wire_at, strict=True):
        low = int(start + 4 * k)
        blocks = low + (int(k * width) + 7) // 8
        yield int(start), low, blocks, blocks + (int(k + ((n - 1) >> width)) + 7) // 8
