"""A watch for momentum that would be applied twice: by a compressor, and by the optimizer."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

_log = logging.getLogger(__name__)


class MomentumWatch:
    """Looks at the first step of each optimizer that steps one of the parameters `without_momentum`, and warns once."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], without_momentum: Collection[str]) -> None:
        self._names = {id(parameters[name]): name for name in without_momentum}
        self._seen: set[int] = set()
        self._handle = register_optimizer_step_pre_hook(self._look) if self._names else None

    def end(self) -> None:
        """Look no more. Calling it twice is harmless."""
        if self._handle is not None:
            self._handle.remove()

    def _look(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) in self._seen:
            return
        self._seen.add(id(optimizer))
        for group in optimizer.param_groups:
            twice = [self._names[id(p)] for p in group["params"] if id(p) in self._names]
            if twice and group.get("momentum"):
                _log.warning(
                    "the compressor applies momentum to %s and %d other parameters, and the optimizer applies %s to "
                    "them again: give it those of exchange.without_momentum with momentum 0",
                    twice[0],
                    len(twice) - 1,
                    group["momentum"],
                )
                self.end()
                return
