"""The exchange of one model's gradients: from what backward leaves to averages that are ready to step.

It is the protocol of a step, and nothing else. It knows no optimizer and no training loop.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..gradients import Gradients
from .attached import Attached


class Exchange(Attached):
    """Averages the gradients of a model in every backward, and waits for all of them before the step.

    A loop that calls only backward and the optimizer works as well: an open step is finished and settled when the
    next one begins.
    """

    def begin_step(self, loss_scale: float | Tensor = 1.0) -> None:
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
                self.recorder.state.settle(applied)
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
            complete = len(self.pipeline.nonfinite) == len(self.layers)  # else nobody can have applied it
            self.settle(finite if complete else torch.zeros_like(finite))
