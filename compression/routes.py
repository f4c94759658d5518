"""Compressors of many families: each layer travels by one of the registry's, as a route says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .registry import COMPRESSORS, Compressor, Options, build

if TYPE_CHECKING:
    from torch import Tensor

    from .averagers import Averager
    from .layers import Layer
    from .network.collectives import Collectives

Route = tuple[str, Mapping[str, Any]]
"""A compressor's name, and its options."""


@dataclass(frozen=True)
class Routes(Options):
    """The options of a mixed compressor: the compressors of some layers by name, and that of all others.

    `bucket_size` is that of every compressor which takes one. With `whole_layers` every layer has one owner on a host,
    whether or not some family needs that. Raises ValueError where they differ in it, and for one
    that takes all gradients at once.
    """

    by_layer: Mapping[str, Compressor] = field(default_factory=dict)
    default: Compressor = field(default_factory=lambda: build("none"))
    bucket_size: int = Options.bucket_size
    whole_layers: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for compressor in self.compressors:
            if compressor.needs_full_gradient:
                raise ValueError(
                    f"each compressor of a mix sees its own layers alone, and {compressor.name} takes all gradients at "
                    "once here; leave out its big_grad and clip"
                )
            if "bucket_size" in compressor.option_values and compressor.bucket_size != self.bucket_size:
                raise ValueError(
                    f"a mix has one bucket_size, by which layers are compressed or not, and {compressor.name} has "
                    f"{compressor.bucket_size} beside {self.bucket_size}; give all of them the same"
                )

    @property
    def compressors(self) -> tuple[Compressor, ...]:
        """Those of the routes, and the default."""
        return (*self.by_layer.values(), self.default)

    def of(self, name: str) -> Compressor:
        """The compressor of a layer."""
        return self.by_layer.get(name, self.default)


@dataclass(frozen=True)
class Mixed(Compressor):
    """Compressors of many families, not yet bound to a model: what `mixed` builds.

    Compressors that differ in `bits` alone are one family, whose layers have widths of their own.
    """

    options: Routes

    @property
    def error_feedback(self) -> bool:
        """Whether what an encoding loses is added to the next gradient, in some family."""
        return any(each.error_feedback for each in self.options.compressors)

    @property
    def encodes(self) -> bool:
        return any(each.encodes for each in self.options.compressors)

    @property
    def needs_matrix(self) -> bool:
        return self.options.whole_layers or any(each.needs_matrix for each in self.options.compressors)

    @property
    def sends_messages(self) -> bool:
        return all(each.sends_messages for each in self.options.compressors)

    @property
    def supports_stale_updates(self) -> bool:
        return all(each.supports_stale_updates for each in self.options.compressors)

    @property
    def option_values(self) -> dict[str, Any]:
        routes = self.options
        return {
            "routes": dict(sorted(routes.by_layer.items())),
            "default": routes.default,
            "whole_layers": routes.whole_layers,
        }

    def codec_at(self, bits: int) -> Any:
        """Raises ValueError: it has many codecs."""
        raise ValueError(
            f"a mix of compressors has no bit width for all layers, got {bits}; ask one of its compressors"
        )

    def check_reduce_scatter(self) -> None:
        """Raises ValueError: shards are averaged by one compressor."""
        raise ValueError(
            "a mix of compressors averages whole layers, of which each rank averages a piece here; choose one "
            "compressor, or shard over the ranks of a host alone and attach with groups=(inside, between)"
        )

    def averager(self, layers: Sequence["Layer"], collectives: "Collectives", seed: int) -> "Averager":
        """Bind to layers and ranks. Raises ValueError for a route of a layer that is not there."""
        from .averagers import Routed

        routes, names = self.options, {layer.name for layer in layers}
        if unknown := [name for name in routes.by_layer if name not in names]:
            raise ValueError(f"the model has no layer {unknown[0]}, for which a route is given; leave the route out")
        families = {label(each): _without_bits(each) for each in routes.compressors}
        routed = Routed(
            {name: partial(_bound, each, seed) for name, each in families.items()},
            {name: label(routes.of(name)) for name in names},
            layers,
            collectives,
        )
        routed.set_widths(
            {
                layer.name: routes.of(layer.name).options.bits
                for layer in layers
                if layer.compressed and COMPRESSORS[routes.of(layer.name).name].has_bits
            }
        )
        return routed


def mixed(routes: Mapping[str, Route], default: Route = ("none", {}), *, whole_layers: bool = False) -> Mixed:
    """A compressor that takes each layer by a compressor of its own: the `default`, where there is no route.

    `routes` maps layers' names to names and options of compressors: {"fc.weight": ("topk", {"ratio": 0.01})}. Options
    are those that `build` takes. What is not compressed in any way, such as biases, is the default's too.

    With `whole_layers` a layer has one owner on a host even where no family needs matrices: routes may then change to
    some that do (`Attached.reroute`), and all that is owed stays where it is.

    Raises ValueError for what `build` refuses, for compressors that differ in `bucket_size`, and for one that takes all
    gradients at once.
    """
    by_layer = {name: build(family, **options) for name, (family, options) in routes.items()}
    last = build(default[0], **default[1])
    sizes = [each.bucket_size for each in (last, *by_layer.values()) if "bucket_size" in each.option_values]
    return Mixed("mixed", Routes(by_layer, last, (sizes or [Options.bucket_size])[0], whole_layers))


def squared_error(compressor: Compressor, layer: "Layer", values: "Tensor") -> float:
    """What one encoding loses of a layer's values: the expectation, where it has a closed form, else a real encoding's.

    Error feedback included: a quantizer's loss is then that of the projection. A compressor that goes on from its last
    encoding, as PowerSGD does, is measured in its second one of the same values, before which nothing is owed.
    """
    from .averagers import Averager
    from .gradients import Gradients
    from .network.collectives import Solo

    if COMPRESSORS[compressor.name].has_bits:
        codec = compressor.codec_at(compressor.options.bits)
        expected: float = codec.expected_squared_error(values, compressor.error_feedback)
        return expected
    flat, first = values.detach().float().reshape(-1), compressor.options.warmup_steps
    averager: Averager = compressor.averager([layer], Solo(), 0)
    average = flat
    for step in (first, first + 1):
        average = flat.clone()
        averager.average_(Gradients(average, (layer.name,), (0,)), step)
        for kind, state in averager.states.items():
            state.settle(kind != "residual")
    return float((flat - average).double().square().sum())


def label(compressor: Compressor) -> str:
    """The name of a family: the compressor's name, and its options but for `bits` where they are no defaults."""
    family = _without_bits(compressor)
    given = [
        f"{each.name}={getattr(family.options, each.name)!r}"
        for each in fields(family.options)
        if getattr(family.options, each.name) != each.default
    ]
    return f"{family.name}({', '.join(given)})" if given else family.name


def _without_bits(compressor: Compressor) -> Compressor:
    """The same at the default width, where it has widths."""
    if not COMPRESSORS[compressor.name].has_bits:
        return compressor
    return replace(compressor, options=replace(compressor.options, bits=COMPRESSORS[compressor.name].options().bits))


def _bound(compressor: Compressor, seed: int, layers: Sequence["Layer"], collectives: "Collectives") -> "Averager":
    return compressor.averager(layers, collectives, seed)
