"""Predictions: the step of every choice, where it breaks even with bfloat16, and which one to take."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from ..costs import Cluster, Prediction, Promise, StepModel, bound
from ..layers import Layer, layers_of
from ..registry import build
from .choices import Choice
from .measured import Measured

ACCURACY = 0.05
"""Share of a step's seconds that predictions are not trusted to tell apart."""

LINKS = tuple(10 ** (7 - k / 5) for k in range(46))
"""Links in Mbit/s at which a break-even is looked for, from 10 Tbit/s down to 10 kbit/s."""


class Forecast(NamedTuple):
    """A choice and its step. `error`: of one encoding, relative to the gradient's norm.

    `break_even`: the link, in Mbit/s each way, below which it is faster than bfloat16; 0 where it never is, infinite
    where it is on every link.
    """

    choice: Choice
    step: Prediction
    error: float
    break_even: float


@dataclass(frozen=True)
class Predictor:
    """The steps of a model's choices on a cluster, from what was measured."""

    measured: Measured
    cluster: Cluster

    def step(self, choice: Choice, link_mbit: float | None = None) -> Prediction:
        """The step of a choice, perhaps over another link."""
        model, promise = self._promised(choice)
        cluster = self.cluster if link_mbit is None else replace(self.cluster, link_mbit=link_mbit)
        return model.on(cluster).predict(promise, choice.codec)

    def model(self, choice: Choice) -> StepModel:
        """The step model, with the layers as the choice's compressor takes them, and the buffers that it gets."""
        layers = {layer.name: layer for layer in self._layers(choice)}
        buffers: list[list[Layer]] = [[layers[name] for name in names] for names in self.measured.buffers]
        if choice.compressor.needs_full_gradient:
            buffers = [[layer for buffer in buffers for layer in buffer]]
        return StepModel(self.measured.costs, self.measured.compute, self.cluster, buffers)

    def _layers(self, choice: Choice) -> tuple[Layer, ...]:
        return layers_of(self.measured.shapes.items(), choice.compressor.bucket_size)

    def _promised(self, choice: Choice) -> tuple[StepModel, Promise]:
        if choice not in self._promises:
            model = self.model(choice)
            averager = bound(choice.compressor, self._layers(choice), self.cluster, choice.hierarchical)
            self._promises[choice] = model, model.promise(averager)
        return self._promises[choice]

    @cached_property
    def _promises(self) -> dict[Choice, tuple[StepModel, Promise]]:
        return {}

    def forecast(self, choice: Choice) -> Forecast:
        """The choice's step, error and break-even."""
        return Forecast(choice, self.step(choice), self.measured.errors[choice.codec], self.break_even(choice))

    def break_even(self, choice: Choice, other: Choice | None = None) -> float:
        """The link in Mbit/s below which a choice is faster than another one, bfloat16 in one level by default.

        0 where it is on no link, infinite where it is on all. Where steps of the two cross more than once, the fastest
        link at which they do.
        """
        other = other or Choice(build("none", dense_dtype="bfloat16"))
        if other.codec not in self.measured.costs.codecs:
            other = Choice(build("none"))

        def gain(link_mbit: float) -> float:
            return self._seconds(other, link_mbit) - self.step(choice, link_mbit).seconds

        if gain(LINKS[0]) > 0:
            return math.inf
        first = next((k for k, link in enumerate(LINKS) if gain(link) > 0), None)
        if first is None:
            return 0.0
        slow, fast = LINKS[first], LINKS[first - 1]
        while fast / slow > 1.001:
            middle = math.sqrt(slow * fast)
            slow, fast = (middle, fast) if gain(middle) > 0 else (slow, middle)
        return slow

    def _seconds(self, choice: Choice, link_mbit: float) -> float:
        """The seconds of a step that is compared with many others on the same links."""
        if (choice, link_mbit) not in self._asked:
            self._asked[choice, link_mbit] = self.step(choice, link_mbit).seconds
        return self._asked[choice, link_mbit]

    @cached_property
    def _asked(self) -> dict[tuple[Choice, float], float]:
        return {}


def advised(forecasts: Sequence[Forecast]) -> Forecast:
    """The choice to take: of those whose steps the predictions cannot tell from the fastest, the plainest.

    Float32 comes before bfloat16, that before codes in order of their errors, and one level before two.
    """
    fastest = min(each.step.seconds for each in forecasts)
    close = [each for each in forecasts if each.step.seconds <= fastest * (1 + ACCURACY)]
    return min(close, key=_plainness)


def _plainness(each: Forecast) -> tuple[bool, float, bool]:
    return each.choice.encodes, each.error, each.choice.hierarchical
