"""The registry: every compressor's name, and how to build it. The only list of compressor names.

The command line's choices, the tests and the documentation read it. A new compressor is one file (or one class in
its family's file) and one row here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .averagers import (
    Averager,
    DeepGradientCompression,
    Dense,
    Gathered,
    LowRank,
    OneHop,
    RandomKAverager,
    Residual,
    RmsScore,
    Sanity,
    StatisticsAverager,
    TwoHop,
    WarmUp,
)
from .codecs.base import Codec
from .codecs.low_rank import SpectralAtoms, sides
from .codecs.quantizers import Exponential, MaxMin, NormUniform, OneBit, Quantile, Quantizer, TernGrad, VariableWidth
from .codecs.sparsifiers import RandomK, TopK
from .layers import Layer
from .network.collectives import Collectives

Build = Callable[["Options", Sequence[Layer], Collectives, int], Averager]


@dataclass(frozen=True)
class Options:
    """Every option that some compressor takes; each takes those that its row names.

    `warmup_steps`: optimizer steps in float32 before compression begins. `rank`: of a layer as a product of factors.
    `big_grad`: all gradients travel as one tensor, after backward. `ratio`: share of values that a top-k keeps; what it
    drops is lost, or remembered (`error_feedback`), or sent in `efx_bits` bits, or a random share `efx_randk` of it is.
    `momentum`, `nesterov`, `clip` (norm of a rank's gradient, before momentum): of deep gradient compression.
    """

    bits: int = 4
    bucket_size: int = 512
    error_feedback: bool = False
    warmup_steps: int = 0
    rank: int = 4
    big_grad: bool = False
    ratio: float = 0.01
    efx_bits: int | None = None
    efx_randk: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    clip: float | None = None


@dataclass(frozen=True)
class Row:
    """One compressor: what it is, the options it takes, how its averager and its codec are built.

    A `quantizer` makes the codec; other codecs are made by `codec` from options of their own.
    `listed`: among the choices of --compression-type; the others have a flag of their own. `own_warmup`: what it does
    in its first `warmup_steps` is its own business, and not float32. `stateless`: its averager remembers nothing.
    """

    summary: str
    takes: tuple[str, ...]
    average: Build
    quantizer: type[Quantizer] | None = None
    listed: bool = True
    codec: Callable[..., Codec] | None = None
    own_warmup: bool = False
    stateless: bool = False

    @property
    def has_bits(self) -> bool:
        """Whether its bit width can be chosen, per layer too, and so searched for."""
        return self._with_bits is not None

    @property
    def supports_stale_updates(self) -> bool:
        """Whether the average of a layer may last longer than its step: what is remembered of it is kept by itself."""
        return self.stateless or self.quantizer is not None

    @property
    def min_bits(self) -> int:
        return self._with_bits.min_bits if self._with_bits is not None else 0

    @property
    def _with_bits(self) -> type[VariableWidth] | None:
        return self.quantizer if self.quantizer and issubclass(self.quantizer, VariableWidth) else None


def _quantized(quantizer: type[Quantizer], needs_feedback: bool = False) -> Build:
    def average(options: Options, layers: Sequence[Layer], collectives: Collectives, seed: int) -> Averager:
        codec = quantizer(**_own(quantizer, options))
        return TwoHop(codec, layers, collectives, seed, options.error_feedback or needs_feedback)

    return average


def _own(quantizer: type[Quantizer], options: Options) -> dict[str, Any]:
    """Those of the options that a quantizer is made from."""
    return {field.name: getattr(options, field.name) for field in fields(quantizer) if field.init}  # type: ignore[arg-type]


def _powersgd(options: Options, layers: Sequence[Layer], collectives: Collectives, seed: int) -> Averager:
    return LowRank(options.rank, layers, collectives, seed)


def _svd(options: Options, layers: Sequence[Layer], collectives: Collectives, seed: int) -> Averager:
    def atoms(layer: Layer) -> Codec:
        return SpectralAtoms(*sides(layer.shape), options.rank, contraction=options.error_feedback)

    return OneHop(atoms, layers, collectives, seed, options.error_feedback)


def _stats(options: Options, layers: Sequence[Layer], collectives: Collectives, seed: int) -> Averager:
    return StatisticsAverager(collectives, {layer.name: layer.numel for layer in layers})


def _top_k(score: type[RmsScore] | None = None) -> Build:
    def average(options: Options, layers: Sequence[Layer], collectives: Collectives, seed: int) -> Averager:
        dropped: Averager | None = None
        if options.efx_bits is not None:
            dropped = TwoHop(MaxMin(options.efx_bits, options.bucket_size), layers, collectives, seed)
        if options.efx_randk is not None:
            dropped = RandomKAverager(RandomK(options.efx_randk), layers, collectives, seed)
        return Gathered(
            TopK(options.ratio),
            layers,
            collectives,
            Residual(layers) if options.error_feedback else None,
            score(layers) if score is not None else None,
            dropped,
            global_top_k=options.big_grad,
        )

    return average


def _dgc(options: Options, layers: Sequence[Layer], collectives: Collectives, seed: int) -> Averager:
    return DeepGradientCompression(
        options.ratio,
        layers,
        collectives,
        options.momentum,
        options.nesterov,
        clip=options.clip,
        ramp_steps=options.warmup_steps,
        global_top_k=options.big_grad,
    )


_FIXED_WIDTH = ("bucket_size", "error_feedback", "warmup_steps", "big_grad")
_QUANTIZER = ("bits", *_FIXED_WIDTH)
_TOP_K = ("ratio", "bucket_size", "error_feedback", "efx_bits", "efx_randk", "warmup_steps", "big_grad")

COMPRESSORS: dict[str, Row] = {
    "none": Row(
        "float32 all-reduce",
        ("big_grad",),
        lambda options, layers, collectives, seed: Dense(collectives),
        stateless=True,
    ),
    "sanity": Row(
        "sends nothing, every gradient is zero",
        ("big_grad",),
        lambda options, layers, collectives, seed: Sanity(),
        stateless=True,
    ),
    "maxmin": Row("uniform levels between minimum and maximum", _QUANTIZER, _quantized(MaxMin), MaxMin),
    "exponential": Row(
        "signs, and levels that halve from the largest magnitude (NUQSGD)",
        _QUANTIZER,
        _quantized(Exponential),
        Exponential,
    ),
    "1bit": Row(
        "signs, and the means of negatives and others, always with error feedback",
        _FIXED_WIDTH,
        _quantized(OneBit, needs_feedback=True),
        OneBit,
    ),
    "norm_uniform": Row(
        "signs, and uniform levels up to the largest magnitude (QSGD)",
        _QUANTIZER,
        _quantized(NormUniform),
        NormUniform,
    ),
    "terngrad": Row("three values, five to a byte", _FIXED_WIDTH, _quantized(TernGrad), TernGrad),
    "topk": Row("the largest by magnitude, values and indices", _TOP_K, _top_k(), codec=TopK),
    "topk_rmsprop": Row("the largest by magnitude over their running root mean square", _TOP_K, _top_k(RmsScore)),
    "svd": Row(
        "some atoms of each layer's singular value decomposition, drawn at random",
        ("rank", "bucket_size", "error_feedback", "warmup_steps", "big_grad"),
        _svd,
        codec=SpectralAtoms,
    ),
    "stats": Row(
        "float32 all-reduce, and statistics of the gradients on the way", ("big_grad",), _stats, stateless=True
    ),
    "quantile": Row("levels at the quantiles of each layer", _QUANTIZER, _quantized(Quantile), Quantile),
    "powersgd": Row(
        "two thin factors of each layer, warm-started, always with error feedback",
        ("rank", "bucket_size", "error_feedback", "warmup_steps"),
        _powersgd,
        listed=False,
    ),
    "dgc": Row(
        "deep gradient compression: top-k of momentum that each rank keeps for itself",
        ("ratio", "momentum", "nesterov", "clip", "bucket_size", "warmup_steps", "big_grad"),
        _dgc,
        listed=False,
        own_warmup=True,
    ),
}


@dataclass(frozen=True)
class Compressor:
    """A compressor with its options, not yet bound to a model: what `attach` takes."""

    name: str
    options: Options

    @property
    def bucket_size(self) -> int:
        return self.options.bucket_size

    @property
    def needs_full_gradient(self) -> bool:
        """Whether it needs the whole gradient at once: as one tensor, or for its norm."""
        return self.options.big_grad or self.options.clip is not None

    def averager(self, layers: Sequence[Layer], collectives: Collectives, seed: int) -> Averager:
        """Bind to layers and ranks."""
        row = COMPRESSORS[self.name]
        inner = row.average(self.options, layers, collectives, seed)
        if self.options.warmup_steps == 0 or row.own_warmup:
            return inner
        return WarmUp(inner, Dense(collectives), self.options.warmup_steps)


def build(name: str, **options: Any) -> Compressor:
    """The compressor of a name. Options as in `Options`.

    Raises ValueError for a name or an option that does not exist, an option that this compressor does not take, and a
    value out of range.
    """
    row = _row(name)
    unknown = sorted(set(options) - set(row.takes))
    if unknown:
        raise ValueError(
            f"compressor {name} takes no option {unknown[0]!r}; it takes {', '.join(row.takes) or 'none'}"
        )
    compressor = Compressor(name, Options(**options))
    if row.quantizer is not None:
        row.quantizer(**_own(row.quantizer, compressor.options))
    if compressor.options.warmup_steps < 0:
        raise ValueError(f"warmup_steps counts optimizer steps, got {compressor.options.warmup_steps}")
    if compressor.options.rank < 1:
        raise ValueError(f"rank counts the columns of a factor, at least 1, got {compressor.options.rank}")
    _check_sparse(compressor.options)
    return compressor


def _check_sparse(options: Options) -> None:
    TopK(options.ratio)
    if options.efx_bits is not None:
        MaxMin(options.efx_bits, options.bucket_size)
    if options.efx_randk is not None:
        RandomK(options.efx_randk)
    fates = {
        "error_feedback": options.error_feedback,
        "efx_bits": options.efx_bits is not None,
        "efx_randk": options.efx_randk is not None,
    }
    if len(chosen := [name for name, on in fates.items() if on]) > 1:
        raise ValueError(f"what a top-k drops has one fate: choose one of {' and '.join(chosen)}")
    if not 0 <= options.momentum < 1:
        raise ValueError(f"momentum is a number from 0 to below 1, got {options.momentum}")
    if options.clip is not None and not options.clip > 0:
        raise ValueError(f"clip bounds a norm and is a number above 0, got {options.clip}; None is off")


def codec(name: str, **options: Any) -> Any:
    """The codec of a compressor's name: `codec("maxmin", bits=4, bucket_size=512)`, `codec("topk", ratio=0.01)`,
    `codec("svd", rows=64, cols=576, rank=4)`.

    Raises ValueError for a name that has no codec of its own.
    """
    row = _row(name)
    if row.codec is not None:
        return row.codec(**options)
    if row.quantizer is None:
        with_codec = [name for name, row in COMPRESSORS.items() if row.quantizer or row.codec]
        raise ValueError(f"compressor {name} has no codec; those with one: {', '.join(with_codec)}")
    return row.quantizer(**{**_own(row.quantizer, Options()), **options})


def with_bits() -> list[str]:
    """Names of the compressors whose bit width can be chosen."""
    return [name for name, row in COMPRESSORS.items() if row.has_bits]


def with_stale_updates() -> list[str]:
    """Names of the compressors whose averages a broken barrier may let be late."""
    return [name for name, row in COMPRESSORS.items() if row.supports_stale_updates]


def _row(name: str) -> Row:
    if name not in COMPRESSORS:
        raise ValueError(f"no compressor is called {name!r}; there are {', '.join(COMPRESSORS)}")
    return COMPRESSORS[name]
