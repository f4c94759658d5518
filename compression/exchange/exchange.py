"""The exchange of one model's gradients: from what backward leaves to averages that are ready to step.

It is the protocol of a step, and nothing else. It knows no optimizer and no training loop.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..gradients import Gradients
from .attached import Attached

_log = logging.getLogger(__name__)


class Exchange(Attached):
    """Averages the gradients of a model in every backward, and waits for all of them before the step.

    A loop that calls only backward and the optimizer works as well: an open step is finished and settled when the
    next one begins.
    """

    _scale_declared = False  # by the loop
    _overflow_said = False

    def begin_step(self, loss_scale: float | Tensor = 1.0) -> None:
        self._begin(loss_scale)
        self._scale_declared = True

    def begin_backward(self) -> None:
        if not self.open or self.travelling:
            self._begin(1.0)

    def _begin(self, loss_scale: float | Tensor) -> None:
        self._end_step()
        self.open, self.travelling = True, False
        self.pipeline.clear()
        self.loss_scale = loss_scale

    def finish(self) -> Tensor:
        self.pipeline.check()
        self.meter.arrived()
        return self.all_finite(self.pipeline.nonfinite)

    def settle(self, applied: Tensor) -> None:
        if self.open:
            self.open = False
            self.averager.settle(applied)
            if self.recorder is not None:
                self.recorder.settle(applied)
            self.step += 1

    def flush(self, loss_scale: float | Tensor = 1.0) -> Tensor | None:
        return None

    def submit(self, gradients: Gradients) -> "torch.futures.Future[Tensor]":
        self.travelling = True
        self.meter.submitted()
        return self.pipeline.submit(replace(gradients, loss_scale=self.loss_scale), self.step)

    def state_dict(self) -> dict[str, Any]:
        self._end_step()
        return self.common_state()

    def load_state_dict(self, state: Mapping[str, Any], ranks_alike: bool = True) -> None:
        self._end_step()
        state = self.binding.own_state(state, ranks_alike)
        if state.get("late"):
            raise ValueError(
                "the checkpoint holds averages that a broken barrier is still to apply; resume with the "
                "`barrier_fraction` of the run that was interrupted"
            )
        self.load_common_state(state, ranks_alike)

    def _end_step(self) -> None:
        """End a step whose loop did not."""
        self.pipeline.wait()  # where a backward raised, nobody has: its jobs still work on buffers and residuals
        if self.open:
            finite = self.finish()
            self._say_what_overflows_without_a_scale(finite)
            self.settle(finite if self._complete() else torch.zeros_like(finite))

    def _complete(self) -> bool:
        """Whether the step's averages are all there: else nobody can have applied it."""
        return len(self.pipeline.nonfinite) == len(self.layers)

    def _say_what_overflows_without_a_scale(self, finite: Tensor) -> None:
        """Warn once of gradients that are not finite in a loop that declares no loss scale; a GPU is not waited for."""
        if self._scale_declared or self._overflow_said or not self.averager.states:
            return
        if finite.device.type != "cpu" or finite:
            return
        self._overflow_said = True
        if self.collectives.rank == 0:
            _log.warning(
                "an average is not finite, and no loss scale was declared: with a GradScaler, call "
                "exchange.begin_step(scaler.get_scale()) before each step's backward, or what the compressor "
                "remembers is in units of scales that are gone"
            )
