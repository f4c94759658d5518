"""A picture of a search: the widths layer by layer, and the plane of bytes and error that it moved in."""

from io import BytesIO

import numpy as np

from .hulls import hull_walk
from .run import NAMES, SearchResult

STYLES = {"de": ("x", "tab:orange"), "optimum": ("o", "tab:green"), "budget": ("D", "tab:red")}


def plot(result: SearchResult) -> bytes:
    """A PNG with two panels.

    Left: each layer's bit width, as each way found it, and as installed. Right: total error over ratio, with the
    hull of all assignments and the uniform widths. Drawn by Agg: no display, no global state.
    """
    from matplotlib.figure import Figure  # takes half a second, which only a search should pay

    tables = result.tables
    figure = Figure(figsize=(13, 5), layout="constrained")
    by_layer, plane = figure.subplots(1, 2, width_ratios=(3, 2))

    by_layer.step(
        range(len(tables.layers)),
        result.installed.bits,
        where="mid",
        color="0.6",
        label="installed",
        zorder=1,
    )
    error_P, nbytes_P = tables.totals(hull_walk(tables))
    ratio_P = (nbytes_P + tables.dense_bytes) / (4 * tables.values)
    plane.plot(ratio_P, error_P, color="0.6", label="hull of all assignments", zorder=1)

    for by, bits in result.found().items():
        marker, color = STYLES[by]
        style = {"marker": marker, "color": color, "label": NAMES[by]}
        by_layer.scatter(range(len(bits)), bits, **style)
        plane.scatter(tables.ratio(bits), tables.total_error(bits), zorder=3, **style)
    uniform = [(width,) * len(tables.layers) for width in tables.widths]
    points = [(tables.ratio(bits), tables.total_error(bits)) for bits in uniform]
    plane.scatter(*zip(*points, strict=True), marker="s", color="tab:blue", label="uniform widths")
    for width, point in zip(tables.widths, points, strict=True):
        plane.annotate(str(width), point, xytext=(5, 4), textcoords="offset points", color="tab:blue")

    by_layer.set(xlabel="layer, in the model's order", ylabel="bits", yticks=tables.widths)
    plane.set(xlabel="ratio of bytes to float32's", ylabel="total error", xscale="log")
    if np.all(error_P > 0):
        plane.set_yscale("log")
    by_layer.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    plane.legend()
    png = BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
