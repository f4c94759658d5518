"""A training of a model that FSDP2 shards, by a loop that knows nothing of an exchange."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def whole(model: nn.Module) -> Tensor:
    """All weights, gathered from the ranks that share them."""
    return torch.cat([p.full_tensor().detach().cpu().flatten() for p in model.parameters()])  # type: ignore[attr-defined]


def train(model: Any, backward: Callable[[Any, int], None], first: int, last: int) -> Tensor:
    """The weights after steps `first` to `last`, excluded; `backward` gets the model and the step's number."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(first, last):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return whole(model)
