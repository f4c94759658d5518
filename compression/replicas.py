"""Replicas: how ranks find out whether what should be equal on all of them still is."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .network.collectives import Collectives

_WORD = 8


def first_difference(
    tensors: Mapping[str, Tensor], numbers: Mapping[str, int], network: Collectives
) -> tuple[str, int] | None:
    """The first name, in the order of tensors and then numbers, whose value differs from rank 0's, and the first rank.

    None where all are equal on all ranks. Every rank calls it, with the same names, shapes and devices. What travels is
    8 bytes a name: the sum of a tensor's bits, as 64-bit words modulo 2^64. It tells any change of one value, and
    overlooks others with a probability of 2^-64, but for words that change places.
    """
    sums = [_sum_of_bits(tensor.detach()) for tensor in tensors.values()]
    device = sums[0].device if sums else torch.device("cpu")
    own = torch.cat([torch.tensor(list(numbers.values()), dtype=torch.int64, device=device), *(s[None] for s in sums)])
    message = own.view(torch.uint8)
    sums_WN = network.gather(message, [len(message)] * network.world_size).view(torch.int64).view(-1, len(own)).cpu()
    differs_WN = (sums_WN != sums_WN[0]).roll(-len(numbers), dims=1)  # tensors first
    names = [*tensors, *numbers]
    for place in differs_WN.any(0).nonzero()[:1].flatten().tolist():
        return names[place], int(differs_WN[:, place].nonzero()[0])
    return None


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Sum of a tensor's memory in 64-bit words, in any order of its dimensions: int64 scalar on its device.

    Summed as words, because torch widens 32-bit numbers before it adds them, which takes thirty times as long.
    """
    dense = tensor if tensor.is_contiguous() or _is_permuted(tensor) else tensor.contiguous()
    memory = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
    whole = len(memory) // _WORD * _WORD
    if memory.storage_offset() % _WORD:
        memory = memory.clone()
    return memory[:whole].view(torch.int64).sum() + memory[whole:].sum(dtype=torch.int64)


def _is_permuted(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory without gaps, in whatever order of its dimensions, as channels-last ones do."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
