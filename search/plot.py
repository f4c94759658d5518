"""A picture of a search: the widths layer by layer, and the plane of bytes and error that it moved in."""

from pathlib import Path

import numpy as np

from search.optimum import hull_walk
from search.run import SearchResult


def plot(result: SearchResult, path: str | Path) -> None:
    """Write a PNG with two panels, whole or not at all.

    Left: each layer's bit width, from evolution, from the optimum, and installed. Right: total error over ratio; the
    hull of all assignments, the uniform widths, and the three. Draws on Agg: no display, no global state.
    """
    from matplotlib.figure import Figure  # takes half a second, which only a search should pay

    tables = result.tables
    figure = Figure(figsize=(13, 5), layout="constrained")
    by_layer, plane = figure.subplots(1, 2, width_ratios=(3, 2))

    chosen = {"differential evolution": (result.de.bits, "x", "tab:orange", 40)}
    chosen["optimum"] = (result.optimum.bits, "o", "tab:green", 40)
    if result.budget is not None:
        chosen["least error in budget"] = (result.budget.bits, "D", "tab:red", 25)
    by_layer.step(
        range(len(tables.layers)),
        result.installed.bits,
        where="mid",
        color="0.6",
        label="installed",
        zorder=1,
    )
    error_P, nbytes_P = tables.totals(hull_walk(tables))
    plane.plot(
        (nbytes_P + tables.dense_bytes) / (4 * tables.values),
        error_P,
        color="0.6",
        label="hull of all",
        zorder=1,
    )
    for name, (bits, marker, color, size) in chosen.items():
        by_layer.scatter(range(len(bits)), bits, size, color, marker, label=name)
        plane.scatter(tables.ratio(bits), tables.total_error(bits), size, color, marker, label=name, zorder=3)
    for width in tables.widths:
        uniform = (width,) * len(tables.layers)
        point = tables.ratio(uniform), tables.total_error(uniform)
        plane.scatter(
            *point, 25, "tab:blue", "s", label="uniform widths" if width == tables.widths[0] else None
        )
        plane.annotate(str(width), point, xytext=(5, 4), textcoords="offset points", color="tab:blue")

    by_layer.set(xlabel="layer, in the model's order", ylabel="bits", yticks=tables.widths)
    plane.set(xlabel="ratio of bytes to float32's", ylabel="total error", xscale="log")
    if np.all(error_P > 0):
        plane.set_yscale("log")
    by_layer.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    plane.legend()
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    figure.savefig(beside, format="png", dpi=120)
    beside.replace(path)
