"""Codecs, measured: seconds and errors of every choice on a model's gradient, while all ranks do the same."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..costs import Cluster, CodecCosts, load_of
from ..exchange.pipeline import Pipeline
from ..gradients import Gradients
from ..layers import Layer, layers_of
from ..network.collectives import Collectives
from ..registry import Compressor, build
from ..routes import squared_error
from .choices import Choice
from .echo import Echo
from .profile import together

PATIENCE, PATIENCE_FOR_MATRICES = 0.05, 0.3
"""Seconds of a turn of a codec: on as many buffers, one at least, as it can have in that time; others are as fast.

Codecs of matrices get more: what a factorization takes differs by the shape of a layer.
"""

TURNS = 3

MOST_RANKS = 4
"""Ranks among which codecs are timed; with more, what grows with the ranks is bytes to decode."""

MOST_VALUES = 2**23
"""Values of a buffer on which a codec is timed, at most: more than a buffer of DDP's has by default."""

SAMPLE = 2**18
"""Values on which an error is measured, at least one layer."""


@dataclass(frozen=True)
class Codecs:
    """The codecs of some choices on a gradient: `gradient` by name, flat, which travels in `buffers` of names."""

    gradient: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    buffers: Sequence[Sequence[str]]
    network: Collectives

    def speeds(self, choices: Sequence[Choice], world_size: int) -> dict[str, CodecCosts]:
        """Seconds of each codec among so many ranks, by its name; the slowest rank's. Every rank calls it."""
        compressors = {choice.codec: choice.compressor for choice in choices}
        return {name: self._speed(compressor, world_size) for name, compressor in compressors.items()}

    def _speed(self, compressor: Compressor, world_size: int) -> CodecCosts:
        echo = Echo(min(max(world_size, 2), MOST_RANKS))
        shapes = {name: _part_of(shape) for name, shape in self.shapes.items()}
        layers = {layer.name: layer for layer in layers_of(shapes.items(), compressor.bucket_size)}
        averager = compressor.averager(tuple(layers.values()), echo, 0)
        device = next(iter(self.gradient.values())).device
        buffers = [[layers[name] for name in names] for names in self.buffers]
        if compressor.needs_full_gradient:
            buffers = [[layer for buffer in buffers for layer in buffer]]
        else:
            buffers = [_cut(buffer) for buffer in buffers]
        by_size = _telling(buffers)
        pipeline = Pipeline(averager, tuple(layers.values()), device)

        steps = itertools.count()

        def turn(buffers: Sequence[Sequence[Layer]]) -> tuple[float, float]:
            step = next(steps)
            times = [self._turn(pipeline, echo, buffer, step) for buffer in buffers]
            averager.settle(True)
            return sum(before for before, _ in times), sum(after for _, after in times)

        def buffers_in_time() -> list[list[Layer]]:
            turn(by_size[:1])  # compiles
            rate = sum(turn(by_size[:1])) / numel(by_size[:1])
            patience = PATIENCE_FOR_MATRICES if compressor.needs_matrix else PATIENCE
            count = 1
            while count < len(by_size) and rate * numel(by_size[: count + 1]) < patience:
                count += 1
            turn(by_size[:count])  # gets memory
            return by_size[:count]

        what, turns, done = f"compressor {compressor.name}", [], by_size[:1]

        def prepare() -> None:
            nonlocal done
            done = buffers_in_time()

        try:
            together(self.network, what, prepare)
            for _ in range(TURNS):  # all ranks of a machine at the same time
                together(self.network, what, lambda: turns.append(turn(done)))
        finally:
            pipeline.close()
        before, after = sorted(turns, key=sum)[TURNS // 2]
        load = load_of(averager, done, Cluster(echo.world_size))
        if load.decoded == 0:  # of what the network adds up
            own = CodecCosts((before + after) / load.encoded, 0.0)
        else:
            own = CodecCosts(before / load.encoded, after / load.decoded)
        ranks: list[CodecCosts] = self.network.collect(own)
        return CodecCosts(max(each.per_value for each in ranks), max(each.per_byte for each in ranks))

    def _turn(self, pipeline: Pipeline, echo: Echo, buffer: Sequence[Layer], step: int) -> tuple[float, float]:
        """Seconds of the exchange of one buffer before something is sent, and after that."""
        gradients = Gradients.packed({layer.name: self.gradient[layer.name][: layer.numel] for layer in buffer})
        device = gradients.flat.device
        echo.restart()
        pipeline.clear()
        start = _now(device)
        pipeline.submit(gradients, step).wait()
        end = _now(device)
        pipeline.wait()
        pipeline.check()
        sent = echo.first_sent or end
        return sent - start, max(0.0, end - sent)

    def work(self) -> Callable[[], object]:
        """Some work of a codec, of some milliseconds, as a communication thread has it."""
        compressor, echo = build("maxmin"), Echo(2)
        names = _sample(self.gradient, SAMPLE)
        layers = layers_of(((name, self.shapes[name]) for name in names), compressor.bucket_size)
        averager = compressor.averager(layers, echo, 0)
        gradients = Gradients.packed({name: self.gradient[name] for name in names})
        return lambda: averager.average_(gradients, 0)

    def errors(self, choices: Sequence[Choice]) -> dict[str, float]:
        """Error of one encoding over the gradient's norm, by codec; over all ranks' gradients. Every rank calls it.

        Expected where that has a closed form; of a sample of the layers, the smallest of which the codec takes.
        """
        found = {}
        for codec, compressor in {choice.codec: choice.compressor for choice in choices}.items():
            ranks = together(self.network, f"compressor {compressor.name}", partial(self._squares, compressor))
            error, norm = (math.fsum(part) for part in zip(*ranks, strict=True))
            found[codec] = math.sqrt(error / norm) if norm else 0.0
        return found

    def _squares(self, compressor: Compressor) -> tuple[float, float]:
        """The squared error of one encoding of a sample of the layers, and their squared norm."""
        layers = {layer.name: layer for layer in layers_of(self.shapes.items(), compressor.bucket_size)}
        error = norm = 0.0
        for name in _sample({n: g for n, g in self.gradient.items() if layers[n].compressed}, SAMPLE):
            values = self.gradient[name]
            error += squared_error(compressor, layers[name], values)
            norm += float(values.double().square().sum())
        return error, norm


def numel(buffers: Sequence[Sequence[Layer]]) -> int:
    """Values of all layers of some buffers."""
    return sum(layer.numel for buffer in buffers for layer in buffer)


def _part_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a layer's first rows, as many as a codec is timed on at most, one at least."""
    if not shape:
        return shape
    rows, *row = shape
    return max(1, min(rows, MOST_VALUES // max(1, math.prod(row)))), *row


def _cut(buffer: Sequence[Layer]) -> list[Layer]:
    """The largest layers of a buffer, which hold most of its values: as many as a codec is timed on at most."""
    kept: set[str] = set()
    values = 0
    for layer in sorted(buffer, key=lambda layer: -layer.numel):
        if not kept or values + layer.numel <= MOST_VALUES:
            kept.add(layer.name)
            values += layer.numel
    return [layer for layer in buffer if layer.name in kept]


def _telling(buffers: Sequence[list[Layer]]) -> list[list[Layer]]:
    """The buffers whose time tells that of a model's values, smaller ones first: of tiny ones it is that of a call."""
    by_size = sorted(buffers, key=lambda buffer: numel([buffer]))
    return [buffer for buffer in by_size if 10 * numel([buffer]) >= numel(by_size[-1:])]


def _sample(gradient: Mapping[str, Tensor], values: int) -> list[str]:
    """Names of layers with about so many values, or of the smallest one; small layers and large ones by turns."""
    by_size = sorted(gradient, key=lambda name: gradient[name].numel())
    names: list[str] = []
    total = 0
    for name in by_size[::-1]:
        if total + gradient[name].numel() <= values:
            names.append(name)
            total += gradient[name].numel()
    return names or by_size[:1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
