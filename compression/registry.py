"""The registry: every compressor's name, and how to build it. The only list of compressor names.

The command line's choices, the tests and the documentation read it. A new compressor is one file (or one class in
its family's file) and one row here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from compression.averagers import Averager, Dense, LowRank, Sanity, TwoHop, WarmUp
from compression.codecs.quantizers import MaxMin, Quantizer
from compression.collectives import Collectives
from compression.layers import Layer

Build = Callable[["Options", Sequence[Layer], Collectives, int], Averager]


@dataclass(frozen=True)
class Options:
    """Every option that some compressor takes; each takes those that its row names.

    `warmup_steps`: optimizer steps in float32 before compression begins. `rank`: of a layer as a product of factors.
    """

    bits: int = 4
    bucket_size: int = 512
    error_feedback: bool = False
    warmup_steps: int = 0
    rank: int = 4


@dataclass(frozen=True)
class Row:
    """One compressor: what it is, the options it takes, how its averager and its codec are built.

    `listed`: among the choices of --compression-type; the others have a flag of their own.
    """

    summary: str
    takes: tuple[str, ...]
    average: Build
    quantizer: type[Quantizer] | None = None
    listed: bool = True

    @property
    def has_bits(self) -> bool:
        """Whether its bit width can be chosen, per layer too, and so searched for."""
        return self.quantizer is not None

    @property
    def min_bits(self) -> int:
        return self.quantizer.min_bits if self.quantizer is not None else 0


def _quantized(quantizer: type[Quantizer]) -> Build:
    def average(options: Options, layers: Sequence[Layer], collectives: Collectives, seed: int) -> Averager:
        codec = quantizer(options.bits, options.bucket_size)
        return TwoHop(codec, layers, collectives, seed, options.error_feedback)

    return average


def _powersgd(options: Options, layers: Sequence[Layer], collectives: Collectives, seed: int) -> Averager:
    return LowRank(options.rank, layers, collectives, seed)


_QUANTIZER = ("bits", "bucket_size", "error_feedback", "warmup_steps")

COMPRESSORS: dict[str, Row] = {
    "none": Row("float32 all-reduce", (), lambda options, layers, collectives, seed: Dense(collectives)),
    "sanity": Row("sends nothing, every gradient is zero", (), lambda options, layers, collectives, seed: Sanity()),
    "maxmin": Row("uniform levels between minimum and maximum", _QUANTIZER, _quantized(MaxMin), MaxMin),
    "powersgd": Row(
        "two thin factors of each layer, warm-started, always with error feedback",
        ("rank", "bucket_size", "warmup_steps"),
        _powersgd,
        listed=False,
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

    def averager(self, layers: Sequence[Layer], collectives: Collectives, seed: int) -> Averager:
        """Bind to layers and ranks."""
        inner = COMPRESSORS[self.name].average(self.options, layers, collectives, seed)
        if self.options.warmup_steps == 0:
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
        row.quantizer(compressor.options.bits, compressor.options.bucket_size)
    if compressor.options.warmup_steps < 0:
        raise ValueError(f"warmup_steps counts optimizer steps, got {compressor.options.warmup_steps}")
    if compressor.options.rank < 1:
        raise ValueError(f"rank counts the columns of a factor, at least 1, got {compressor.options.rank}")
    return compressor


def codec(name: str, **options: Any) -> Quantizer:
    """The codec of a compressor's name: `codec("maxmin", bits=4, bucket_size=512)`.

    Raises ValueError for a name that has no codec of its own.
    """
    row = _row(name)
    if row.quantizer is None:
        raise ValueError(f"compressor {name} has no codec; those with one: {', '.join(with_bits())}")
    return row.quantizer(**{"bits": Options.bits, **options})


def with_bits() -> list[str]:
    """Names of the compressors whose bit width can be chosen."""
    return [name for name, row in COMPRESSORS.items() if row.has_bits]


def _row(name: str) -> Row:
    if name not in COMPRESSORS:
        raise ValueError(f"no compressor is called {name!r}; there are {', '.join(COMPRESSORS)}")
    return COMPRESSORS[name]
