"""Precision: which numbers the model computes in, and how an optimizer steps them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Precision:
    """What is half precision, and by what the loss is multiplied before backward."""

    device: torch.device
    weights: torch.dtype = torch.float32
    batch_norm: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    master_weights: bool = False
    loss_scale: float = 1.0
    dynamic: bool = False

    @classmethod
    def choose(
        cls,
        device: torch.device,
        *,
        amp: bool = False,
        opt_level: str = "O1",
        fp16: bool = False,
        static_loss_scale: float = 1.0,
        dynamic_loss_scale: bool = False,
    ) -> Precision:
        raise NotImplementedError

    def convert(self, model: nn.Module) -> nn.Module:
        """Move the model to the device and to its types, in place. Load weights before, wrap in DDP after."""
        raise NotImplementedError

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """float32 logits [B, C] of images [B, 3, H, W]."""
        raise NotImplementedError


class MixedPrecisionOptimizer:
    """An optimizer behind float32 master weights and a loss scale.

    `build(groups)` makes the torch optimizer, e.g. `functools.partial(optim.sgd, lr=..., momentum=...)`.
    """

    def __init__(
        self, groups: list[dict[str, Any]], build: Callable[[list[dict[str, Any]]], Optimizer], precision: Precision
    ) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError
