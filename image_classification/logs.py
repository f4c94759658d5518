"""Logs: one stream of metrics, and the sinks that it runs into.

A step is the subject of a record: `(epoch, iteration)`, `(epoch,)` for a whole epoch, `()` for the whole run. Epochs
count from 0; iteration is the number of batches done in that epoch. A sink knows no ranks: ranks other than 0 have
a `Logger` without sinks.
"""

import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from image_classification.atomic import replacing

Step = tuple[float, ...]
"""(epoch, iteration), (epoch,), or (); all numbers are whole, except for `END`."""

Value = float | int | str

START: Step = (0, 0)
END: Step = (math.inf, math.inf)


class Metric(NamedTuple):
    """Form of a metric: its unit, empty where it has none, its format, and whether terminals show it."""

    unit: str
    format: str
    shown: bool = True


METRICS = {
    "train.loss": Metric("", ".4f"),
    "train.compute_ips": Metric("images/s", ".1f", shown=False),
    "train.total_ips": Metric("images/s", ".1f"),
    "train.data_time": Metric("s", ".4f", shown=False),
    "train.compute_time": Metric("s", ".4f", shown=False),
    "lr": Metric("", ".5g"),
    "step.count": Metric("", ".0f", shown=False),
    "step.time": Metric("s", ".4f", shown=False),
    "step.data_time": Metric("s", ".4f", shown=False),
    "step.compute_time": Metric("s", ".4f", shown=False),
    "step.exchange_time": Metric("s", ".4f", shown=False),  # on CPUs, where gradients travel or are encoded
    "val.top1": Metric("%", ".2f"),
    "val.top5": Metric("%", ".2f"),
    "val.loss": Metric("", ".4f"),
    "val.compute_ips": Metric("images/s", ".1f", shown=False),
    "val.total_ips": Metric("images/s", ".1f", shown=False),
    "val.data_time": Metric("s", ".4f", shown=False),
    "val.compute_latency": Metric("s", ".4f", shown=False),
    "val.compute_latency_at95": Metric("s", ".4f", shown=False),
    "val.compute_latency_at99": Metric("s", ".4f", shown=False),
    "val.compute_latency_at100": Metric("s", ".4f", shown=False),
    "best.top1": Metric("%", ".2f"),
    "comm.bytes_sent": Metric("bytes/step", ",.0f"),
    "comm.bytes_dense": Metric("bytes/step", ",.0f", shown=False),
    "comm.ratio": Metric("", ".4f"),
    "comm.host_bytes": Metric("bytes/step", ",.0f", shown=False),
    "comm.host_bytes_dense": Metric("bytes/step", ",.0f", shown=False),
    "comm.host_ratio": Metric("", ".4f"),  # where there are several hosts
    "comm.time": Metric("s", ".4f", shown=False),
    "codec.time": Metric("s", ".4f", shown=False),
    "comm.exposed_time": Metric("s", ".4f", shown=False),
}
"""Every metric of training and validation; docs/metrics.md says what each is."""


class Sink:
    """Destination of records. This one drops them; others override the methods that concern them."""

    def parameters(self, data: Mapping[str, Any]) -> None:
        """The flags of a run, once, before any record."""

    def log(self, step: Step, data: Mapping[str, Value]) -> None:
        """One record of metrics."""

    def detail(self, step: Step, data: Mapping[str, float]) -> None:
        """Numbers for a plot alone, such as the bits of each layer."""

    def picture(self, step: Step, name: str, png: bytes) -> None:
        """A picture, to look at beside the plots."""

    def line(self, text: str) -> None:
        """A sentence for who watches the run."""

    def close(self) -> None:
        """No more records will come."""


