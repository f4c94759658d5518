"""Memory between fences: pages that nobody may touch, so that a kernel that leaves its tensors ends the process.

What lies before or behind a tensor and is no fence holds a pattern, which `intact` looks at.
"""

import ctypes
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
PATTERN = 0xA5
_NO_ACCESS = 0  # PROT_NONE, for which Python has no name
_libc = ctypes.CDLL(None, use_errno=True)


class Fenced:
    """Tensors that end where a fence begins, or begin where one ends; they live as long as this does."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self._areas: list[tuple[mmap.mmap, np.ndarray, slice]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of its own, between two fences; filled with the pattern."""
        count = int(np.prod(shape, dtype=np.int64))
        size = count * dtype.itemsize
        room = max(PAGE, -(-size // PAGE) * PAGE)
        area = mmap.mmap(-1, room + 2 * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for fence in (address, address + PAGE + room):
            if _libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(PAGE), _NO_ACCESS) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        raw = np.frombuffer((ctypes.c_uint8 * room).from_address(address + PAGE), np.uint8)
        raw[:] = PATTERN
        start = room - size if self.at_end else 0
        self._areas.append((area, raw, slice(start, start + size)))
        return torch.from_numpy(raw[start : start + size]).view(dtype).view(*shape)

    def copy(self, values: Tensor) -> Tensor:
        return self.empty(values.shape, values.dtype).copy_(values)

    def intact(self) -> bool:
        """Whether nothing was written between the tensors and the fences."""
        for _, raw, own in self._areas:
            if (raw[: own.start] != PATTERN).any() or (raw[own.stop :] != PATTERN).any():
                return False
        return True
