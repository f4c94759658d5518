"""Initial weights of convolutions: He et al. 2015 (arXiv:1502.01852), with the fan counted in three ways."""

import math
from collections.abc import Callable

from torch import nn


def fan_in(conv: nn.Conv2d) -> int:
    """Inputs that one output reads. They lie in its own group, so counting them per group changes nothing."""
    return conv.weight[0].numel()


def fan_out(conv: nn.Conv2d) -> int:
    """Outputs that read one input, as torch counts them: as if there were one group."""
    return conv.out_channels * conv.weight[0, 0].numel()


def fan_out_of_group(conv: nn.Conv2d) -> int:
    """Outputs that read one input: those of its group."""
    return fan_out(conv) // conv.groups


def initialize_(model: nn.Module, fan: Callable[[nn.Conv2d], int]) -> None:
    """Draw every convolution's weight from N(0, 2 / fan), with torch's global generator, in module order."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan(module)))
