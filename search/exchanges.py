"""A search on an attached model: from what its exchange recorded to the widths that it sends with from then on.

The one module of this package that knows ranks, and only by what it asks of them. All of them call it and get the same
result, or the same error.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from .families import FamilyResult, Option, OptionTables, search_options
from .pins import as_bounds, resolve_pins
from .run import Method, SearchResult, search
from .tables import Measure, Tables, check_finite, measure
from .timelines import Timeline
from .wishes import Wish

Result = TypeVar("Result")
Columns = TypeVar("Columns", bound=Tables)
Found = TypeVar("Found", SearchResult, FamilyResult)


class Network(Protocol):
    """The ranks, as `gradwire.Collectives` has them."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def sum_(self, values: Tensor) -> None: ...

    def broadcast(self, value: Any) -> Any: ...

    def collect(self, value: Any) -> list[Any]: ...


class Records(Protocol):
    """What a search measures errors on, as `gradwire.Recorder` has it."""

    def averaged(self, collectives: Any) -> Mapping[str, Tensor]: ...


class Searchable(Protocol):
    """What a search needs of an exchange, as `gradwire.Attached` has it; only one that records can be searched."""

    @property
    def recorder(self) -> Records | None: ...

    @property
    def collectives(self) -> Network: ...

    @property
    def compressor(self) -> Any: ...

    @property
    def layers(self) -> Sequence[Any]: ...

    @property
    def hosts(self) -> Any: ...

    @property
    def step(self) -> int: ...

    @property
    def dense_bytes(self) -> int: ...

    def encoded_bytes_at(self, bits: int) -> dict[str, int]: ...

    def set_widths(self, widths: Mapping[str, int]) -> None: ...

    def encoded_bytes_by(self, name: str, options: Mapping[str, Any]) -> dict[str, int]: ...

    def squared_errors_by(
        self, name: str, options: Mapping[str, Any], values: Mapping[str, Tensor]
    ) -> dict[str, float]: ...

    def reroute(
        self, routes: Mapping[str, tuple[str, Mapping[str, Any]]], default: tuple[str, Mapping[str, Any]]
    ) -> None: ...

    def moved(self, steps: Mapping[str, Tensor], factor: float) -> AbstractContextManager[None]: ...


def search_exchange(
    exchange: Searchable,
    wish: Wish | None = None,
    *,
    target_bits: float | None = None,
    widths: Sequence[int] = range(2, 9),
    by: Measure = "root",
    loss: Callable[[], float] | None = None,
    step_size: float = 1.0,
    method: Method = "both",
    popsize: int = 5,
    iterations: int = 2,
    seed: int = 0,
    pins: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    timeline: Timeline | None = None,
    network: Network | None = None,
) -> SearchResult:
    """Choose the bit widths of an exchange that records, and set them: residuals stay as they are.

    wish         what to make least; without one the published formula
    target_bits  in place of a wish: the least error with at most so many bits a value
    by           what an error is (`Tables.measure`); with error feedback, of the projection that travels
    loss         with "loss": the loss of the model as it is, on the same examples at every call
    step_size    with "loss": what m is multiplied by in a step of the weights
    pins         "PATTERN=BITS" and "PATTERN=LEAST-MOST" (`resolve_pins`)
    settings     what else the file of the search is to say
    timeline     what a step's seconds are made of at these widths, for the least step time
    network      the ranks, where it is not to be the network that gradients take

    Every rank calls it, between steps. Raises ValueError, on all ranks alike, where the exchange does not record or has
    no widths, where a layer was never seen or is not finite, and for what `search` refuses.
    """
    network = network or exchange.collectives
    if target_bits is not None and wish is not None:
        raise ValueError("target_bits is a wish, and a search has one; give one of them")
    if getattr(exchange.compressor.options, "second_hop_bits", None) is not None:
        raise ValueError(
            "a search chooses the bits of both hops, and second_hop_bits gives those of averages; leave it out"
        )
    began = time.perf_counter()
    gradients = _recorded(exchange, network)
    changes: Mapping[tuple[str, int], float] | None = None
    if by == "loss":
        changes = changes_of_loss(exchange, gradients, widths, loss, step_size, seed, network)

    def measured() -> Tables:
        return tables_of(exchange, gradients, widths, by, changes)

    def chosen(tables: Tables) -> SearchResult:
        asked = Wish.bits(target_bits) if target_bits is not None else wish
        resolved = resolve_pins(pins, tables.layers, tables.widths)
        return search(tables, asked, method, popsize, iterations, seed, resolved, timeline=timeline)

    result = _on_first_rank(network, lambda: _timed(measured, chosen, began, exchange, network, settings))
    exchange.set_widths(result.bits_by_layer())
    return result


