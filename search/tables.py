"""Tables that a search looks up: per layer and width an error and a number of bytes.

Tensors, codecs and ranks end here. `measure` looks at the gradients once; whatever chooses bit widths
afterwards only looks numbers up.

Shapes: L layers, K widths, P assignments of a width to every layer. An assignment is a row of L column
indices into the tables (a `columns_L`); outside this package it is a row of L bit widths (`bits`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


Measure = Literal["root", "square", "loss"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


class MeasuredCodec(Protocol):
    """The two questions that the search asks a codec of one bit width."""

    def wire_bytes(self, count: int) -> int:
        """Exact length of a message of `count` values."""

    def expected_squared_error(self, values: Tensor, projected: bool = False) -> float:
        """E |v - Q(v)|^2, of the projection that error feedback encodes where `projected`."""


@dataclass(frozen=True, eq=False)
class Tables:
    """Every layer's error and encoded bytes at every width, validated on construction.

    layers       L names
    widths       K bit widths, ascending
    error        float64 [L, K], whose sum over the layers a search makes least; what it is of, `measure` says
    nbytes       int64 [L, K], encoded bytes, scales included
    dense_bytes  bytes of layers that are never compressed
    values       number of values of the whole model, compressed or not
    numel        L numbers of values; not needed to weigh errors against bytes
    measure      "root": the root of the expected squared L2 error; "square": that squared error; "loss": the measured
                 change of the loss, which may be negative
    norm2        sum of |m|^2, the squared norm of what the errors are errors of; 0 where it is not known

    Nothing asks that more bits mean less error or more bytes: codecs are free to disappoint.
    Raises ValueError where a shape or a value makes no sense, and names it.
    """

    layers: Sequence[str]
    widths: Sequence[int]
    error: Floats
    nbytes: Ints
    dense_bytes: int
    values: int
    numel: Sequence[int] = ()
    measure: Measure = "root"
    norm2: float = 0.0

    def __post_init__(self) -> None:
        own = {
            "layers": tuple(map(str, self.layers)),
            "widths": tuple(map(int, self.widths)),
            "error": _frozen(self.error, np.float64),
            "nbytes": _frozen(self.nbytes, np.int64),
            "dense_bytes": int(self.dense_bytes),
            "values": int(self.values),
            "numel": tuple(map(int, self.numel)),
            "norm2": float(self.norm2),
        }
        for field, value in own.items():
            object.__setattr__(self, field, value)
        shape = (len(self.layers), len(self.widths))
        if 0 in shape:
            raise ValueError(
                f"a search needs at least one compressed layer and one width, got {shape[0]} and {shape[1]}"
            )
        if len(set(self.layers)) < len(self.layers):
            raise ValueError("layers must have distinct names, got one of them twice")
        self._check_widths()
        for field in ("error", "nbytes"):
            found = getattr(self, field).shape
            if found != shape:
                raise ValueError(f"{field} must be [layers, widths] = {shape}, got {found}")
        if self.measure not in MEASURES:
            raise ValueError(f"a measure is one of {', '.join(MEASURES)}, got {self.measure!r}")
        if self.measure == "loss":
            self._check_entries("error", np.isfinite(self.error), "finite")
        else:
            self._check_entries("error", np.isfinite(self.error) & (self.error >= 0), "finite and not negative")
        self._check_entries("nbytes", self.nbytes > 0, "above 0")
        if self.dense_bytes < 0 or self.values < 1:
            raise ValueError(
                f"dense_bytes must be at least 0 and values above 0, got {self.dense_bytes} and {self.values}"
            )
        if not 0 <= self.norm2 < math.inf:
            raise ValueError(f"norm2 must be finite and not negative, got {self.norm2}")
        if self.numel and (len(self.numel) != len(self.layers) or min(self.numel) < 1):
            raise ValueError(f"numel must be above 0 for each of {shape[0]} layers, got {self.numel}")

    def _check_widths(self) -> None:
        if list(self.widths) != sorted(set(self.widths)) or not 1 <= self.widths[0] <= self.widths[-1] <= 8:
            raise ValueError(f"widths must ascend within 1 to 8 bits, got {list(self.widths)}")

    def _check_entries(self, field: str, good_LK: NDArray[np.bool_], rule: str) -> None:
        if not good_LK.all():
            layer, column = np.argwhere(~good_LK)[0]
            raise ValueError(
                f"{field} must be {rule}, got {getattr(self, field)[layer, column]} "
                f"for {self.layers[layer]} at {self.widths[column]} bits"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers: what files hold of tables."""
        return {
            "layers": list(self.layers),
            "numel": list(self.numel),
            **self._columns_to_json(),
            "error": self.error.tolist(),
            "nbytes": self.nbytes.tolist(),
            "dense_bytes": self.dense_bytes,
            "values": self.values,
            "measure": self.measure,
            "norm2": self.norm2,
        }

    def _columns_to_json(self) -> dict[str, Any]:
        """What the columns stand for."""
        return {"widths": list(self.widths)}

    def columns(self, bits: Sequence[int]) -> Ints:
        """Column indices [L] of L bit widths. Raises ValueError where a width is not in the tables."""
        if len(bits) != len(self.layers) or not set(bits) <= set(self.widths):
            raise ValueError(
                f"an assignment gives each of {len(self.layers)} layers one of the widths "
                f"{list(self.widths)}, got {list(bits)}"
            )
        return np.array([self.widths.index(b) for b in bits], dtype=np.int64)

    def bits(self, columns_L: Ints) -> tuple[int, ...]:
        """Bit widths of L column indices."""
        return tuple(self.widths[column] for column in columns_L)

    def totals(self, columns_PL: Ints) -> tuple[Floats, Ints]:
        """Total error [P] and encoded bytes [P] of P assignments."""
        rows = np.arange(len(self.layers))
        return self.error[rows, columns_PL].sum(axis=-1), self.nbytes[rows, columns_PL].sum(axis=-1)

    def total_error(self, bits: Sequence[int]) -> float:
        """E of one assignment, rounded once."""
        return math.fsum(self.error[np.arange(len(self.layers)), self.columns(bits)])

    def encoded_bytes(self, bits: Sequence[int]) -> int:
        """Bytes of the compressed layers under one assignment, scales included."""
        return int(self.totals(self.columns(bits))[1])

    def ratio(self, bits: Sequence[int]) -> float:
        """C of one assignment: all bytes sent over what float32 would take."""
        return (self.encoded_bytes(bits) + self.dense_bytes) / (4 * self.values)

    def bits_a_value(self, bits: Sequence[int]) -> float:
        """Encoded bits, scales included, for each value of the compressed layers. Needs `numel`."""
        if not self.numel:
            raise ValueError("bits a value need the layers' sizes, got Tables without numel")
        return 8 * self.encoded_bytes(bits) / sum(self.numel)


