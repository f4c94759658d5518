"""The registry: every compressor's name, its options, and how to build it. The only list of compressor names.

The command line's choices, the tests and the documentation read it. A new compressor is one class in its family's file
and one row here. Rows load what they build when they build it: to list names and options takes no torch.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

if TYPE_CHECKING:
    from .averagers import Averager
    from .averagers.top_k import Score
    from .codecs.base import Codec, Floats
    from .codecs.quantizer import Quantizer
    from .layers import Layer, Pieces
    from .network.collectives import Collectives
    from .network.inside import Levels


class Options:
    """The options of a compressor: a frozen dataclass with a field and a default for each.

    Options that a compressor does not take have these values.

    `bucket_size`: values that share scales, -1 for the whole layer; layers with fewer values are not encoded.
    `warmup_steps`: optimizer steps in which nothing is encoded, before compression begins.
    `big_grad`: all gradients travel as one tensor, after backward.
    `clip`: bound of the norm of a rank's whole gradient.
    `dense_dtype`: numbers as which values travel that are not encoded, float32 or bfloat16.

    Raises ValueError for a value out of range.
    """

    bucket_size: int = 512
    error_feedback: bool = False
    warmup_steps: int = 0
    big_grad: bool = False
    clip: float | None = None
    dense_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps counts optimizer steps, got {self.warmup_steps}")
        if self.dense_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dense_dtype is float32 or bfloat16, got {self.dense_dtype!r}")

    @property
    def needs_full_gradient(self) -> bool:
        """Whether all gradients are needed at once: as one tensor, or for their norm."""
        return self.big_grad or self.clip is not None

    @property
    def dense(self) -> "Floats":
        """The codec of what is not encoded."""
        kind = {"float32": "base.Float32", "bfloat16": "base.BFloat16"}[self.dense_dtype]
        codec: Floats = _load(kind)()
        return codec


@dataclass(frozen=True)
class DenseOptions(Options):
    """Options of a compressor that encodes nothing."""

    big_grad: bool = False


@dataclass(frozen=True)
class AllReduceOptions(DenseOptions):
    """Options of a compressor that sends the whole gradient without encoding it."""

    dense_dtype: str = "float32"


@dataclass(frozen=True)
class FixedWidthOptions(Options):
    """Options of a quantizer that has one width."""

    bucket_size: int = 512
    error_feedback: bool = False
    warmup_steps: int = 0
    big_grad: bool = False
    dense_dtype: str = "float32"


@dataclass(frozen=True)
class QuantizerOptions(Options):
    """Options of a quantizer with a choice of `bits` per value, and of others for the averages (`second_hop_bits`)."""

    bits: int = 4
    second_hop_bits: int | None = None
    bucket_size: int = 512
    error_feedback: bool = False
    warmup_steps: int = 0
    big_grad: bool = False
    dense_dtype: str = "float32"


@dataclass(frozen=True)
class TopKOptions(Options):
    """`ratio`: fraction of values that are kept. Dropped values are lost, or added later (`error_feedback`), or sent in
    `efx_bits` bits, or a random fraction `efx_randk` of them is sent."""

    ratio: float = 0.01
    bucket_size: int = 512
    error_feedback: bool = False
    efx_bits: int | None = None
    efx_randk: float | None = None
    warmup_steps: int = 0
    big_grad: bool = False
    dense_dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        fates = {
            "error_feedback": self.error_feedback,
            "efx_bits": self.efx_bits is not None,
            "efx_randk": self.efx_randk is not None,
        }
        if len(chosen := [name for name, on in fates.items() if on]) > 1:
            raise ValueError(f"what a top-k drops has one fate: choose one of {' and '.join(chosen)}")


@dataclass(frozen=True)
class LowRankOptions(Options):
    """`rank`: columns of each of a layer's two factors."""

    rank: int = 4
    bucket_size: int = 512
    error_feedback: bool = False
    warmup_steps: int = 0
    dense_dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank counts the columns of a factor, at least 1, got {self.rank}")


@dataclass(frozen=True)
class AtomsOptions(LowRankOptions):
    """`rank`: atoms of each layer."""

    big_grad: bool = False