def search_families(
    exchange: Searchable,
    options: Sequence[Option],
    wish: Wish,
    *,
    by: Measure = "root",
    settings: Mapping[str, Any] | None = None,
    network: Network | None = None,
) -> FamilyResult:
    """Choose among options of several families for each layer of an exchange that averages by a mix, and route so.

    The first option is that of layers which are never compressed. Errors are squared ones or roots of them: closed
    forms for quantizers, one real encoding for the others. Bytes are what the averagers promise.

    Every rank calls it, between steps. Raises ValueError, on all ranks alike, for what `search_exchange` refuses of a
    gradient, and for what `search_options` does.
    """
    network = network or exchange.collectives
    began = time.perf_counter()
    gradients = _recorded(exchange, network)

    def measured() -> OptionTables:
        check_finite(gradients)
        return option_tables(exchange, gradients, options, by)

    def chosen(tables: OptionTables) -> FamilyResult:
        return search_options(tables, wish)

    result = _on_first_rank(network, lambda: _timed(measured, chosen, began, exchange, network, settings))
    exchange.reroute({name: option.route for name, option in result.option_by_layer().items()}, options[0].route)
    return result


def option_tables(
    exchange: Searchable, gradients: Mapping[str, Tensor] | None, options: Sequence[Option], by: Measure = "root"
) -> OptionTables:
    """The tables of an exchange's layers and options: bytes as promised, and errors of gradients, 0 without any."""
    layers = [layer for layer in exchange.layers if layer.compressed]
    nbytes = [exchange.encoded_bytes_by(*option.route) for option in options]
    lost = [
        exchange.squared_errors_by(*option.route, gradients) if gradients else dict.fromkeys(nbytes[0], 0.0)
        for option in options
    ]
    error = np.array([[of_option[layer.name] for of_option in lost] for layer in layers])
    return OptionTables(
        layers=[layer.name for layer in layers],
        widths=range(len(options)),
        error=np.sqrt(error) if by == "root" else error,
        nbytes=np.array([[of_option[layer.name] for of_option in nbytes] for layer in layers]),
        dense_bytes=sum(nbytes[0][layer.name] for layer in exchange.layers if not layer.compressed),
        values=sum(layer.numel for layer in exchange.layers),
        numel=[layer.numel for layer in layers],
        measure=by,
        norm2=math.fsum(float(m.double().square().sum()) for m in gradients.values()) if gradients else 1.0,
        options=options,
    )


def check_search(
    exchange: Searchable,
    wish: Wish | None = None,
    *,
    widths: Sequence[int] = range(2, 9),
    by: Measure = "root",
    pins: Sequence[str] = (),
) -> None:
    """Raise ValueError for what a search of this exchange cannot be asked for, before any gradient is known.

    Among it are bytes that no assignment keeps within, and pins that match nothing.
    """
    layers = [layer for layer in exchange.layers if layer.compressed]
    at_width = [exchange.encoded_bytes_at(width) for width in widths]
    tables = Tables(
        [layer.name for layer in layers],
        widths,
        np.zeros((len(layers), len(widths))),
        np.array([[nbytes[layer.name] for nbytes in at_width] for layer in layers]),
        exchange.dense_bytes,
        sum(layer.numel for layer in exchange.layers),
        [layer.numel for layer in layers],
        by,
        norm2=1.0,
    )
    resolved = resolve_pins(pins, tables.layers, tables.widths)
    if wish is not None and wish.kind == "time":  # whose limit is all that can be out of reach
        wish = replace(wish, kind="error")
    search(tables, wish, "exact", pins=resolved)
    if wish is not None and wish.kind == "error" and wish.target is not None:
        most = {name: high for name, (_, high) in as_bounds(resolved, tables.layers, tables.widths).items()}
        highest = [most.get(name, tables.widths[-1]) for name in tables.layers]
        if max(highest) <= wish.target and min(highest) < wish.target:
            name = tables.layers[highest.index(min(highest))]
            raise ValueError(
                f"the error of all layers at {wish.target:g} bits cannot be kept: {name} has at most {min(highest)}, "
                "and no layer more than that to make up for it; loosen the pins, or search among larger widths"
            )


