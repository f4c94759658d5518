"""The picture of an advice: predicted seconds of a step by the rate of a link. Agg draws: no display needed."""

from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .advice import Advice
    from .prediction import Forecast

# Okabe and Ito's colors, which survive color blindness, from dark to light, each with a line of its own for grayscale.
STYLES = (("black", "-"), ("#0072B2", "--"), ("#D55E00", "-"), ("#009E73", "-."), ("#CC79A7", ":"), ("#E69F00", "--"))
SHOWN = len(STYLES)
POINTS = 60


def shown(advice: "Advice") -> list["Forecast"]:
    """The choices that get a line: float32 and bfloat16, the advised one, and the fastest of other compressors."""
    plain = [each for each in advice.choices if not each.choice.encodes and not each.choice.hierarchical]
    lines = sorted(plain, key=lambda each: each.error)
    if advice.best not in lines:
        lines.append(advice.best)
    for each in advice.choices:
        names = {line.choice.compressor.name for line in lines}
        if len(lines) < SHOWN and each.choice.compressor.name not in names:
            lines.append(each)
    return lines


def plot(advice: "Advice") -> bytes:
    """A PNG of `draw`."""
    png = BytesIO()
    draw(advice).savefig(png, format="png", dpi=110)
    return png.getvalue()


def draw(advice: "Advice") -> Any:
    """A figure: a line for each of `shown`, a mark at this cluster's link, and the step's own work below them.

    With one host the link is what joins its ranks.
    """
    from matplotlib.figure import Figure

    from .advice import rate_in_words
    from .prediction import Predictor

    predictor = Predictor(advice.measured, advice.cluster)
    cluster = advice.cluster
    link = cluster.inside_mbit if cluster.hosts == 1 else cluster.link_mbit
    middle = link if link < 1e7 else 1e3
    rates = [middle * 10 ** (4 * k / POINTS - 2) for k in range(POINTS + 1)]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for each, (color, dashes) in zip(shown(advice), STYLES, strict=False):
        seconds = [predictor.step(each.choice, rate).seconds for rate in rates]
        wide = each.choice == advice.best.choice
        label = f"{each.choice} (advised)" if wide else str(each.choice)
        axes.plot(rates, seconds, color=color, linestyle=dashes, linewidth=3 if wide else 1.6, label=label)
    axes.axhline(advice.measured.compute.seconds, color="0.6", linewidth=1, zorder=0)
    axes.annotate("the step's own work", (rates[-1], advice.measured.compute.seconds), xytext=(0, -4),
                  textcoords="offset points", ha="right", va="top", color="0.35", fontsize=9)  # fmt: skip
    if middle == link:
        axes.axvline(link, color="0.6", linewidth=1, linestyle=":", zorder=0)
        axes.annotate(f"this link, {rate_in_words(link)}", (link, 0.98), xycoords=("data", "axes fraction"), ha="left",
                      va="top", xytext=(4, 0), textcoords="offset points", color="0.35", fontsize=9)  # fmt: skip
    name = "rate inside the host, Mbit/s in all" if cluster.hosts == 1 else "rate of a host's link, Mbit/s each way"
    axes.set(xscale="log", yscale="log", xlabel=name, ylabel="predicted seconds of a step",
             title=f"{cluster.hosts} hosts x {cluster.ranks_per_host} ranks")  # fmt: skip
    axes.grid(color="0.92", which="both")
    axes.set_axisbelow(True)
    axes.legend()
    return figure
