"""Draw up to eight runs in one PNG: a table, loss and top-1 over time and bytes, the parts of a step, bits by layer.

    python benchmarks/plot_run.py WORKSPACE/experiment_raport.json NAME=OTHER/experiment_raport.json ... -o runs.png

It reads raport files, and beside them the widths of a search. A run is called by its workspace, or by NAME. What a run
did not log is not drawn. Time is that of the training steps: start-up, validation and searches between epochs are not
in it. Time and bytes are summed over all epochs of a run, before and after a resume.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

from image_classification.logs import records
from search import SearchResult, load_scheme, load_search
from search.plotting import name_layers

Axes: TypeAlias = Any  # matplotlib's: it is imported where it draws
Figure: TypeAlias = Any
Epoch: TypeAlias = Mapping[str, Any]  # the metrics of an epoch that was trained, by name


class Style(NamedTuple):
    """The look of a run. No two share a dash pattern and a marker, so that gray prints tell them apart."""

    color: str
    dashes: Any
    marker: str


STYLES = (
    Style("#000000", "-", "o"),
    Style("#E69F00", "--", "s"),
    Style("#0072B2", "-.", "^"),
    Style("#009E73", ":", "D"),
    Style("#CC79A7", "-", "v"),
    Style("#56B4E9", "--", "P"),
    Style("#D55E00", "-.", "X"),
    Style("#999999", ":", "<"),
)
"""The palette of Okabe and Ito (2008), made for color blindness, with R's gray for yellow, which white swallows."""

PARTS = {
    "step.data_time": ("data", "#F0E442"),
    "step.compute_time": ("forward, backward, optimizer", "#0072B2"),
    "step.exchange_time": ("exchange not hidden", "#E69F00"),
}
"""The parts of `step.time`: they add up to it. Neighbors differ in luminance."""

BESIDE = {"codec.time": ("codec", "#009E73", "////"), "comm.time": ("network", "#D9D9D9", "....")}
"""What the communication thread does meanwhile: most of it passes beside backward, and adds nothing to a step."""

LOSSES = {"val.loss": "validation", "train.loss": "training"}