class Logger(Sink):
    """Passes everything on to all its sinks; without any, to nobody."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks
        self.failures: dict[object, str] = {}
        """The first error of each sink that failed since `survive`, in one line."""
        self._warn: Callable[[str], None] | None = None

    def survive(self, warn: Callable[[str], None]) -> None:
        """From now on tell `warn` of the first error of each sink, in place of raising it: what logs stops no run."""
        self._warn = warn

    @contextmanager
    def surviving(self, source: object) -> Iterator[None]:
        """A block of writing for who watches the run, with an error of which it goes on like a sink."""
        try:
            yield
        except OSError as error:
            if self._warn is None:
                raise
            if source not in self.failures:
                named = f"cannot write {error.filename}: {error.strerror}" if error.filename else str(error)
                self.failures[source] = named
                self._warn(f"{named}; the run goes on without")

    @property
    def tensorboard_writers(self) -> list[Any]:
        """The SummaryWriters of its sinks, for histograms and the like."""
        return [sink.writer for sink in self.sinks if isinstance(sink, TensorBoard)]

    def parameters(self, data: Mapping[str, Any]) -> None:
        self._each(lambda sink: sink.parameters(data))

    def log(self, step: Step, data: Mapping[str, Value]) -> None:
        self._each(lambda sink: sink.log(step, data))

    def detail(self, step: Step, data: Mapping[str, float]) -> None:
        self._each(lambda sink: sink.detail(step, data))

    def picture(self, step: Step, name: str, png: bytes) -> None:
        self._each(lambda sink: sink.picture(step, name, png))

    def line(self, text: str) -> None:
        self._each(lambda sink: sink.line(text))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, act: Callable[[Sink], None]) -> None:
        for sink in self.sinks:
            with self.surviving(sink):
                act(sink)


# The raport file


def records(path: Path) -> list[dict[str, Any]]:
    """All records of a raport file in order; a truncated line is left out."""
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line, record) of each line that holds one."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            record = json.loads(line.removeprefix("DLLL "))
            if isinstance(record, dict) and "step" in record:
                found.append((line, record))
    return found


class Raport(Sink):
    """JSON lines, each `DLLL ` and a record, in the format of NVIDIA's dllogger.

    `timestamp` (seconds since 1970), `datetime`, `elapsedtime` (seconds since this run began), `type` (`LOG` or
    `METADATA`), `step` (a step as a list, `PARAMETER` or `METADATA`), `data`. Numbers that are not finite are null.
    """

    def __init__(self, path: Path, start: Step = START) -> None:
        """Open for a run that begins at `start`: `START` is a new file, `END` appends to all that is there.

        In between, the run goes on from a checkpoint: records of later steps, and those of the whole run, are
        dropped first, because they are about to be written again. The file is replaced in one piece.

        Raises OSError where the file cannot be written.
        """
        self.path = path
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _lines(path) if start != START and path.is_file() else []
            if kept:
                with replacing(path) as file:
                    for line, record in kept:
                        if _position(record["step"]) <= start:
                            file.write(line.encode() + b"\n")
            self.file = path.open("a" if kept else "w", encoding="utf-8")
        self.began = time.monotonic()
        if not kept:
            for name, metric in METRICS.items():
                unit = {"unit": metric.unit}
                self._write("METADATA", "METADATA", {name: unit}, metric=name, metadata=unit)

    def parameters(self, data: Mapping[str, Any]) -> None:
        self._write("LOG", "PARAMETER", data)

    def log(self, step: Step, data: Mapping[str, Value]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}
        self._write("LOG", list(step), finite)

    def close(self) -> None:
        with self._writing():
            self.file.close()

    def _write(self, kind: str, step: str | list[float], data: Mapping[str, Any], **more: Any) -> None:
        now = datetime.now()
        record = {
            "timestamp": str(now.timestamp()),
            "datetime": str(now),
            "elapsedtime": str(time.monotonic() - self.began),
            "type": kind,
            "step": step,
            "data": dict(data),
            **more,
        }
        with self._writing():
            if os.fstat(self.file.fileno()).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, "it was deleted")
            self.file.write(f"DLLL {json.dumps(record, allow_nan=False)}\n")
            self.file.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror}; make room or choose another file") from error


def _position(step: str | list[int]) -> Step:
    """Position of a record in the order of a run: an epoch comes after its iterations, the whole run last."""
    if isinstance(step, str):
        return START
    return (*step, math.inf, math.inf)[:2]


# TensorBoard


class TensorBoard(Sink):
    """Event files. The horizontal axis counts iterations over all epochs."""

    def __init__(self, folder: Path, iterations: int, start: Step = START) -> None:
        """`iterations` per epoch; records of an earlier run after `start` are hidden, as in `Raport`."""
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.iterations = folder, iterations
        purge = None if start in (START, END) else self._at(start) + 1
        self.writer = SummaryWriter(folder, purge_step=purge)

    def parameters(self, data: Mapping[str, Any]) -> None:
        self.writer.add_text("parameters", "\n".join(f"    {name} = {value}" for name, value in data.items()))

    def log(self, step: Step, data: Mapping[str, Value]) -> None:
        if step:
            self.detail(step, {name: value for name, value in data.items() if not isinstance(value, str)})

    def detail(self, step: Step, data: Mapping[str, float]) -> None:
        with self._writing():
            for name, value in data.items():
                self.writer.add_scalar(name.replace(".", "/", 1), value, self._at(step))

    def picture(self, step: Step, name: str, png: bytes) -> None:
        import numpy
        from PIL import Image

        with self._writing():
            pixels = numpy.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            self.writer.add_image(name.replace(".", "/", 1), pixels, self._at(step), dataformats="HWC")

    def close(self) -> None:
        with self._writing():
            self.writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A block of writing, whose errors name the folder. A thread writes: they may be those of the block before."""
        try:
            if not self.folder.is_dir():
                raise FileNotFoundError(errno.ENOENT, "it was deleted")
            yield
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"cannot write {self.folder}: {reason}; make room or choose another folder") from error

    def _at(self, step: Step) -> int:
        epoch, iteration = (*step, self.iterations)[:2]
        return int(epoch * self.iterations + iteration)


