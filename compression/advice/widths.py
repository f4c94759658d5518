"""Widths by layer: a predicted step as a search for bit widths takes it, linear in the bytes of every layer."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..averagers import Averager
from ..costs import Cluster, CodecCosts, Costs, Load, Run, bound, load_of
from ..layers import Layer
from ..registry import COMPRESSORS, Compressor, build
from .choices import Choice
from .measured import Measured
from .prediction import Predictor


def step_by_widths(
    measured: Measured,
    compressor: Compressor,
    nbytes: Mapping[int, Mapping[str, int]],
    hierarchical: bool = False,
) -> dict[str, Any]:
    """The step of a quantizer on the measured cluster, in plain numbers that `search.Timeline.from_json` takes.

    `nbytes`: encoded bytes by width and compressed layer, whose order is that of the timeline. Of each buffer, what
    does not change with the widths is fixed: rounds, messages, and the layers that are never compressed. The rest is
    spread over its layers' bytes, at each width by itself.

    Raises ValueError where no speed of the compressor was measured.
    """
    whole_K, rest_K, sums_K = [], [], []
    for bits, of_layers in nbytes.items():
        choice = Choice(build(compressor.name, **{**Choice(compressor).given, "bits": bits}), hierarchical)
        costs = replace(measured.costs, codecs={choice.codec: _speed(measured.costs, compressor.name, bits)})
        model = Predictor(measured, measured.cluster).model(choice)
        layers = [layer for buffer in model.buffers for layer in buffer]
        averager = bound(choice.compressor, layers, measured.cluster, hierarchical)
        promise = model.promise(averager)
        dense = (_dense_load(averager, buffer, of_layers, measured.cluster) for buffer in model.buffers)
        loads = list(zip(promise.loads, dense, strict=True))
        whole_K.append([costs.parts(Run(measured.cluster, whole, choice.codec)) for whole, _ in loads])
        rest_K.append([costs.parts(Run(measured.cluster, _fixed(*both), choice.codec)) for both in loads])
        sums_K.append([sum(of_layers.get(layer.name, 0) for layer in buffer) for buffer in model.buffers])
    fixed_JP = np.array(rest_K).min(axis=0)
    a_byte_KJP = np.maximum(np.array(whole_K) - fixed_JP, 0.0) / np.maximum(sums_K, 1)[..., None]
    buffer_of = {layer.name: number for number, buffer in enumerate(model.buffers) for layer in buffer}
    return {
        "own": measured.compute.seconds,
        "backward": measured.compute.backward,
        "release": [measured.compute.release(buffer) for buffer in model.buffers],
        "buffer": [buffer_of[name] for name in next(iter(nbytes.values()))],
        "fixed": fixed_JP.tolist(),
        "a_byte": a_byte_KJP.swapaxes(0, 1).tolist(),
        "start": measured.costs.start,
        "contention": measured.compute.contention,
        "overlaps": promise.overlaps,
    }


def _dense_load(averager: Averager, buffer: Sequence[Layer], encoded: Collection[str], cluster: Cluster) -> Load:
    """The load of a buffer's layers that are never compressed."""
    dense = [layer for layer in buffer if layer.name not in encoded]
    return load_of(averager, [dense], cluster) if dense else Load(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def _fixed(whole: Load, dense: Load) -> Load:
    """What of a load no width changes."""
    return dense._replace(rounds=whole.rounds, messages=whole.messages, meetings=whole.meetings, copied=whole.copied)


def _speed(costs: Costs, name: str, bits: int) -> CodecCosts:
    """The speed at a width: a value's seconds between those of the nearest measured widths, in a straight line."""
    least = COMPRESSORS[name].min_bits
    codecs = {width: Choice(build(name, bits=width)).codec for width in range(least, 9)}
    known = {width: costs.codecs[codec] for width, codec in codecs.items() if codec in costs.codecs}
    if not known:
        raise ValueError(f"a step's seconds at each width need the speed of {name}, and none was measured")
    widths = sorted(known)
    return CodecCosts(
        float(np.interp(bits, widths, [known[width].per_value for width in widths])),
        float(np.interp(bits, widths, [width * known[width].per_byte for width in widths])) / bits,
    )