@dataclass(frozen=True)
class DgcOptions(Options):
    """`ratio`: fraction of values that are kept after `warmup_steps`. `momentum`, `nesterov`: of each rank's own
    velocity. `clip`: bound of the norm of a rank's gradient, before momentum; None is off."""

    ratio: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    clip: float | None = None
    bucket_size: int = 512
    warmup_steps: int = 0
    big_grad: bool = False
    dense_dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is a number from 0 to below 1, got {self.momentum}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip bounds a norm and is a number above 0, got {self.clip}; None is off")


Build = Callable[[Any, Sequence["Layer"], "Collectives", int], "Averager"]
"""(options, layers, collectives, seed) -> the averager bound to them. The options are of the row's own class."""

BuildOfPieces = Callable[[Any, Sequence["Layer"], Mapping[str, "Pieces"], "Collectives", int], "Averager"]
"""Likewise, with every layer's pieces."""


@dataclass(frozen=True)
class Row:
    """One compressor: a summary, the class of its options, and how its averager and its codec are built.

    Either a `quantizer`, whose codes are averaged in two hops, or what `average` builds. Shards are averaged by its
    codes in one hop, or by what `reduce_scatter` builds. `quantizer` and `codec` are classes, or their names within
    `compression.codecs`.
    `min_bits`: the least width, 0 where there is none to choose. `listed`: among the choices of a compression type; the
    others are chosen otherwise. `needs_feedback`: error feedback is always on. `own_warmup`: it encodes in its first
    `warmup_steps` too. `stateless`: its averager remembers nothing. `encodes`: it sends less than float32 does, with
    any options. `needs_matrix`: a layer means something as a whole only. `all_reduces`: the network adds up what it
    sends, or some of it.
    """

    summary: str
    options: type[Any]
    average: Build | None = None
    reduce_scatter: BuildOfPieces | None = None
    quantizer: "str | type[Quantizer] | None" = None
    codec: "str | Callable[..., Codec] | None" = None
    min_bits: int = 0
    listed: bool = True
    needs_feedback: bool = False
    own_warmup: bool = False
    stateless: bool = False
    encodes: bool = True
    needs_matrix: bool = False
    all_reduces: bool = False

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of its options."""
        return tuple(field.name for field in fields(self.options))

    @property
    def has_bits(self) -> bool:
        """Whether its bit width can be chosen, per layer too, and so searched for."""
        return self.quantizer is not None and "bits" in self.takes

    @property
    def sends_messages(self) -> bool:
        """Whether all that it sends, once it encodes, is messages of bytes: nothing that the network adds up."""
        return self.encodes and not self.all_reduces

    @property
    def supports_stale_updates(self) -> bool:
        """Whether the average of a layer may last longer than its step: each layer is settled by itself."""
        return self.stateless or self.quantizer is not None

    def quantizer_of(self, options: Any) -> "Quantizer":
        """The quantizer with those of the options that it takes. Raises ValueError where one is out of range."""
        kind = _load(self.quantizer)
        made: Quantizer = kind(**{field.name: getattr(options, field.name) for field in fields(kind) if field.init})
        return made

    def chosen(self, name: str, options: Mapping[str, Any]) -> Any:
        """The options of its class with these values, the defaults for the others. `name` is what errors call it.

        Raises ValueError for an option that it does not take, and for a value out of range.
        """
        unknown = sorted(set(options) - set(self.takes))
        if unknown:
            raise ValueError(
                f"compressor {name} takes no option {unknown[0]!r}; it takes {', '.join(self.takes) or 'none'}"
            )
        for option, value in options.items():
            _check_type(name, option, value, get_type_hints(self.options)[option])
        chosen = self.options(**options)
        if self.quantizer is not None:
            quantizer = self.quantizer_of(chosen)
            if getattr(chosen, "second_hop_bits", None) is not None:
                quantizer.with_bits(chosen.second_hop_bits)
        for option, codec in (("ratio", "sparsifiers.TopK"), ("efx_randk", "sparsifiers.RandomK")):
            if getattr(chosen, option, None) is not None:
                _load(codec)(getattr(chosen, option))
        if getattr(chosen, "efx_bits", None) is not None:
            _load("quantizers.MaxMin")(chosen.efx_bits, chosen.bucket_size)
        return chosen

    def averager(
        self, options: Any, layers: Sequence["Layer"], collectives: "Collectives", seed: int
    ) -> "Averager":
        """The averager bound to layers and ranks, behind its warm-up where there is one."""
        inner = self._averager(options, layers, collectives, seed)
        if options.warmup_steps == 0 or self.own_warmup:
            return inner
        from .averagers import WarmUp

        return WarmUp(inner, _none(options, layers, collectives, seed), options.warmup_steps)

    def _averager(
        self, options: Any, layers: Sequence["Layer"], collectives: "Collectives", seed: int
    ) -> "Averager":
        if self.average is not None:
            return self.average(options, layers, collectives, seed)
        from .averagers import TwoHop

        feedback = options.error_feedback or self.needs_feedback
        of_averages = getattr(options, "second_hop_bits", None)
        return TwoHop(self.quantizer_of(options), layers, collectives, seed, feedback, options.dense, of_averages)

    def averager_of_pieces(
        self,
        name: str,
        options: Any,
        layers: Sequence["Layer"],
        pieces: Mapping[str, "Pieces"],
        collectives: "Collectives",
        seed: int,
    ) -> "Averager":
        """The averager of shards, behind its warm-up where there is one. `name` is what errors call it.

        Raises ValueError where it averages no pieces of layers, and for an option without effect there.
        """
        self.check_of_pieces(name, options)
        if self.reduce_scatter is not None:
            return self.reduce_scatter(options, layers, pieces, collectives, seed)
        from .averagers import ReduceScatter, WarmUp

        quantizer, feedback = self.quantizer_of(options), options.error_feedback
        inner = ReduceScatter(quantizer, layers, pieces, collectives, seed, feedback, options.dense)
        if options.warmup_steps == 0:
            return inner
        return WarmUp(inner, _none_of_pieces(options, layers, pieces, collectives, seed), options.warmup_steps)

    def check_of_pieces(self, name: str, options: Any) -> None:
        """Raise ValueError where it averages no pieces of layers, and for an option without effect there."""
        if self.quantizer is None and self.reduce_scatter is None:
            why = "adds nothing up that ranks could share"
            if self.encodes:
                what = "needs whole matrices" if self.needs_matrix else "encodes layers as a whole"
                why = f"{what}, of which each rank averages a piece here"
            raise ValueError(
                f"compressor {name} {why}; choose one of {', '.join(with_reduce_scatter())}, or shard over the ranks "
                "of a host alone and attach with groups=(inside, between)"
            )
        if self.needs_feedback and not options.error_feedback:
            raise ValueError(
                f"compressor {name} is biased without error feedback, for which every rank of W keeps (W - 1) / W of a "
                "float for each parameter of the whole model; give error_feedback=True, or choose one that is unbiased"
            )
        if getattr(options, "second_hop_bits", None) is not None:
            raise ValueError(
                "second_hop_bits are the width of averages, which nobody sends where each rank keeps its own; leave it "
                "out"
            )
        if options.big_grad:
            raise ValueError(
                "big_grad waits for all gradients, and a sharded model hands over those of one module at a time; leave "
                "it out"
            )


def _none(options: Options, layers: Sequence["Layer"], collectives: "Collectives", seed: int) -> "Averager":
    from .averagers import Dense, RoundedDense

    return Dense(collectives) if options.dense_dtype == "float32" else RoundedDense(collectives)


def _none_of_pieces(
    options: Options, layers: Sequence["Layer"], pieces: Mapping[str, "Pieces"], collectives: "Collectives", seed: int
) -> "Averager":
    from .averagers import ReduceScatter

    as_they_are, any_codes = [replace(layer, compressed=False) for layer in layers], _load("quantizers.MaxMin")(8)
    return ReduceScatter(any_codes, as_they_are, pieces, collectives, seed, dense=options.dense)


def _sanity(options: DenseOptions, layers: Sequence["Layer"], collectives: "Collectives", seed: int) -> "Averager":
    from .averagers import Sanity

    return Sanity()


def _stats(options: DenseOptions, layers: Sequence["Layer"], collectives: "Collectives", seed: int) -> "Averager":
    from .averagers import StatisticsAverager

    return StatisticsAverager(collectives, {layer.name: layer.numel for layer in layers})


def _powersgd(options: LowRankOptions, layers: Sequence["Layer"], collectives: "Collectives", seed: int) -> "Averager":
    from .averagers import PowerSGD

    return PowerSGD(options.rank, layers, collectives, seed, options.dense)


def _svd(options: AtomsOptions, layers: Sequence["Layer"], collectives: "Collectives", seed: int) -> "Averager":
    from .averagers import OneHop
    from .codecs.low_rank import SpectralAtoms, sides

    def atoms(layer: "Layer") -> "Codec":
        codec = SpectralAtoms(*sides(layer.shape), options.rank, contraction=options.error_feedback)
        return options.dense if codec.dense else codec

    return OneHop(atoms, layers, collectives, seed, options.error_feedback, options.dense)


def _top_k(options: TopKOptions, layers: Sequence["Layer"], collectives: "Collectives", seed: int) -> "Averager":
    return _top_k_by(None, options, layers, collectives, seed)


def _top_k_rmsprop(
    options: TopKOptions, layers: Sequence["Layer"], collectives: "Collectives", seed: int
) -> "Averager":
    from .averagers import RmsScore

    return _top_k_by(RmsScore(layers), options, layers, collectives, seed)


def _top_k_by(
    score: "Score | None", options: TopKOptions, layers: Sequence["Layer"], collectives: "Collectives", seed: int
) -> "Averager":
    """The top-k of a score, by magnitude where there is none."""
    from .averagers import Residual, TopKAverager

    return TopKAverager(
        _load("sparsifiers.TopK")(options.ratio),
        layers,
        collectives,
        Residual(layers) if options.error_feedback else None,
        score,
        _dropped(options, layers, collectives, seed),
        global_top_k=options.big_grad,
        dense=options.dense,
    )


def _dropped(
    options: TopKOptions, layers: Sequence["Layer"], collectives: "Collectives", seed: int
) -> "Averager | None":
    """The averager of the values that a top-k drops, where they are sent."""
    from .averagers import RandomKAverager, TwoHop

    if options.efx_bits is not None:
        codec = _load("quantizers.MaxMin")(options.efx_bits, options.bucket_size)
        return TwoHop(codec, layers, collectives, seed)
    if options.efx_randk is not None:
        return RandomKAverager(_load("sparsifiers.RandomK")(options.efx_randk), layers, collectives, seed)
    return None


def _dgc(options: DgcOptions, layers: Sequence["Layer"], collectives: "Collectives", seed: int) -> "Averager":
    from .averagers import DeepGradientCompression

    return DeepGradientCompression(
        options.ratio,
        layers,
        collectives,
        options.momentum,
        options.nesterov,
        clip=options.clip,
        ramp_steps=options.warmup_steps,
        global_top_k=options.big_grad,
        dense=options.dense,
    )


COMPRESSORS: dict[str, Row] = {
    "none": Row(
        "all-reduce of float32 or bfloat16",
        AllReduceOptions,
        _none,
        _none_of_pieces,
        stateless=True,
        encodes=False,
        all_reduces=True,
    ),
    "sanity": Row(
        "sends nothing, every gradient is zero", DenseOptions, _sanity, stateless=True, encodes=False
    ),
    "maxmin": Row(
        "uniform levels between minimum and maximum",
        QuantizerOptions,
        quantizer="quantizers.MaxMin", min_bits=1,
    ),
    "exponential": Row(
        "signs, and levels that halve from the largest magnitude (NUQSGD)",
        QuantizerOptions,
        quantizer="quantizers.Exponential", min_bits=2,
    ),
    "1bit": Row(
        "signs, and the means of negatives and others, always with error feedback",
        FixedWidthOptions,
        quantizer="quantizers.OneBit",
        needs_feedback=True,
    ),
    "norm_uniform": Row(
        "signs, and uniform levels up to the largest magnitude (QSGD)",
        QuantizerOptions,
        quantizer="quantizers.NormUniform", min_bits=2,
    ),
    "terngrad": Row("three values, five to a byte", FixedWidthOptions, quantizer="quantizers.TernGrad"),
    "topk": Row(
        "the largest by magnitude, values and indices", TopKOptions, _top_k, codec="sparsifiers.TopK"
    ),
    "topk_rmsprop": Row(
        "the largest by magnitude over their running root mean square", TopKOptions, _top_k_rmsprop
    ),
    "svd": Row(
        "some atoms of each layer's singular value decomposition, drawn at random",
        AtomsOptions,
        _svd,
        codec="low_rank.SpectralAtoms",
        needs_matrix=True,
    ),
    "stats": Row(
        "float32 all-reduce, and statistics of the gradients on the way",
        DenseOptions,
        _stats,
        stateless=True,
        encodes=False,
        all_reduces=True,
    ),
    "quantile": Row(
        "levels at the quantiles of each layer", QuantizerOptions, quantizer="quantizers.Quantile", min_bits=1
    ),
    "eden": Row(
        "a random rotation, and the best levels for normal values (EDEN)",
        QuantizerOptions,
        quantizer="eden.Eden", min_bits=1,
    ),
    "powersgd": Row(
        "two thin factors of each layer, warm-started, always with error feedback",
        LowRankOptions,
        _powersgd,
        listed=False,
        needs_feedback=True,
        needs_matrix=True,
        all_reduces=True,
    ),
    "dgc": Row(
        "deep gradient compression: top-k of momentum that each rank keeps for itself",
        DgcOptions,
        _dgc,
        listed=False,
        own_warmup=True,
    ),
}


@dataclass(frozen=True)
class Compressor:
    """A compressor with its options, not yet bound to a model: what `attach` takes."""

    name: str
    options: Any

    @property
    def bucket_size(self) -> int:
        """Values that share scales; layers with fewer are not encoded."""
        size: int = self.options.bucket_size
        return size

    @property
    def needs_full_gradient(self) -> bool:
        """Whether it needs all gradients at once: as one tensor, or for their norm."""
        needs: bool = self.options.needs_full_gradient
        return needs

    @property
    def error_feedback(self) -> bool:
        """Whether what an encoding loses is added to the next gradient."""
        return COMPRESSORS[self.name].needs_feedback or getattr(self.options, "error_feedback", False)

    def codec_at(self, bits: int) -> Any:
        """Its codec at a width. Raises ValueError where it has no bit widths, or not this one."""
        row = COMPRESSORS[self.name]
        if not row.has_bits:
            raise ValueError(f"compressor {self.name} has no bit widths; those with: {', '.join(with_bits())}")
        return row.quantizer_of(self.options).with_bits(bits)

    @property
    def encodes(self) -> bool:
        """Whether it sends less than float32 does."""
        return COMPRESSORS[self.name].encodes or self.options.dense_dtype != "float32"

    @property
    def needs_matrix(self) -> bool:
        """Whether a layer means something as a whole only."""
        return COMPRESSORS[self.name].needs_matrix

    @property
    def sends_messages(self) -> bool:
        """Whether all that it sends, once it encodes, is messages of bytes: nothing that the network adds up."""
        return COMPRESSORS[self.name].sends_messages

    @property
    def supports_stale_updates(self) -> bool:
        """Whether the average of a layer may last longer than its step."""
        return COMPRESSORS[self.name].supports_stale_updates and not self.needs_full_gradient

    @property
    def option_values(self) -> dict[str, Any]:
        """The options that it takes, by name."""
        return {name: getattr(self.options, name) for name in COMPRESSORS[self.name].takes}

    def hierarchical(self, layers: Sequence["Layer"], levels: "Levels", seed: int) -> "Averager":
        """Bind to layers, and to the ranks of this host and of this place."""
        from .averagers import Hierarchical

        whole = "layers" if self.needs_matrix else "slices"
        ownership = "one" if self.needs_full_gradient else whole
        return Hierarchical(self.averager, layers, levels, seed, self.bucket_size, ownership)

    def averager(self, layers: Sequence["Layer"], collectives: "Collectives", seed: int) -> "Averager":
        """Bind to layers and ranks."""
        return COMPRESSORS[self.name].averager(self.options, layers, collectives, seed)

    def check_reduce_scatter(self) -> None:
        """Raise ValueError where it averages no pieces of layers, and for an option without effect there."""
        COMPRESSORS[self.name].check_of_pieces(self.name, self.options)

    def reduce_scatter(
        self, layers: Sequence["Layer"], pieces: Mapping[str, "Pieces"], collectives: "Collectives", seed: int
    ) -> "Averager":
        """Bind to this rank's pieces of layers, to everybody's, and to ranks; see `averagers.ReduceScatter`.

        Raises ValueError for what `check_reduce_scatter` refuses.
        """
        return COMPRESSORS[self.name].averager_of_pieces(self.name, self.options, layers, pieces, collectives, seed)

    def hierarchical_reduce_scatter(
        self,
        layers: Sequence["Layer"],
        pieces: Mapping[str, "Pieces"],
        places: Sequence[Sequence[int]],
        levels: "Levels",
        seed: int,
    ) -> "Averager":
        """Likewise, to the ranks of this host and of this place; `places` are the ranks of each place."""
        from .averagers import ReduceScatterInLevels

        return ReduceScatterInLevels(self.reduce_scatter, layers, pieces, places, levels, seed)


def build(name: str, **options: Any) -> Compressor:
    """The compressor of a name. Options are the fields of its row's `options`.

    Raises ValueError for a name or an option that does not exist, an option that this compressor does not take, and a
    value out of range.
    """
    return Compressor(name, _row(name).chosen(name, options))


def codec(name: str, **options: Any) -> Any:
    """The codec of a compressor's name: `codec("maxmin", bits=4, bucket_size=512)`, `codec("topk", ratio=0.01)`,
    `codec("svd", rows=64, cols=576, rank=4)`.

    Raises ValueError for a name that has no codec of its own.
    """
    row = _row(name)
    if row.codec is not None:
        return _load(row.codec)(**options)
    if row.quantizer is None:
        with_codec = [name for name, row in COMPRESSORS.items() if row.quantizer or row.codec]
        raise ValueError(f"compressor {name} has no codec; those with one: {', '.join(with_codec)}")
    kind, defaults = _load(row.quantizer), row.options()
    own = {field.name: getattr(defaults, field.name) for field in fields(kind) if field.init}
    return kind(**{**own, **options})


def with_bits() -> list[str]:
    """Names of the compressors whose bit width can be chosen."""
    return [name for name, row in COMPRESSORS.items() if row.has_bits]


def with_reduce_scatter() -> list[str]:
    """Names of the compressors that average shards."""
    return [name for name, row in COMPRESSORS.items() if row.quantizer is not None or row.reduce_scatter is not None]


def with_messages() -> list[str]:
    """Names of the compressors that send messages, which can have checksums."""
    return [name for name, row in COMPRESSORS.items() if row.sends_messages]


def with_stale_updates() -> list[str]:
    """Names of the compressors whose averages a broken barrier may let be late."""
    return [name for name, row in COMPRESSORS.items() if row.supports_stale_updates]


def _check_type(compressor: str, option: str, value: object, expected: Any) -> None:
    """Raise ValueError for a value that is not of the option's type; integers are numbers, and booleans are neither."""
    kinds = get_args(expected) or (expected,)
    kinds += (int,) if float in kinds else ()
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("none" if kind is NoneType else kind.__name__ for kind in kinds)
        raise ValueError(f"compressor {compressor} takes {option} as {wanted}, got {value!r}")


def _row(name: str) -> Row:
    if name not in COMPRESSORS:  # also what is no name at all
        raise ValueError(f"no compressor is called {name!r}; there are {', '.join(COMPRESSORS)}")
    return COMPRESSORS[name]


def _load(kind: Any) -> Any:
    """A class, or the class of a name within `compression.codecs`."""
    if not isinstance(kind, str):
        return kind
    module, _, name = kind.rpartition(".")
    return getattr(importlib.import_module(f".codecs.{module}", __package__), name)