# The terminal


def _show(text: str) -> None:
    print(text, flush=True)


class Terminal(Sink):
    """A line for each record, of the metrics that fit on it; on a terminal, iterations move a progress bar instead.

    The bar shows the rate and the time left of its epoch. An epoch's line ends with the parts of a step. Parameters are
    not shown: they are many, and most are defaults.
    """

    def __init__(self, iterations: int, show: Callable[[str], None] = _show, bar: bool | None = None) -> None:
        """`iterations` per epoch; `bar` by default where standard error is a terminal."""
        self.iterations = iterations
        self.show = show
        self.with_bar = sys.stderr.isatty() if bar is None else bar
        self.bar: tqdm[Any] | None = None

    def log(self, step: Step, data: Mapping[str, Value]) -> None:
        shown = [name for name in data if _metric(name).shown and not _says_nothing(name, data)]
        values = " | ".join(_readable(name, data[name]) for name in shown)
        if len(step) == 2 and self.with_bar:
            self._move(int(step[0]), int(step[1]), values)
            return
        self.close()
        if len(step) == 1 and "step.time" in data:
            values += f" | {parts_of_step(data)}"
        where = {0: "summary", 1: "epoch {}", 2: "epoch {} iteration {}/{}"}[len(step)].format(*step, self.iterations)
        self.line(f"{where} | {values}")

    def line(self, text: str) -> None:
        with tqdm.external_write_mode():
            self.show(text)

    def close(self) -> None:
        """Finish the bar, where there is one."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _move(self, epoch: int, iteration: int, values: str) -> None:
        if self.bar is None:
            self.bar = tqdm(total=self.iterations, initial=iteration, desc=f"epoch {epoch}", dynamic_ncols=True)
        self.bar.set_postfix_str(values, refresh=False)
        self.bar.update(iteration - self.bar.n)
        self.bar.refresh()


def parts_of_step(data: Mapping[str, Value]) -> str:
    """Where a step's time went, in ms: `step 412 ms = data 3 + compute 371 + exchange not hidden 38 (codec 96, ...)`.

    The sum is that of the rounded parts; those that round to 0 are left out. Codec and network are in parentheses: they
    are busy beside backward as well.
    """
    whole = 1000 * float(data["step.time"])
    digits = 0 if whole >= 100 else 1 if whole >= 10 else 2

    def rounded(words: Mapping[str, str]) -> dict[str, float]:
        values = {word: round(1000 * float(data.get(name, 0.0)), digits) for name, word in words.items()}
        return {word: value for word, value in values.items() if value > 0}

    parts, beside = rounded(_PARTS_OF_STEP), {}
    if "step.exchange_time" in data:
        beside = rounded({"codec.time": "codec", "comm.time": "network"})
    total = f"{sum(parts.values()):.{digits}f}"
    terms = " + ".join(f"{word} {value:.{digits}f}" for word, value in parts.items())
    more = ", ".join(f"{word} {value:.{digits}f}" for word, value in beside.items())
    return f"step {total} ms = {terms}" + (f" ({more})" if more else "")


_PARTS_OF_STEP = {
    "step.data_time": "data",
    "step.compute_time": "compute",
    "step.exchange_time": "exchange not hidden",
}


def _says_nothing(name: str, data: Mapping[str, Value]) -> bool:
    """Whether a metric tells of traffic where there is none and nothing is encoded."""
    return name in ("comm.bytes_sent", "comm.ratio") and data.get("comm.bytes_sent") == 0 and data["comm.ratio"] == 1


def _metric(name: str) -> Metric:
    return METRICS.get(name, Metric("", ".4g"))


def _readable(name: str, value: Value) -> str:
    metric = _metric(name)
    number = value if isinstance(value, str) else format(value, metric.format)
    return f"{name} {number} {metric.unit}".rstrip()