SECONDS = ((1e-3, "ms"), (1.0, "s"), (60.0, "min"), (3600.0, "h"))
BYTES = ((1.0, "bytes"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB"))


class Axis(NamedTuple):
    """A cost that curves are drawn over: the metric of a step, and its units."""

    title: str
    metric: str
    units: Sequence[tuple[float, str]]


TIME = Axis("time of training", "step.time", SECONDS)
SENT = Axis("sent by a rank", "comm.bytes_sent", BYTES)


class Run(NamedTuple):
    """One run: its name, its trained epochs in order, and the widths in use at its end, by layer, if it has any."""

    name: str
    epochs: Sequence[Epoch]
    widths: Mapping[str, int]

    def last(self, metric: str) -> float | None:
        """The last value of a metric; None where the last epoch has none."""
        value: float | None = self.epochs[-1].get(metric)
        return value


# What is in the files


def read_run(name: str, path: Path) -> Run:
    """A run of a raport file. Raises OSError or ValueError, in one line, where a file cannot be read or drawn."""
    raport = records(path)
    by_number = trained_epochs(raport)
    epochs = list(by_number.values())
    if not epochs:
        raise ValueError(f"{path} holds no metrics to draw; choose the raport file of a training run")
    if list(by_number) != list(range(len(epochs))):
        raise ValueError(f"{path} lacks epochs before {max(by_number)}, and sums are from epoch 0 on; "
                         "resume in the workspace that the run began in")  # fmt: skip
    if not all(epoch.get("step.count") and epoch.get("step.time") for epoch in epochs):
        raise ValueError(f"{path} tells no step.count and step.time of each epoch; choose a run of this version")
    return Run(name, epochs, widths_in_use(raport, path.parent))


def trained_epochs(raport: Sequence[Mapping[str, Any]]) -> dict[int, Epoch]:
    """The metrics of each trained epoch by its number, in order. Of one that is told of twice the last ones count."""
    whole = {
        record["step"][0]: record["data"]
        for record in raport if isinstance(record["step"], list) and len(record["step"]) == 1
    }
    return {epoch: data for epoch, data in sorted(whole.items()) if "train.loss" in data}


def widths_in_use(raport: Sequence[Mapping[str, Any]], workspace: Path) -> dict[str, int]:
    """Bits by layer, in the model's order, that the last search of a run installed, else those of its scheme.

    The scheme's layers are in the order of the search beside it. None where a run had neither, or the file is gone.
    Files that are older than the raport are an earlier run's. Raises ValueError, in one line, for a damaged file.
    """
    told = [record for record in raport if record["step"] == "PARAMETER"]
    flags = told[-1]["data"] if told else {}
    if flags.get("search"):
        files = workspace.glob("adapt_logs/search_*.json")
        began = float(told[0]["timestamp"])
        found = [load_search(file) for file in files if file.stat().st_mtime >= began]
        if found:
            return max(found, key=_when).bits_by_layer()
    scheme = Path(flags.get("compression_scheme") or "")
    beside = scheme.with_name(scheme.name.replace("compress_scheme_", "search_")) if scheme.name else scheme
    if beside != scheme and scheme.is_file() and beside.is_file():
        return load_scheme(scheme, load_search(beside).tables.layers)
    return {}


def _when(result: SearchResult) -> tuple[int, int]:
    return result.settings.get("epoch", 0), result.settings.get("iteration", 0)


# What is drawn of them


def totals(epochs: Sequence[Epoch], metric: str) -> list[float]:
    """The sum of a metric of steps from the first one to the end of each epoch; none where an epoch lacks it."""
    if any(epoch.get(metric) is None for epoch in epochs):
        return []
    return list(accumulate(epoch[metric] * epoch["step.count"] for epoch in epochs))


def mean_of_steps(epochs: Sequence[Epoch], metric: str) -> float | None:
    """The mean of a metric over all steps of a run; None where an epoch lacks it."""
    sums = totals(epochs, metric)
    return sums[-1] / sum(epoch["step.count"] for epoch in epochs) if sums else None


def median_epoch(epochs: Sequence[Epoch]) -> Epoch:
    """The epoch whose steps took the median time, the shorter of two: kernels are compiled in the first one's."""
    return sorted(epochs, key=lambda epoch: epoch["step.time"])[(len(epochs) - 1) // 2]


def parts_of_step(epoch: Epoch) -> dict[str, float]:
    """Seconds of the parts of a step that were logged: they add up to `step.time`."""
    return {name: epoch[name] for name in PARTS if name in epoch}


def beside_step(epoch: Epoch) -> dict[str, float]:
    """Seconds of a step in which the communication thread is busy. None where no clock saw what of it was hidden."""
    return {name: epoch[name] for name in BESIDE if name in epoch} if "step.exchange_time" in epoch else {}


def curve(run: Run, metric: str, axis: Axis) -> list[tuple[float, float]]:
    """(sum of the axis, metric) after each epoch that has a finite one. None where nothing was sent."""
    sums = totals(run.epochs, axis.metric)
    if not sums or sums[-1] == 0:
        return []
    return [(x, epoch[metric]) for x, epoch in zip(sums, run.epochs, strict=True) if epoch.get(metric) is not None]


def ratio_of(run: Run) -> float | None:
    """Bytes over those of float32; None for a lone process that encodes nothing, either."""
    ratio = mean_of_steps(run.epochs, "comm.ratio")
    return None if ratio == 1 and not mean_of_steps(run.epochs, "comm.bytes_sent") else ratio


def loss_of(runs: Sequence[Run]) -> str:
    """The loss to compare: in validation where every run has one. Label smoothing and mixup are in that of training."""
    return "val.loss" if all(curve(run, "val.loss", TIME) for run in runs) else "train.loss"


def unit_of(most: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit of which there are three at least, as its size and its name; else the smallest."""
    return max([units[0], *(unit for unit in units if unit[0] * 3 <= most)])


def table_of(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each run: at the end of the run, over all of it, and in its median epoch."""
    size = {axis: unit_of(max((sums[-1] for run in runs if (sums := totals(run.epochs, axis.metric))), default=0.0),
                          axis.units) for axis in (TIME, SENT)}  # fmt: skip
    step_size, step_unit = unit_of(max(median_epoch(run.epochs)["step.time"] for run in runs), SECONDS)
    loss = loss_of(runs)
    columns: dict[str, Callable[[Run], str]] = {
        "top-1": lambda run: _number(run.last("val.top1"), 1.0, ".2f", " %"),
        f"{LOSSES[loss]} loss": lambda run: _number(run.last(loss), 1.0, ".4f"),
        f"time, {size[TIME][1]}": lambda run: _total(run, TIME, size[TIME][0]),
        f"step, {step_unit}": lambda run: _number(median_epoch(run.epochs)["step.time"], step_size),
        f"sent by a rank, {size[SENT][1]}": lambda run: _total(run, SENT, size[SENT][0]),
        "of float32's bytes": lambda run: _number(ratio_of(run), 0.01, unit=" %"),
    }
    rows = [[cell(run) for cell in columns.values()] for run in runs]
    logged = [column for column in range(len(columns)) if any(row[column] for row in rows)]
    return [list(columns)[column] for column in logged], [[row[column] for column in logged] for row in rows]


def _total(run: Run, axis: Axis, size: float) -> str:
    sums = totals(run.epochs, axis.metric)
    return _number(sums[-1] if sums and sums[-1] else None, size)


def _number(value: float | None, size: float, form: str | None = None, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value / size:{form or ('.3g' if value < 999.5 * size else ',.0f')}}{unit}"


# Drawing. Agg does it: no display needed


def draw(runs: Sequence[Run]) -> Figure:
    """The table, the curves, the bars and the widths.

    Raises ValueError for more runs than can be told apart, and where no curve has a point.
    """
    if len(runs) > len(STYLES):
        raise ValueError(f"one picture tells up to {len(STYLES)} runs apart, got {len(runs)}; draw several pictures")
    from matplotlib import figure as matplotlib_figure

    loss = loss_of(runs)
    panels = [
        (metric, axis)
        for metric in (loss, "val.top1") for axis in (TIME, SENT) if any(curve(run, metric, axis) for run in runs)
    ]
    searched = [run for run in runs if run.widths]
    if not panels:
        raise ValueError("no epoch of any run has a loss or top-1 that is a number; choose runs that did not diverge")
    columns = 2 if len(panels) > 1 or searched else 1
    lines = -(-len(panels) // columns)
    heights = (0.5 + 0.3 * len(runs), 3.4 * lines, (3.6 if searched else 1.8) + 0.45 * len(runs))
    figure = matplotlib_figure.Figure(figsize=(7 * columns, sum(heights)), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_table(top.subplots(), runs, 14 if columns == 2 else 7)
    places = list(middle.subplots(lines, min(columns, len(panels)), squeeze=False).flat)
    for axes, panel in zip(places, panels, strict=False):
        _draw_curves(axes, runs, *panel)
    for axes in places[len(panels) :]:
        axes.remove()
    left, *right = bottom.subfigures(1, 2 if searched else 1, squeeze=False)[0]
    _draw_steps(left, runs)
    if right:
        _draw_widths(right[0].subplots(), searched)
    return figure


def shorten(name: str, most: int) -> str:
    """A name of so many characters at most, without its middle: what tells names apart is at either end."""
    half = (most - 3) // 2
    return name if len(name) <= most else f"{name[: most - 3 - half]}...{name[-half:]}"


def _look(style: Style) -> dict[str, Any]:
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.5, "markersize": 8}
    return {"color": style.color, "linestyle": style.dashes, "marker": style.marker, "linewidth": 1.8, **edge}


def _draw_table(axes: Axes, runs: Sequence[Run], inches: int) -> None:
    """A row for each run, which is the legend of the curves too."""
    headings, rows = table_of(runs)
    size, longest, widest = (10, 56, 0.40) if inches > 7 else (8, 26, 0.30)
    axes.set(xlim=(0, 1), ylim=(len(runs) + 0.1, -0.6))
    axes.axis("off")
    ends = [widest + (1 - widest) * (column + 1) / len(headings) for column in range(len(headings))]
    for end, heading in zip(ends, headings, strict=True):
        axes.text(end, 0, heading, ha="right", va="center", fontsize=size - 1, color="0.35")
    for number, (run, row) in enumerate(zip(runs, rows, strict=True)):
        y = number + 0.9
        axes.plot([0.005, 0.03, 0.055], [y] * 3, markevery=[1], clip_on=False, **_look(STYLES[number]))
        axes.text(0.07, y, shorten(run.name, longest), va="center", fontsize=size, parse_math=False)
        for end, cell in zip(ends, row, strict=True):
            axes.text(end, y, cell or "-", ha="right", va="center", fontsize=size)


def _draw_curves(axes: Axes, runs: Sequence[Run], metric: str, axis: Axis) -> None:
    curves = {number: points for number, run in enumerate(runs) if (points := curve(run, metric, axis))}
    size, unit = unit_of(max(x for points in curves.values() for x, _ in points), axis.units)
    for number, points in curves.items():
        axes.plot([x / size for x, _ in points], [y for _, y in points], **_look(STYLES[number]))
    axes.set_xlabel(f"{axis.title}, {unit}")
    if metric == "val.top1":
        axes.set(title="top-1 in validation", ylabel="%")
    else:
        axes.set(title=f"loss in {LOSSES[metric]}", ylabel="logarithmic")
        _scale_logarithmically(axes, "y", [y for points in curves.values() for _, y in points])
    a_step = [mean_of_steps(runs[number].epochs, axis.metric) or 0.0 for number in curves]
    if max(a_step) > 5 * min(a_step):
        _scale_logarithmically(axes, "x", [x / size for points in curves.values() for x, _ in points])
        axes.set_xlabel(f"{axis.title}, {unit}, logarithmic")
    else:
        axes.set_xlim(0, 1.06 * max(points[-1][0] for points in curves.values()) / size)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)


def _scale_logarithmically(axes: Axes, side: str, values: Sequence[float]) -> None:
    """A logarithmic axis, with ticks that are read at a glance where it is less than a decade or two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    positive = [value for value in values if value > 0]
    if not positive:
        return
    spread = max(positive) / min(positive)
    subs = (1, 2, 3, 5, 7) if spread < 10 else (1, 2, 5) if spread < 300 else (1,)
    (axes.set_xscale if side == "x" else axes.set_yscale)("log", nonpositive="mask")
    ticks = axes.xaxis if side == "x" else axes.yaxis
    ticks.set_major_locator(MaxNLocator(4) if spread < 5 else LogLocator(subs=subs))
    ticks.set_minor_locator(NullLocator())
    margin = max(1.1, spread**0.06)
    (axes.set_xlim if side == "x" else axes.set_ylim)(min(positive) / margin, max(positive) * margin)
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def _draw_steps(figure: Figure, runs: Sequence[Run]) -> None:
    """Two bars for each run: the parts of a step, and below, hatched, what the communication thread does meanwhile.

    The lower one ends where the step ends, or begins with it. Only the lengths are measured.
    """
    from matplotlib.patches import Patch

    axes = figure.subplots()
    epochs = [median_epoch(run.epochs) for run in runs]
    size, unit = unit_of(max(epoch["step.time"] for epoch in epochs), SECONDS)
    seen: dict[str, Any] = {}
    for row, epoch in enumerate(epochs):
        end = 0.0
        for name, seconds in parts_of_step(epoch).items():
            title, color = PARTS[name]
            axes.barh(row - 0.14, seconds / size, 0.4, left=end / size, color=color, edgecolor="black", linewidth=0.6)
            seen[title] = Patch(facecolor=color, edgecolor="black", linewidth=0.6)
            end += seconds
        busy = beside_step(epoch)
        end = max(0.0, epoch["step.time"] - sum(busy.values()))
        for name, seconds in busy.items():
            title, color, hatch = BESIDE[name]
            look: dict[str, Any] = {"facecolor": color, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}
            axes.barh(row + 0.2, seconds / size, 0.24, left=end / size, **look)
            seen[f"{title}, at the same time"] = Patch(**look)
            end += seconds
    axes.set_yticks(range(len(runs)), [shorten(run.name, 24) for run in runs], parse_math=False)
    axes.set(title="where a step's time goes", xlabel=f"{unit} a step, in the run's median epoch")
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _draw_widths(axes: Axes, runs: Sequence[Run]) -> None:
    """A row for each run, a column for each layer, colored by bits: darker is fewer."""
    import numpy as np
    from matplotlib.colors import BoundaryNorm

    most = max(len(run.widths) for run in runs)
    bits = np.full((len(runs), most), np.nan)
    for row, run in enumerate(runs):
        bits[row, : len(run.widths)] = list(run.widths.values())
    widths = range(int(np.nanmin(bits)), int(np.nanmax(bits)) + 1)
    norm = BoundaryNorm(np.arange(widths[0] - 0.5, widths[-1] + 1), 256)
    image = axes.imshow(bits, aspect="auto", interpolation="nearest", norm=norm, cmap="viridis")
    axes.figure.colorbar(image, ax=axes, ticks=list(widths), label="bits")
    axes.set_yticks(range(len(runs)), [shorten(run.name, 24) for run in runs], parse_math=False)
    axes.set_yticks(np.arange(len(runs) - 1) + 0.5, minor=True)
    axes.grid(which="minor", axis="y", color="white", linewidth=3)
    axes.tick_params(axis="y", which="both", length=0)
    axes.set_title("bits by layer at the end")
    if len({tuple(run.widths) for run in runs}) == 1:
        name_layers(axes, list(runs[0].widths), "x", most=24)
    else:
        axes.set_xlabel("number of the layer, from the input on")


# The command line


def named(argument: str) -> tuple[str, Path]:
    """Name and path of a run that is given as NAME=PATH, or as PATH alone: then its workspace's name is its name."""
    name, equals, path = argument.partition("=")
    if equals and not Path(argument).is_file():
        return name, Path(path)
    return Path(argument).resolve().parent.name, Path(argument)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raports", metavar="[NAME=]RAPORT", nargs="+", type=named, help="raport file of a run")
    parser.add_argument("-o", "--output", metavar="PNG", type=Path, required=True, help="picture to write")
    arguments = parser.parse_args(argv)
    try:
        [(name, times)] = Counter(name for name, _ in arguments.raports).most_common(1)
        if times > 1:
            raise ValueError(f"runs are told apart by their names, and {times} are called {name!r}; give NAME=RAPORT")
        figure = draw([read_run(name, path) for name, path in arguments.raports])
        figure.savefig(arguments.output, format="png", dpi=110)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_run.py: error: {error}")


if __name__ == "__main__":
    main()
