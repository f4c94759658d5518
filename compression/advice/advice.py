"""Advice: every choice ranked by its predicted step, which one to take, and the files that say so."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..costs import FREE, Cluster
from .choices import Choice
from .measured import Measured
from .prediction import ACCURACY, ALWAYS, NEVER, BreakEven, Forecast, Predictor, advised

InWords = Callable[[Choice], Sequence[str]]
"""The words by which a user chooses a choice."""


def as_arguments(choice: Choice) -> list[str]:
    """The arguments of `attach` that take a choice."""
    words = [repr(choice.compressor.name), *(f"{name}={value!r}" for name, value in choice.given.items())]
    return words + (["hierarchical=True"] if choice.hierarchical else [])


@dataclass(frozen=True)
class Advice:
    """The steps of all choices on a cluster, the fastest first, from what was measured. Equal on all ranks."""

    measured: Measured
    cluster: Cluster
    choices: tuple[Forecast, ...]

    @property
    def best(self) -> Forecast:
        """The choice to take: `prediction.advised`."""
        return advised(self.choices)

    def to_json(self, in_words: InWords = as_arguments) -> dict[str, Any]:
        """Plain lists, dicts and numbers: what was measured, the cluster, `choices`, fastest first, and the advised.

        A break-even is `above` and `below` in Mbit/s, where it has such ends, or one of the words never and always;
        null where there is nothing to compare.
        """
        return {
            "measured": self.measured.to_json(),
            "cluster": {name: None if value == FREE else value for name, value in vars(self.cluster).items()},
            "choices": [self._plain(each, in_words) for each in self.choices],
            "advised": self._plain(self.best, in_words),
        }

    @staticmethod
    def _plain(each: Forecast, in_words: InWords) -> dict[str, Any]:
        return {
            "name": str(each.choice),
            "flags": list(in_words(each.choice)),
            "compressor": each.choice.compressor.name,
            "options": each.choice.given,
            "hierarchical": each.choice.hierarchical,
            "seconds": each.step.seconds,
            "exposed_seconds": each.step.exposed,
            "codec_seconds": each.step.codec,
            "network_seconds": each.step.network,
            "host_bytes": each.step.host_bytes,
            "error": each.error,
            "break_even_mbit": _plain_break_even(each.break_even),
        }

    def in_words(self, in_words: InWords = as_arguments) -> str:
        """The table of all choices, and the advice, in lines."""
        return "\n".join(self._lines(in_words))

    def _lines(self, in_words: InWords) -> Iterator[str]:
        measured, cluster, best = self.measured, self.cluster, self.best
        compute = measured.compute
        yield (
            f"{cluster.hosts} x {cluster.ranks_per_host} ranks, {link_in_words(cluster)}; a gradient of "
            f"{measured.values / 1e6:.2f} million values in {len(measured.buffers)} buffers"
        )
        yield (
            f"a step's own work takes {seconds_in_words(compute.seconds)}: "
            f"{seconds_in_words(compute.before)} until backward, {seconds_in_words(compute.backward)} of backward and "
            f"{seconds_in_words(compute.after)} after it; of a second of the exchange's processor work, backward pays "
            f"{compute.contention:.0%}"
        )
        yield ""
        reference = Predictor(measured, cluster).reference
        title = f"faster than {reference}"
        width = max(len("choice"), *(len(str(each.choice)) for each in self.choices))
        yield f"{'choice':{width}}  {'MB on a link':>12}  {'step':>9}  {'not hidden':>10}  {'error':>7}  {title}"
        for each in self.choices:
            yield (
                f"{each.choice!s:{width}}  {each.step.host_bytes / 1e6:12.3f}  "
                f"{seconds_in_words(each.step.seconds):>9}  {seconds_in_words(each.step.exposed):>10}  "
                f"{each.error:7.4f}  {break_even_in_words(each.break_even)}"
            )
        yield ""
        yield (
            "MB that a host puts on its link in a step; error of one encoding of this gradient, over its norm; "
            f"last: the links on which a choice is faster than {reference} in one level"
        )
        yield self._verdict()
        yield f"use: {' '.join(in_words(best.choice))}"

    def _verdict(self) -> str:
        """What to send, and what it gains."""
        best, fastest = self.best, self.choices[0]
        seconds = best.step.seconds
        known = {each.choice.codec: each for each in self.choices if not each.choice.hierarchical}
        gains = [
            f"{known[name].step.seconds / seconds:.2f} x the steps of {name}"
            for name in ("float32", "bfloat16")
            if name in known and known[name] is not best and known[name].step.seconds > seconds * (1 + ACCURACY)
        ]
        words = f"send {best.choice}"
        if not best.choice.encodes:
            words += ": codes would gain nothing that predictions can tell"
        elif gains:
            words += f": {' and '.join(gains)} in the same time"
        if fastest is not best:
            within = max(ACCURACY, seconds / fastest.step.seconds - 1)
            words += f"; {fastest.choice} is as fast, within {within:.0%}"
        return words

    def plot(self) -> bytes:
        """A PNG of predicted seconds of a step by the rate of a host's link; see `plotting.draw`."""
        from .plotting import plot

        return plot(self)


def advice_on(measured: Measured, cluster: Cluster, choices: Sequence[Choice]) -> Advice:
    """The advice on these choices. Raises ValueError where the speed or the error of one was not measured."""
    predictor = Predictor(measured, cluster)
    if unknown := [choice.codec for choice in choices if choice.codec not in measured.errors]:
        raise ValueError(f"{unknown[0]} was not measured; measure anew")
    forecasts = [predictor.forecast(choice) for choice in choices]
    order = {choice: number for number, choice in enumerate(choices)}
    return Advice(measured, cluster, tuple(sorted(forecasts, key=lambda each: (each.step.seconds, order[each.choice]))))


def seconds_in_words(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def rate_in_words(mbit: float) -> str:
    """A rate with three digits and a unit."""
    for unit, size in (("Tbit/s", 1e6), ("Gbit/s", 1e3), ("Mbit/s", 1.0)):
        if mbit >= size:
            return f"{mbit / size:.3g} {unit}"
    return f"{1e3 * mbit:.3g} kbit/s"


def break_even_in_words(links: BreakEven | None) -> str:
    """On which links."""
    if links is None:
        return "-"
    if links in (NEVER, ALWAYS):
        return "always" if links == ALWAYS else "never"
    if links.above == 0:
        return f"below {rate_in_words(links.below)}"
    if links.below == math.inf:
        return f"above {rate_in_words(links.above)}"
    return f"from {rate_in_words(links.above)} to {rate_in_words(links.below)}"


def _plain_break_even(links: BreakEven | None) -> dict[str, float] | str | None:
    if links is None or links in (NEVER, ALWAYS):
        return None if links is None else break_even_in_words(links)
    return {name: mbit for name, mbit in links._asdict().items() if 0 < mbit < math.inf}


def link_in_words(cluster: Cluster) -> str:
    """What joins the ranks."""
    if cluster.hosts == 1:
        inside = "" if cluster.inside_mbit == FREE else f" at {rate_in_words(cluster.inside_mbit)} in all"
        return f"which talk inside one host{inside}"
    link = "no limit" if cluster.link_mbit == FREE else f"{rate_in_words(cluster.link_mbit)} each way"
    return f"links of {link}, {1e6 * cluster.latency:.0f} us on the way"
