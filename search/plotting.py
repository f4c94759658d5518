"""Pictures of searches: widths layer by layer, the plane of bytes and error, and widths over time.

All are drawn by Agg: no display, no global state.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .fronts import Front, front
from .run import NAMES, UNITS, SearchResult

Axes: TypeAlias = Any  # matplotlib's: it is imported where it draws
Figure: TypeAlias = Any
STYLES = {
    "de": ("x", "tab:orange"),
    "optimum": ("o", "tab:green"),
    "budget": ("D", "tab:red"),
    "bytes": ("D", "tab:red"),
    "time": ("D", "tab:red"),
}
SINGLE = 256  # layers that can be seen one by one
NAMED = 64  # ticks with layers' names that fit on an axis
LONGEST = 34  # characters of a name


def plot(result: SearchResult) -> bytes:
    """A PNG of one search: `draw` says what is in it."""
    return _png(draw(result))


def draw(result: SearchResult) -> Figure:
    """Widths by layer, and the plane of bytes and error.

    Left: each layer's bit width, as each way found it, and as installed, over the layer's number of values; of
    hundreds of layers, the share of each width among neighbors. Right: total error over ratio, with the front of
    all assignments and the uniform widths.
    """
    tables = result.tables
    figure = _figure(15, 6.5)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(3, 2))[0]
    by_layer, sizes = left.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    if len(tables.layers) <= SINGLE:
        _draw_layers(by_layer, result)
        edges = np.arange(len(tables.layers) + 1) - 0.5
        sizes.stairs(tables.numel, edges, baseline=min(tables.numel) / 2, fill=True, color="tab:blue", alpha=0.5)
    else:
        edges = _draw_shares(by_layer, result)
        sums = np.add.reduceat(np.array(tables.numel), edges[:-1].astype(np.int64))
        sizes.stairs(sums, edges - 0.5, baseline=sums.min() / 2, fill=True, color="tab:blue", alpha=0.5)
    by_layer.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=8, frameon=False)
    sizes.set(ylabel="values", yscale="log")
    name_layers(sizes, tables.layers, "x")
    _draw_front(right.subplots(), front(tables, result.installed, result.bounds), result)
    return figure


def plot_front(result: SearchResult) -> bytes:
    """A PNG of the front of bytes against error, with uniform widths, what was found and what is installed."""
    figure = _figure(8, 6)
    _draw_front(figure.subplots(), front(result.tables, result.installed, result.bounds), result)
    return _png(figure)


def plot_bits_over_time(results: Mapping[str, SearchResult] | Sequence[SearchResult]) -> bytes:
    """A PNG of the widths that several searches installed: `draw_bits_over_time` says what is in it."""
    return _png(draw_bits_over_time(results))


def draw_bits_over_time(results: Mapping[str, SearchResult] | Sequence[SearchResult]) -> Figure:
    """The widths installed by several searches of one model, layer by layer.

    results  when each search was to the search; a sequence is numbered from 0

    Raises ValueError where there is none, or where searches are of different layers.
    """
    from matplotlib.colors import BoundaryNorm

    named = results if isinstance(results, Mapping) else {str(row): result for row, result in enumerate(results)}
    if not named:
        raise ValueError("a picture of widths over time needs at least one search, got none")
    first, *others = named.values()
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
    name_layers(axes, layers, "y")
    shown = _spread(len(named), 24)
    whens = list(named)
    axes.set_xticks(shown, [whens[column] for column in shown], rotation=90 if max(map(len, whens)) > 3 else 0)
    axes.set_xlabel("search after epoch")
    return figure


def _draw_layers(axes: Axes, result: SearchResult) -> None:
    """A mark for each layer and finder, and a line through what is installed."""
    tables = result.tables
    layers = np.arange(len(tables.layers))
    edges = np.arange(len(layers) + 1) - 0.5
    axes.stairs(result.installed, edges, baseline=None, color="0.6", label="installed", zorder=1)
    for by, bits in result.found().items():
        marker, color = STYLES[by]
        axes.scatter(layers, bits, marker=marker, color=color, label=NAMES[by], s=24 if len(layers) <= NAMED else 6)
    axes.set(ylabel="bits", yticks=tables.widths, ylim=(tables.widths[0] - 0.5, tables.widths[-1] + 0.5))
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)


def _draw_shares(axes: Axes, result: SearchResult) -> NDArray:
    """The share of each width among neighbors, where layers are too many to be seen one by one. Their limits."""
    from matplotlib import colormaps

    installed_L = np.array(result.installed)
    edges = np.unique(np.linspace(0, len(installed_L), SINGLE // 2 + 1).astype(np.int64))
    floor = np.zeros(len(edges) - 1)
    widths = np.unique(installed_L).tolist()
    for width, color in zip(widths, colormaps["viridis"](np.linspace(0, 1, len(widths))), strict=True):
        share = np.add.reduceat(installed_L == width, edges[:-1], dtype=np.float64) / np.diff(edges)
        axes.stairs(floor + share, edges - 0.5, baseline=floor, fill=True, color=color, label=f"{width} bits")
        floor = floor + share
    axes.set(ylabel="share of neighboring layers, as installed", ylim=(0, 1))
    return edges


def _draw_front(plane: Axes, reached: Front, result: SearchResult) -> None:
    tables, walk = reached.tables, reached.walk
    ratio_P = (walk.nbytes_P + tables.dense_bytes) / (4 * tables.values)
    plane.plot(ratio_P, walk.error_P, color="0.6", label="front of all assignments", zorder=1)
    for by, bits in result.found().items():
        marker, color = STYLES[by]
        style: dict[str, Any] = {"marker": marker, "color": color, "label": NAMES[by], "zorder": 3}
        plane.scatter(tables.ratio(bits), tables.total_error(bits), **style)
    uniform = [(width,) * len(tables.layers) for width in tables.widths]
    points = [(tables.ratio(bits), tables.total_error(bits)) for bits in uniform]
    plane.plot(*zip(*points, strict=True), color="tab:blue", linestyle=":", linewidth=1, zorder=1)
    plane.scatter(*zip(*points, strict=True), marker="s", color="tab:blue", label="uniform widths", zorder=2)
    for width, point in zip(tables.widths, points, strict=True):
        plane.annotate(str(width), point, xytext=(5, 4), textcoords="offset points", color="tab:blue")
    installed = tables.ratio(result.installed), tables.total_error(result.installed)
    plane.scatter(*installed, marker="o", s=160, facecolors="none", edgecolors="black", label="installed", zorder=4)
    plane.set(xlabel="bytes sent over float32's", ylabel=UNITS[result.tables.measure], xscale="log")
    _mark_ratios(plane, min(ratio_P[0], *(x for x, _ in points)), max(ratio_P[-1], *(x for x, _ in points)))
    if walk.error_P.min() > 0 and min(y for _, y in points) > 0:
        plane.set_yscale("log")
    plane.grid(color="0.92")
    plane.set_axisbelow(True)
    plane.legend()


def _mark_ratios(plane: Axes, least: float, most: float) -> None:
    """Ticks with decimal fractions on a logarithmic axis of less than a decade or two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    fine = most / least < 30
    plane.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if fine else (1,)))
    plane.xaxis.set_minor_locator(NullLocator())
    plane.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:.3g}"))


def name_layers(axes: Axes, layers: Sequence[str], side: str, most: int = NAMED) -> None:
    """Names of the layers on an axis: all of them where they fit, some at equal distances where they do not."""
    shown = _spread(len(layers), most)
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


def _figure(width: float, height: float) -> Figure:
    from matplotlib import figure  # takes half a second, which only a search should pay

    return figure.Figure(figsize=(width, height), layout="constrained")


def _png(figure: Figure) -> bytes:
    png = BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
