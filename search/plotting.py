"""Pictures of searches: widths layer by layer, the plane of bytes and error, and widths over time.

All are drawn by Agg: no display, no global state.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from .fronts import Front, front
from .run import NAMES, SearchResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {
    "de": ("x", "tab:orange"),
    "optimum": ("o", "tab:green"),
    "budget": ("D", "tab:red"),
    "bytes": ("D", "tab:red"),
}
NAMED = 64  # ticks with layers' names that fit on an axis
LONGEST = 34  # characters of a name


def plot(result: SearchResult) -> bytes:
    """A PNG of one search.

    Left: each layer's bit width, as each way found it, and as installed, over the layer's number of values. Right:
    total error over ratio, with the front of all assignments and the uniform widths.
    """
    tables = result.tables
    figure = _figure(15, 6.5)
    left, plane = figure.subfigures(1, 2, width_ratios=(3, 2))
    by_layer, sizes = left.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    layers = np.arange(len(tables.layers))
    few = len(layers) <= 4 * NAMED
    by_layer.step(layers, result.installed, where="mid", color="0.6", label="installed", zorder=1, linewidth=1 if few else 0.3)
    for by, bits in result.found().items():
        marker, color = STYLES[by]
        by_layer.scatter(layers, bits, marker=marker, color=color, label=NAMES[by], s=24 if few else 2)
    by_layer.set(ylabel="bits", yticks=tables.widths)
    by_layer.grid(axis="y", color="0.92")
    by_layer.set_axisbelow(True)
    by_layer.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    sizes.fill_between(layers, tables.numel, step="mid", color="tab:blue", alpha=0.5, linewidth=0)
    sizes.set(ylabel="values", yscale="log")
    _name_layers(sizes, tables.layers, "x")
    _draw_front(plane.subplots(), front(tables, result.installed, result.bounds), result)
    return _png(figure)


def plot_front(result: SearchResult) -> bytes:
    """A PNG of the front of bytes against error, with uniform widths, what was found and what is installed."""
    figure = _figure(8, 6)
    _draw_front(figure.subplots(), front(result.tables, result.installed, result.bounds), result)
    return _png(figure)


def plot_bits_over_time(results: Mapping[str, SearchResult] | Sequence[SearchResult]) -> bytes:
    """A PNG of the widths installed by several searches of one model, layer by layer.

    results  when each search was to the search; a sequence is numbered from 0

    Raises ValueError where there is none, or where searches are of different layers.
    """
    from matplotlib.colors import BoundaryNorm

    named = results if isinstance(results, Mapping) else {str(row): result for row, result in enumerate(results)}
    first, *others = named.values() if named else [None]
    if first is None:
        raise ValueError("a picture of widths over time needs at least one search, got none")
    if any(other.tables.layers != first.tables.layers for other in others):
        raise ValueError("a picture of widths over time is of the same layers throughout, got different ones")
    layers = first.tables.layers
    bits_LT = np.array([result.installed for result in named.values()]).T
    widths = range(int(bits_LT.min()), int(bits_LT.max()) + 1)
    figure = _figure(min(16.0, 5 + 0.35 * len(named)), min(14.0, 3 + 0.17 * min(len(layers), NAMED)))
    axes = figure.subplots()
    norm = BoundaryNorm(np.arange(widths[0] - 0.5, widths[-1] + 1), 256)
    image = axes.imshow(bits_LT, aspect="auto", interpolation="nearest", norm=norm, cmap="viridis")
    figure.colorbar(image, ax=axes, ticks=list(widths), label="bits")
    _name_layers(axes, layers, "y")
    shown = _spread(len(named), 24)
    whens = list(named)
    axes.set_xticks(shown, [whens[column] for column in shown], rotation=90 if max(map(len, whens)) > 3 else 0)
    axes.set_xlabel("search after epoch")
    return _png(figure)


def _draw_front(plane: "Axes", reached: Front, result: SearchResult) -> None:
    tables, walk = reached.tables, reached.walk
    ratio_P = (walk.nbytes_P + tables.dense_bytes) / (4 * tables.values)
    plane.plot(ratio_P, walk.error_P, color="0.6", label="front of all assignments", zorder=1)
    for by, bits in result.found().items():
        marker, color = STYLES[by]
        style = {"marker": marker, "color": color, "label": NAMES[by], "zorder": 3}
        plane.scatter(tables.ratio(bits), tables.total_error(bits), **style)
    uniform = [(width,) * len(tables.layers) for width in tables.widths]
    points = [(tables.ratio(bits), tables.total_error(bits)) for bits in uniform]
    plane.plot(*zip(*points, strict=True), color="tab:blue", linestyle=":", linewidth=1, zorder=1)
    plane.scatter(*zip(*points, strict=True), marker="s", color="tab:blue", label="uniform widths", zorder=2)
    for width, point in zip(tables.widths, points, strict=True):
        plane.annotate(str(width), point, xytext=(5, 4), textcoords="offset points", color="tab:blue")
    installed = tables.ratio(result.installed), tables.total_error(result.installed)
    plane.scatter(*installed, marker="o", s=160, facecolors="none", edgecolors="black", label="installed", zorder=4)
    units = {"root": "total error", "square": "total squared error", "loss": "change of the loss"}
    plane.set(xlabel="bytes sent over float32's", ylabel=units[result.measure], xscale="log")
    _mark_ratios(plane, min(ratio_P[0], *(x for x, _ in points)), max(ratio_P[-1], *(x for x, _ in points)))
    if walk.error_P.min() > 0 and min(y for _, y in points) > 0:
        plane.set_yscale("log")
    plane.grid(color="0.92")
    plane.set_axisbelow(True)
    plane.legend()


def _mark_ratios(plane: "Axes", least: float, most: float) -> None:
    """Ticks with decimal fractions on a logarithmic axis of less than a decade or two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    fine = most / least < 30
    plane.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if fine else (1,)))
    plane.xaxis.set_minor_locator(NullLocator())
    plane.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:.3g}"))


def _name_layers(axes: "Axes", layers: Sequence[str], side: str) -> None:
    """Names of the layers on an axis: all of them where they fit, some at equal distances where they do not."""
    shown = _spread(len(layers), NAMED)
    names = [name if len(name) <= LONGEST else "..." + name[-LONGEST + 3 :] for name in (layers[row] for row in shown)]
    size = 8 if len(shown) <= 24 else 6
    if side == "x":
        axes.set_xticks(shown, names, rotation=90, fontsize=size)
        axes.set_xlim(-0.5, len(layers) - 0.5)
    else:
        axes.set_yticks(shown, names, fontsize=size)
    if len(shown) < len(layers):
        label = f"layers, {len(shown)} of {len(layers):,} named"
        (axes.set_xlabel if side == "x" else axes.set_ylabel)(label)


def _spread(count: int, most: int) -> list[int]:
    """At most so many whole numbers below `count`, at equal distances, from 0 on."""
    return list(range(0, count, -(-count // most)))


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # takes half a second, which only a search should pay

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: "Figure") -> bytes:
    png = BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