def tables_of(
    exchange: Searchable,
    gradients: Mapping[str, Tensor],
    widths: Sequence[int],
    by: Measure = "root",
    changes: Mapping[tuple[str, int], float] | None = None,
) -> Tables:
    """The tables of an exchange's layers: errors as its feedback has it, bytes as all its ranks or hosts encode them.

    gradients  what `Recorder.averaged` gives
    changes    with "loss": (layer, width) to what `changes_of_loss` found
    """
    compressor = exchange.compressor
    codec_at = compressor.codec_at  # which refuses what has no widths
    codec_at(widths[0])
    nbytes = {width: exchange.encoded_bytes_at(width) for width in widths}
    return measure(
        gradients,
        codec_at,
        widths,
        exchange.dense_bytes,
        sum(layer.numel for layer in exchange.layers),
        by,
        projected=compressor.error_feedback,
        nbytes_of=lambda name, width: nbytes[width][name],
        loss_of=None if changes is None else lambda name, width: changes[name, width],
    )


def changes_of_loss(
    exchange: Searchable,
    gradients: Mapping[str, Tensor],
    widths: Sequence[int],
    loss: Callable[[], float] | None,
    step_size: float,
    seed: int,
    network: Network,
) -> dict[tuple[str, int], float]:
    """What the loss gains, by layer and width, where that layer's part of a step of all layers is the encoded one.

    The step is `step_size` x the gradients. What an encoding changes is drawn once and taken with both signs, in two
    evaluations of the loss: noise of the first order, which the mean over draws does not have, cancels. The ranks share
    the evaluations, and all of them get all results. Weights are put back bit for bit.

    Raises ValueError, on all ranks alike, for gradients that are not finite, and what a rank's loss raised.
    """
    if loss is None:
        raise ValueError("errors by loss need the loss of the model as it is, got none; give loss")
    check_finite(gradients)
    projected = exchange.compressor.error_feedback
    codecs = {width: exchange.compressor.codec_at(width) for width in widths}

    def own() -> dict[tuple[str, int], float]:
        found = {}
        with exchange.moved(gradients, -step_size):
            before = loss()
            pairs = itertools.product(gradients, widths)
            for name, width in itertools.islice(pairs, network.rank, None, network.world_size):
                lost = codecs[width].encoding_error(gradients[name], seed, projected)
                total = 0.0
                for sign in (1.0, -1.0):
                    with exchange.moved({name: lost}, sign * step_size):
                        total += loss()
                found[name, width] = total / 2 - before
        return found

    parts = [_value_of(outcome) for outcome in network.collect(_outcome(own))]
    return {pair: change for part in parts for pair, change in part.items()}


def _recorded(exchange: Searchable, network: Network) -> Mapping[str, Tensor]:
    if exchange.recorder is None:
        raise ValueError("a search needs recorded gradients, and this exchange records none; attach with record=True")
    return exchange.recorder.averaged(network)


def _timed(
    measured: Callable[[], Columns],
    chosen: Callable[[Columns], Found],
    began: float,
    exchange: Searchable,
    network: Network,
    settings: Mapping[str, Any] | None,
) -> Found:
    """What is chosen from tables that are measured now, and with it what the search was of and the seconds it took."""
    tables = measured()
    solving = time.perf_counter()
    result = chosen(tables)
    seconds = {"measuring_seconds": solving - began, "search_seconds": time.perf_counter() - solving}
    return replace(result, settings=_settings(exchange, network) | seconds | dict(settings or {}))


def _settings(exchange: Searchable, network: Network) -> dict[str, Any]:
    """What a search was of, in plain values."""
    compressor = exchange.compressor
    return {
        "type": compressor.name,
        "bucket_size": compressor.bucket_size,
        "error_feedback": compressor.error_feedback,
        "ranks": network.world_size,
        "hosts": exchange.hosts.count,
        "step": exchange.step,
    }


def _on_first_rank(network: Network, work: Callable[[], Result]) -> Result:
    """What `work` returns on rank 0, on all ranks; or what it raises there."""
    return _value_of(network.broadcast(_outcome(work) if network.rank == 0 else None))


def _outcome(work: Callable[[], Result]) -> Result | ValueError:
    """The result of a rank's work, or its failure, which the others must hear of."""
    try:
        return work()
    except Exception as error:
        return error if isinstance(error, ValueError) else ValueError(f"{type(error).__name__}: {error}")


def _value_of(outcome: Result | ValueError) -> Result:
    if isinstance(outcome, ValueError):
        raise outcome
    return outcome
