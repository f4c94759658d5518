"""Error against bits: a picture of what every compressor keeps of a gradient, by what it sends for a value.

    python benchmarks/error_against_bits.py -o docs/error_against_bits.png

Measured as in `fidelity.py`, each compressor at more settings: one encoding, from a fresh start, of normal numbers and
of a gradient of resnet18. What sends every value in float32 has no error, and what sends nothing has an error of 1:
these are lines at the edges.
"""

import argparse
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
from torch import Tensor

from benchmarks.fidelity import NORMAL, fidelity, real_gradients
from benchmarks.search import machine
from compression import COMPRESSORS

# Values of the option that sets how much is sent; the first one that a compressor takes has its own kind of line.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "bits": (1, 2, 3, 4, 5, 6, 7, 8),
    "ratio": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    "rank": (1, 2, 4, 8, 16, 32),
    "dense_dtype": ("bfloat16",),
}
LINES = {"bits": "-", "ratio": "--", "rank": ":", "dense_dtype": "none"}
# Told apart by the shape and the fill of markers and the kind of line, so that no color is needed to read the picture.
MARKERS = "osD^vX*P<>phd8"
COLORS = ("#000000", "#D55E00", "#56B4E9", "#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito

Points = Mapping[str, list[tuple[float, float]]]
"""(bits per value, relative error) of each compressor, by its name."""


def option_of(name: str) -> str:
    """The option that sets how much a compressor sends."""
    return next(option for option in SETTINGS if option in COMPRESSORS[name].takes)


def drawn() -> list[str]:
    """The compressors that have points: those that send something, and not all of it in float32."""
    return [name for name, row in COMPRESSORS.items() if row.encodes or "dense_dtype" in row.takes]


def measure(gradient: Mapping[str, Tensor]) -> Points:
    """The points of every compressor on a gradient; where its options leave nothing to set, one point."""
    points = {}
    for name in drawn():
        option, least = option_of(name), COMPRESSORS[name].min_bits
        settings: list[dict[str, Any]] = [{option: v} for v in SETTINGS[option] if option != "bits" or v >= least]
        if option == "dense_dtype" and COMPRESSORS[name].encodes:
            settings = [{}]
        points[name] = [fidelity(name, options, gradient) for options in settings]
    return points


def draw(measured: Mapping[str, Points], path: Path) -> None:
    """Write a PNG with a panel for each gradient, by its title. Drawn by Agg: no display needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(measured), 6.5), layout="constrained")
    panels = figure.subplots(1, len(measured), sharey=True, squeeze=False).flat
    for axes, (title, points) in zip(panels, measured.items(), strict=True):
        colors = {option: iter(COLORS) for option in SETTINGS}
        for number, (name, line) in enumerate(points.items()):
            option = option_of(name)
            color = next(colors[option])
            label = f"{name}, bfloat16" if not COMPRESSORS[name].encodes else name
            axes.plot(
                *zip(*line, strict=True),
                linestyle=LINES[option],
                marker=MARKERS[number % len(MARKERS)],
                markersize=10 - number / 3,  # those that lie on one another are seen
                color=color,
                markerfacecolor=color if number % 2 else "white",
                label=label,
            )
        axes.axhline(1, color="0.5", linewidth=1)
        axes.axvline(32, color="0.5", linewidth=1)
        axes.annotate("float32: no error", (32, 0.02), xytext=(-14, 0), textcoords="offset points", rotation=90)
        axes.annotate("nothing is sent", (30, 1), xytext=(0, 4), textcoords="offset points", ha="right")
        axes.set(title=title, xscale="log", yscale="log", xlabel="bits per value of the gradient")
        ticks = (0.1, 0.3, 1, 2, 4, 8, 16, 32)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("relative error |decoded - g| / |g|, no unit")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, handlelength=3.5)
    figure.savefig(path, format="png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", required=True, help="where to draw it")
    parser.add_argument("--steps", type=int, default=10, help="training steps before the gradient is taken")
    flags = parser.parse_args()
    gradient = real_gradients(flags.steps + 1)[-1]
    measured = {
        "normal numbers, 512 x 256 x 3 x 3": measure(NORMAL),
        f"resnet18's gradient, {flags.steps} steps into training on digits": measure(gradient),
    }
    for title, points in measured.items():
        print(title)
        for name, line in points.items():
            print(f"  {name}: " + ", ".join(f"{bits:.3f} bits {error:.4f}" for bits, error in line))
    print(f"{machine()}; Python {platform.python_version()}, torch {torch.__version__}")
    draw(measured, flags.output)


if __name__ == "__main__":
    main()
