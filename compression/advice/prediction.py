"""Predictions: the step of every choice, where it breaks even with bfloat16, and which one to take."""

import itertools
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


class BreakEven(NamedTuple):
    """The links, in Mbit/s each way, between which a choice is the faster one: `above` 0 and `below` infinity where
    there is no such end, and an empty range where it never is.
    """

    above: float
    below: float


NEVER, ALWAYS = BreakEven(0.0, 0.0), BreakEven(0.0, math.inf)


class Forecast(NamedTuple):
    """A choice and its step. `error`: of one encoding, relative to the gradient's norm.

    `break_even`: the links on which it is faster than bfloat16. None where there is nothing to compare: for bfloat16
    itself, and on one host.
    """

    choice: Choice
    step: Prediction
    error: float
    break_even: BreakEven | None


@dataclass(frozen=True)
class Predictor:
    """The steps of a model's choices on a cluster, from what was measured."""

    measured: Measured
    cluster: Cluster

    @cached_property
    def reference(self) -> Choice:
        """What choices break even with: bfloat16 in one level, float32 where the network does not add that up."""
        bfloat16 = Choice(build("none", dense_dtype="bfloat16"))
        return bfloat16 if bfloat16.codec in self.measured.costs.codecs else Choice(build("none"))

    def step(self, choice: Choice, link_mbit: float | None = None) -> Prediction:
        """The step of a choice, perhaps over another link: of hosts, or inside the one host that there is."""
        model, promise = self._promised(choice)
        cluster = self.cluster
        if link_mbit is not None:
            alone = cluster.hosts == 1
            cluster = replace(cluster, inside_mbit=link_mbit) if alone else replace(cluster, link_mbit=link_mbit)
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

    def break_even(self, choice: Choice) -> BreakEven | None:
        """The links on which a choice is faster than `reference`.

        Where these are several ranges of `LINKS`, the widest. None for the reference itself, and on one host.
        """
        if choice == self.reference or self.cluster.hosts == 1:
            return None

        def gains(link_mbit: float) -> bool:
            return self._seconds(self.reference, link_mbit) > self.step(choice, link_mbit).seconds

        def crossing(faster: float, slower: float) -> float:
            """The last link at which the choice is faster, between one at which it is and one at which it is not."""
            while not 1 / 1.001 < faster / slower < 1.001:
                middle = math.sqrt(faster * slower)
                faster, slower = (middle, slower) if gains(middle) else (faster, middle)
            return faster

        runs = itertools.groupby(range(len(LINKS)), key=lambda k: gains(LINKS[k]))
        ranges = [list(numbers) for faster, numbers in runs if faster]
        if not ranges:
            return NEVER
        widest = max(ranges, key=len)
        first, last = widest[0], widest[-1]
        return BreakEven(
            0.0 if last == len(LINKS) - 1 else crossing(LINKS[last], LINKS[last + 1]),
            math.inf if first == 0 else crossing(LINKS[first], LINKS[first - 1]),
        )

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

    Float32 comes before bfloat16, that before codes in order of their errors, and one level before two. Where these are
    codes, and the predictions cannot tell what sends none from them, that is taken: codes have to gain something.
    """
    fastest = min(each.step.seconds for each in forecasts)
    plainest = min(_as_fast(forecasts, fastest), key=_plainness)
    if not plainest.choice.encodes:
        return plainest
    uncoded = [each for each in _as_fast(forecasts, plainest.step.seconds) if not each.choice.encodes]
    return min(uncoded, key=_plainness, default=plainest)


def _as_fast(forecasts: Sequence[Forecast], seconds: float) -> list[Forecast]:
    return [each for each in forecasts if each.step.seconds <= seconds * (1 + ACCURACY)]


def _plainness(each: Forecast) -> tuple[bool, float, bool]:
    return each.choice.encodes, each.error, each.choice.hierarchical