def measure(
    m: Mapping[str, Tensor],
    codec_at: Callable[[int], MeasuredCodec],
    widths: Sequence[int],
    dense_bytes: int,
    values: int,
    by: Measure = "root",
    *,
    projected: bool = False,
    nbytes_of: Callable[[str, int], int] | None = None,
    loss_of: Callable[[str, int], float] | None = None,
) -> Tables:
    """Calculate every layer's error and bytes once per width.

    m            layer name to what stands for its gradient, such as the running sum m = 0.8 m + g; any shape
    codec_at     bit width to codec
    widths       ascending bit widths
    dense_bytes  bytes of layers that are never compressed
    values       number of values of the whole model
    by           what an error is (`Tables.measure`)
    projected    whether error feedback is on, so that a projection is what travels
    nbytes_of    (layer, width) to the bytes that all ranks encode of it; without it, a message of one rank alone
    loss_of      with "loss": (layer, width) to the change of the loss

    A layer whose m is zero loses nothing at any width. Raises ValueError where m is not finite, naming the layer, and
    for "loss" without its changes.
    """
    check_finite(m)
    codecs = [codec_at(width) for width in widths]
    flat = {name: values_of_layer.detach().reshape(-1) for name, values_of_layer in m.items()}
    if by == "loss":
        if loss_of is None:
            raise ValueError("errors by loss need the loss of each layer and width, got none; give loss_of")
        error = [[loss_of(name, width) for width in widths] for name in flat]
    else:
        error = [[codec.expected_squared_error(row, projected) for codec in codecs] for row in flat.values()]
    return Tables(
        layers=tuple(m),
        widths=tuple(widths),
        error=np.sqrt(error) if by == "root" else np.array(error),
        nbytes=np.array(
            [
                [codec.wire_bytes(row.numel()) for codec in codecs]
                if nbytes_of is None
                else [nbytes_of(name, width) for width in widths]
                for name, row in flat.items()
            ]
        ),
        dense_bytes=dense_bytes,
        values=values,
        numel=tuple(row.numel() for row in flat.values()),
        measure=by,
        norm2=math.fsum(float(row.double().square().sum()) for row in flat.values()),
    )


def check_finite(m: Mapping[str, Tensor]) -> None:
    """Raise ValueError where m is not finite, naming the layer."""
    for name, values_of_layer in m.items():
        if not values_of_layer.isfinite().all():
            raise ValueError(f"the search's gradient must be finite, got NaN or infinity in {name}")


def _frozen(array: NDArray, dtype: type) -> NDArray:
    with np.errstate(invalid="ignore"):  # what is no number is found out when entries are checked
        copy: NDArray = np.array(array, dtype=dtype)
    copy.setflags(write=False)
    return copy
