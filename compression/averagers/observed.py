"""Averaging that looks at the gradients on the way, and changes nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..gradients import Gradients
from ..network.collectives import Collectives
from ..statistics import JsonLines, Sink, TensorBoard, measure, to_all
from .dense import Dense

PERIOD = 50


class StatisticsAverager(Dense):
    """All-reduce as `Dense`; every 50 steps `sink` gets the statistics of this rank's own gradient of each layer.

    Set `sink` on the ranks that shall measure, one is enough: the others spend nothing. It is called on the thread that
    averages. Values are measured without the loss scale.
    """

    def __init__(self, collectives: Collectives, sizes: dict[str, int], period: int = PERIOD) -> None:
        super().__init__(collectives)
        self.sizes, self.period = sizes, period
        self.sink: Sink | None = None

    def average_(self, gradients: Gradients, step: int) -> None:
        if self.sink is not None and step % self.period == 0:
            for name, own in gradients.layers(self.sizes):
                self.sink(step, name, measure(own.float() / gradients.loss_scale))
        super().average_(gradients, step)


def observe(averager: object, path: Path, first_step: int = 0, writers: Sequence[Any] = ()) -> bool:
    """Let an averager that measures gradients write their statistics; any other is left alone.

    They go to a file, from `first_step` on as `JsonLines` has it, and to TensorBoard's `writers`. Returns whether it
    measures any. Raises OSError where the file cannot be written.
    """
    if not isinstance(averager, StatisticsAverager):
        return False
    averager.sink = to_all([JsonLines(path, first_step), *map(TensorBoard, writers)])
    return True
