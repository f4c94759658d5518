"""The front of bytes against error: which totals assignments reach at best, as numbers to read and to draw."""

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .hulls import Walk
from .pins import Bounds, bounded
from .tables import Tables


@dataclass(frozen=True, eq=False)
class Front:
    """The lower left hull of all assignments' (bytes, E), with the uniform widths and what is installed.

    walk       its corners, from the fewest bytes to the least error
    installed  the layers' widths, where some are
    """

    tables: Tables
    walk: Walk
    installed: tuple[int, ...] | None

    def least_error(self, nbytes: int) -> float | None:
        """The error of the last corner that takes at most so many encoded bytes: some assignment reaches it."""
        corner = int(np.searchsorted(self.walk.nbytes_P, nbytes, side="right")) - 1
        return float(self.walk.error_P[corner]) if corner >= 0 else None

    def fewest_bytes(self, error: float) -> int | None:
        """The encoded bytes of the first corner that has at most so much error: some assignment reaches them."""
        corner = int(np.searchsorted(-self.walk.error_P, -error, side="left"))
        return int(self.walk.nbytes_P[corner]) if corner < len(self.walk.nbytes_P) else None

    def points(self) -> dict[str, tuple[int, float]]:
        """Encoded bytes and error of the uniform widths and of what is installed, by name."""
        tables = self.tables
        rows = {f"uniform {width}": (width,) * len(tables.layers) for width in tables.widths}
        if self.installed is not None:
            rows["installed"] = self.installed
        return {name: (tables.encoded_bytes(bits), tables.total_error(bits)) for name, bits in rows.items()}

    def to_json(self) -> dict[str, Any]:
        """Totals of every corner, and the step that leads to it: a layer and its width, none for the first."""
        tables, walk = self.tables, self.walk
        return {
            "start": tables.bits(walk.edges.start_L),
            "front": {
                "encoded_bytes": walk.nbytes_P.tolist(),
                "error": walk.error_P.tolist(),
                "layer": [None, *(tables.layers[layer] for layer in walk.edges.layer_M)],
                "bits": [None, *tables.bits(walk.edges.column_M)],
            },
            "points": {
                name: {"encoded_bytes": nbytes, "error": error} for name, (nbytes, error) in self.points().items()
            },
        }

    def to_csv(self) -> str:
        """A row for each corner, then one for each point. `layer` and `bits` are the step that leads to a corner."""
        tables, walk = self.tables, self.walk
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("kind", "encoded_bytes", "bits_a_value", "ratio", "error", "layer", "bits"))
        layers = ["", *(tables.layers[layer] for layer in walk.edges.layer_M)]
        bits = ["", *tables.bits(walk.edges.column_M)]
        values, dense_bytes, float32 = sum(tables.numel), tables.dense_bytes, 4 * tables.values
        corners = zip(walk.nbytes_P.tolist(), walk.error_P.tolist(), layers, bits, strict=True)
        points = ((nbytes, error, "", "", name) for name, (nbytes, error) in self.points().items())
        table.writerows(
            (kind, nbytes, 8 * nbytes / values, (nbytes + dense_bytes) / float32, error, layer, width)
            for nbytes, error, layer, width, kind in itertools.chain(((*corner, "front") for corner in corners), points)
        )
        return text.getvalue()


def front(tables: Tables, installed: Sequence[int] | None = None, bounds: Mapping[str, Bounds] | None = None) -> Front:
    """The front of these tables, with the layers' bounds kept.

    installed  the layers' widths, to stand beside it
    """
    walk = Walk.of(bounded(tables, bounds or {}))
    return Front(tables, walk, None if installed is None else tuple(installed))
