"""Two schemes side by side, by the tables of one search."""

from collections.abc import Sequence

import numpy as np

from .layout import aligned, percent, size
from .run import UNITS
from .tables import Tables

MOST = 12  # layers that are shown one by one


def compare(tables: Tables, first: Sequence[int], second: Sequence[int], names: tuple[str, str]) -> str:
    """A page of text: what two assignments cost and lose, and the layers that differ most in bytes."""
    rows: list[Sequence[str]] = [("", "bits/value", "bytes", UNITS[tables.measure])]
    for name, bits in zip(names, (first, second), strict=True):
        nbytes = tables.encoded_bytes(bits) + tables.dense_bytes
        error = tables.total_error(bits)
        rows.append((name, f"{tables.bits_a_value(bits):.3f}", size(nbytes), f"{error:.4g}"))
    columns_2L = np.stack([tables.columns(first), tables.columns(second)])
    layers = np.arange(len(tables.layers))
    more_nbytes_L, more_error_L = (
        cells[layers, columns_2L[1]] - cells[layers, columns_2L[0]] for cells in (tables.nbytes, tables.error)
    )
    differ = np.flatnonzero(columns_2L[0] != columns_2L[1])
    lines = aligned(rows)
    if not len(differ):
        return "\n".join([*lines, "They give every layer the same width."])
    lines.append(f"{len(differ):,} of {len(layers):,} layers differ; most in bytes:")
    shown = differ[np.argsort(-np.abs(more_nbytes_L[differ]), kind="stable")][:MOST]
    table: list[Sequence[str]] = [("layer", "values", "bits", "MB more", "error more")]
    for row in shown:
        loses = f"{more_error_L[row]:+.3g}"
        change = f"{first[row]} -> {second[row]}"
        table.append((tables.layers[row], f"{tables.numel[row]:,}", change, f"{more_nbytes_L[row] / 1e6:+.3f}", loses))
    lines += aligned(table, left=1)
    if len(differ) > len(shown):
        share = percent(np.abs(more_nbytes_L[shown]).sum() / np.abs(more_nbytes_L[differ]).sum())
        lines.append(f"  and {len(differ) - len(shown):,} more; those shown make {share} of the difference in bytes")
    return "\n".join(lines)
