"""Parameter groups and SGD."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.optim import Optimizer


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    bn_weight_decay: bool = False,
    without_momentum: Collection[str] = (),
) -> list[dict[str, Any]]:
    """The trainable parameters in groups; names as in `model.named_parameters()`."""
    raise NotImplementedError


def sgd(
    groups: list[dict[str, Any]], *, lr: float, momentum: float = 0.9, nesterov: bool = False
) -> Optimizer:
    """SGD that can skip a step on the device."""
    raise NotImplementedError
