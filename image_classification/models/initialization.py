"""Initial weights of convolutions: He et al. 2015 (arXiv:1502.01852), with the fan counted four ways."""

import math
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Fan:
    """Which connections of a convolution set its scale: std = sqrt(2 / fan).

    Fan-in counts a filter's inputs, which lie in its own group, so it is the same either way. Fan-out counts the
    filters that read an input: all of them as torch counts, those of its group where `per_group` is set.
    """

    out: bool
    per_group: bool

    def of(self, conv: nn.Conv2d) -> int:
        filters, inputs_per_group, height, width = conv.weight.shape
        if not self.out:
            return inputs_per_group * height * width
        return (filters // conv.groups if self.per_group else filters) * height * width


MODEL_CONFIGS: dict[str, Fan] = {
    "classic": Fan(out=True, per_group=False),
    "fanin": Fan(out=False, per_group=False),
    "grp-fanin": Fan(out=False, per_group=True),
    "grp-fanout": Fan(out=True, per_group=True),
}
"""Name -> how convolutions are drawn."""


def initialize_(model: nn.Module, fan: Fan) -> None:
    """Draw every convolution's weight from N(0, 2 / fan), with torch's global generator, in module order."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan.of(module)))
