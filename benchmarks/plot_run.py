"""Draw one or several runs: loss, top-1, images per second and bytes per step over the epochs, in one PNG.

    python benchmarks/plot_run.py WORKSPACE/experiment_raport.json ... -o runs.png

It reads raport files and nothing else: what a run did not log is not drawn.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

from image_classification.logs import METRICS, records


class Panel(NamedTuple):
    """One of the pictures: the metric drawn solid, and the one it is to be seen against, drawn dashed."""

    title: str
    solid: str
    dashed: str | None


PANELS = (
    Panel("loss, dashed in validation", "train.loss", "val.loss"),
    Panel("top-1 in validation", "val.top1", None),
    Panel("images per second in training", "train.total_ips", None),
    Panel("bytes sent, dashed for float32", "comm.bytes_sent", "comm.bytes_dense"),
)


def by_epoch(raport: Sequence[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """Epochs done -> the last value that was logged in the last of them: a record of the whole epoch comes last."""
    steps = [record for record in raport if isinstance(record["step"], list) and record["step"]]
    return {
        record["step"][0] + 1: record["data"][metric]
        for record in steps if record["data"].get(metric) is not None
    }


def draw(raports: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Write a PNG with four panels, one color for each named run. Drawn by Agg: no display needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    for panel, axes in zip(PANELS, figure.subplots(2, 2).flat, strict=True):
        for number, (name, raport) in enumerate(raports.items()):
            for metric, style in ((panel.solid, "-"), (panel.dashed, "--")):
                points = by_epoch(raport, metric) if metric else {}
                label = name if style == "-" else None
                axes.plot(points.keys(), points.values(), style, marker=".", color=f"C{number % 10}", label=label)
        axes.set(title=panel.title, xlabel="epoch", ylabel=METRICS[panel.solid].unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, format="png", dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("raports", metavar="RAPORT", nargs="+", type=Path, help="raport file of a run")
    parser.add_argument("-o", "--output", metavar="PNG", type=Path, required=True, help="picture to write")
    arguments = parser.parse_args(argv)
    try:
        raports = {str(path): records(path) for path in arguments.raports}
        for name, raport in raports.items():
            if not any(by_epoch(raport, panel.solid) for panel in PANELS):
                raise ValueError(f"{name} holds no metrics to draw; choose a raport file of a training run")
        draw(raports, arguments.output)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_run.py: error: {error}")


if __name__ == "__main__":
    main()
