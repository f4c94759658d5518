"""Pictures of runs: the numbers behind every panel, styles that survive gray prints, and one line for what is wrong."""

import itertools
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from benchmarks import plot_run
from benchmarks.plot_run import SENT, TIME, Run
from image_classification import logs
from search import SearchResult, Tables, Wish
from search import logs as files_of
from search import search as search_widths

LAYERS = ("conv.weight", "fc.weight")


def epoch(number: int = 0, **changed: float | None) -> dict[str, Any]:
    """The metrics of an epoch of 10 steps of 2 + 5 + 1 seconds, each of 4 MB where float32 has 16."""
    metrics = {
        "train.loss": 2.0, "val.loss": 1.0 / (number + 1), "val.top1": 10.0 * number, "step.count": 10,
        "step.time": 8.0, "step.data_time": 2.0, "step.compute_time": 5.0, "step.exchange_time": 1.0,
        "codec.time": 3.0, "comm.time": 0.5, "comm.bytes_sent": 4e6, "comm.bytes_dense": 16e6, "comm.ratio": 0.25,
    }  # fmt: skip
    named = {name.replace("_", ".", 1): value for name, value in changed.items()}
    return metrics | named


def without(metrics: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.startswith(names)}


def write(workspace: Path, epochs: list[dict[str, Any]], **flags: Any) -> Path:
    """A raport as a run writes it, with lines between epochs and a summary at its end."""
    raport = logs.Raport(workspace / "experiment_raport.json")
    raport.parameters(flags)
    for number, metrics in enumerate(epochs):
        raport.log((number, 5), {"train.loss": 9.0, "comm.bytes_sent": 1e9})
        raport.log((number,), metrics)
    raport.log((), {**(epochs[-1] if epochs else {}), "best.top1": 99.0})
    raport.close()
    return raport.path


def found(bits_a_value: float, epoch: int) -> SearchResult:
    error = np.array([[8.0, 4.0, 2.0], [80.0, 40.0, 20.0]])
    nbytes = np.array([[250, 500, 1000], [250, 500, 1000]])
    tables = Tables(LAYERS, (2, 4, 8), error=error, nbytes=nbytes, dense_bytes=0, values=2000, numel=(1000, 1000))
    return search_widths(tables, Wish.bits(bits_a_value), settings={"epoch": epoch, "iteration": 0})


def stop(*argv: object) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as stopped:
        plot_run.main([str(word) for word in argv])
    assert isinstance(stopped.value.code, str)
    assert "\n" not in stopped.value.code
    assert stopped.value.code.startswith("plot_run.py: error: ")
    return stopped.value.code.removeprefix("plot_run.py: error: ")


# Numbers


def test_time_and_bytes_are_summed_over_epochs_that_differ_in_steps_and_in_bytes() -> None:
    epochs = [epoch(), epoch(1, step_time=6.0, comm_bytes_sent=1e6), epoch(2, step_count=3)]
    assert plot_run.totals(epochs, "step.time") == [80.0, 140.0, 164.0]
    assert plot_run.totals(epochs, "comm.bytes_sent") == [40e6, 50e6, 62e6]
    assert plot_run.mean_of_steps(epochs, "comm.bytes_sent") == 62e6 / 23
    assert plot_run.totals([*epochs, epoch(3, comm_bytes_sent=None)], "comm.bytes_sent") == []


def test_a_resumed_run_counts_each_epoch_once_and_all_of_its_steps(tmp_path: Path) -> None:
    path = write(tmp_path, [epoch(0), epoch(1), epoch(2)])
    resumed = logs.Raport(path, start=(1, 5))
    resumed.parameters({})
    for number in (1, 2):
        resumed.log((number,), epoch(number, step_time=4.0, val_top1=50.0 + number))
    resumed.log((), epoch(2))
    resumed.close()
    run = plot_run.read_run("resumed", path)
    assert plot_run.totals(run.epochs, "step.time") == [80.0, 120.0, 160.0]
    assert plot_run.curve(run, "val.top1", TIME) == [(80.0, 0.0), (120.0, 51.0), (160.0, 52.0)]
    evaluated = logs.Raport(path, start=logs.END)
    evaluated.log((3,), {"val.top1": 1.0})
    evaluated.close()
    assert plot_run.read_run("resumed", path) == run


def test_curves_leave_out_what_was_not_logged_or_not_finite() -> None:
    run = Run("a", [epoch(0), epoch(1, val_loss=None), epoch(2)], {})
    assert plot_run.curve(run, "val.loss", SENT) == [(40e6, 1.0), (120e6, pytest.approx(1 / 3))]
    assert plot_run.curve(run, "val.top5", TIME) == []
    assert plot_run.curve(Run("alone", [epoch(comm_bytes_sent=0.0)], {}), "val.top1", SENT) == []


def test_the_loss_is_that_of_validation_where_every_run_has_one() -> None:
    validated, not_validated = Run("a", [epoch()], {}), Run("b", [without(epoch(), "val.")], {})
    assert plot_run.loss_of([validated]) == "val.loss"
    assert plot_run.loss_of([validated, not_validated]) == "train.loss"


def test_the_bars_of_a_step_add_up_to_it_and_what_is_hidden_is_in_none() -> None:
    epochs = [epoch(step_time=90.0), epoch(), epoch(step_time=7.0)]
    median = plot_run.median_epoch(epochs)
    assert median is epochs[1]
    assert plot_run.median_epoch(epochs[:2]) is epochs[1]
    parts = plot_run.parts_of_step(median)
    assert parts == {"step.data_time": 2.0, "step.compute_time": 5.0, "step.exchange_time": 1.0}
    assert sum(parts.values()) == median["step.time"]
    assert plot_run.beside_step(median) == {"codec.time": 3.0, "comm.time": 0.5}
    on_a_gpu = without(epoch(step_compute_time=6.0), "step.exchange_time")
    assert sum(plot_run.parts_of_step(on_a_gpu).values()) == on_a_gpu["step.time"]
    assert plot_run.beside_step(on_a_gpu) == {}


def test_axes_have_the_unit_of_which_there_are_three() -> None:
    seconds, sizes = (0.0, 2.9, 3.0, 179.0, 200.0, 4e4), (0, 2.9e6, 5e6, 2.9e9, 3e9, 1e13)
    assert [plot_run.unit_of(most, TIME.units)[1] for most in seconds] == ["ms", "ms", "s", "s", "min", "h"]
    assert [plot_run.unit_of(most, SENT.units)[1] for most in sizes] == ["bytes", "kB", "MB", "MB", "GB", "TB"]


def test_the_table_has_a_row_for_each_run_and_no_column_that_is_empty() -> None:
    runs = [Run("a", [epoch(0), epoch(1)], {}), Run("b", [epoch(0, comm_bytes_sent=16e6, comm_ratio=1.0)], {})]
    assert plot_run.table_of(runs) == (
        ["top-1", "validation loss", "time, s", "step, s", "sent by a rank, MB", "of float32's bytes"],
        [["10.00 %", "0.5000", "160", "8", "80", "25 %"], ["0.00 %", "1.0000", "80", "8", "160", "100 %"]],
    )
    alone = Run("alone", [without(epoch(comm_bytes_sent=0.0, comm_ratio=1.0), "val.")], {})
    assert plot_run.table_of([alone]) == (["training loss", "time, s", "step, s"], [["2.0000", "80", "8"]])


# Widths


def test_widths_are_those_of_the_last_search_of_this_run(tmp_path: Path) -> None:
    workspace = tmp_path / "searched"
    path = write(workspace, [epoch(0), epoch(1)], search=True)
    (workspace / "adapt_logs").mkdir()
    for when, bits in ((9, 8.0), (10, 5.0), (2, 2.0)):
        for name, content in files_of(found(bits, when), when, ()).items():
            (workspace / "adapt_logs" / name).write_bytes(content)
    assert plot_run.read_run("a", path).widths == dict(zip(LAYERS, found(5.0, 10).installed, strict=True))
    os.utime(workspace / "adapt_logs" / "search_10.json", (1, 1))  # of an earlier run
    assert plot_run.read_run("a", path).widths == dict.fromkeys(LAYERS, 8)
    assert plot_run.read_run("a", write(workspace, [epoch()], search=False)).widths == {}


def test_widths_of_a_scheme_are_in_the_order_of_the_search_beside_it(tmp_path: Path) -> None:
    scheme = tmp_path / "compress_scheme_calibration.json"
    path = write(tmp_path / "run", [epoch()], search=False, compression_scheme=str(scheme))
    assert plot_run.read_run("a", path).widths == {}
    scheme.write_text(json.dumps({"2": ["fc.weight"], "8": ["conv.weight"], "32": ["bias"]}))
    assert plot_run.read_run("a", path).widths == {}
    (tmp_path / "search_calibration.json").write_text(json.dumps(found(5.0, 0).to_json()))
    assert list(plot_run.read_run("a", path).widths.items()) == [("conv.weight", 8), ("fc.weight", 2)]


# Looks


def lightness(color: str) -> float:
    """L* of CIELAB, 0 to 100: what is left of a color in gray."""
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    ]
    luminance = sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_gray_tells_the_first_runs_apart_by_lightness_and_all_by_marker() -> None:
    styles = plot_run.STYLES
    assert len({style.color for style in styles}) == len({style.marker for style in styles}) == len(styles) == 8
    for one, other in itertools.combinations(styles[:4], 2):
        assert abs(lightness(one.color) - lightness(other.color)) > 9
        assert one.dashes != other.dashes
    assert all(lightness(style.color) < 75 for style in styles), "too light on white"


def test_gray_tells_the_parts_of_a_step_apart() -> None:
    parts = [lightness(color) for _, color in plot_run.PARTS.values()]
    assert all(abs(one - other) > 20 for one, other in itertools.pairwise(parts))
    beside = plot_run.BESIDE.values()
    assert all(abs(one - other) > 20 for one, other in itertools.pairwise(lightness(color) for _, color, _ in beside))
    assert len({hatch for _, _, hatch in beside} - {""}) == len(beside)


def test_names_lose_their_middle() -> None:
    assert plot_run.shorten("float32", 24) == "float32"
    assert plot_run.shorten("a" * 30 + "b" * 30, 24) == "a" * 11 + "..." + "b" * 10


# Pictures


def drawn_texts(figure: Figure) -> dict[Text, Bbox]:
    """Every text that drawing draws, and the box that it covers."""
    drawn = []

    def record(text: Text, renderer: Any) -> None:
        if text.get_visible() and text.get_text():
            drawn.append(text)

    with mock.patch.object(Text, "draw", record):
        figure.draw_without_rendering()
    return {text: text.get_window_extent() for text in drawn}


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts of a picture of which one covers part of the other, and texts that stick out of it."""
    extents = drawn_texts(figure)
    page = figure.bbox.padded(1)
    pairs = itertools.combinations(extents, 2)
    return [
        *((one.get_text(), other.get_text()) for one, other in pairs if extents[one].overlaps(extents[other])),
        *((text.get_text(), "the edge") for text, extent in extents.items() if not contains(page, extent)),
    ]


def contains(page: Bbox, extent: Bbox) -> bool:
    return bool(page.x0 <= extent.x0 and page.y0 <= extent.y0 and extent.x1 <= page.x1 and extent.y1 <= page.y1)


@pytest.mark.parametrize(
    ("count", "epochs", "layers"), [(1, 1, 0), (1, 5, 120), (2, 1, 20), (3, 5, 300), (8, 5, 120)]
)
def test_no_text_covers_another(count: int, epochs: int, layers: int) -> None:
    names = [f"a $run of a sweep with a name that is much too long_{'x' * 30} {number}" for number in range(count)]
    widths = {f"encoder.layer.{row}.attention.output.dense.weight": 2 + row % 7 for row in range(layers)}
    runs = [
        Run(name, [epoch(row, val_loss=0.8**row, comm_bytes_sent=4e6 / 2**number) for row in range(epochs)], widths)
        for number, name in enumerate(names)
    ]
    assert overlapping(plot_run.draw(runs)) == []


@pytest.mark.parametrize("missing", [("val.",), ("step.exchange_time", "codec."), ("val.", "comm.", "codec.")])
def test_what_no_run_logged_has_no_panel(missing: tuple[str, ...]) -> None:
    figure = plot_run.draw([Run("a", [without(epoch(), *missing)], {})])
    assert overlapping(figure) == []
    titles = [axes.get_title() for axes in figure.findobj(Axes)]
    assert titles.count("top-1 in validation") == (0 if "val." in missing else 2)
    assert titles.count("loss in training" if "val." in missing else "loss in validation") == 2 - ("comm." in missing)
    assert all(axes.has_data() or axes.texts for axes in figure.findobj(Axes))


def test_bytes_are_logarithmic_where_steps_differ_much_and_not_where_runs_do() -> None:
    long, short = Run("long", [epoch(row) for row in range(9)], {}), Run("short", [epoch()], {})
    light = Run("light", [epoch(comm_bytes_sent=4e5)], {})
    for runs, scale in (((long, short), "linear"), ((long, light), "log")):
        axes = plot_run.draw(runs).findobj(lambda found: isinstance(found, Axes) and "sent by" in found.get_xlabel())
        assert [found.get_xscale() for found in axes] == [scale] * 2
        assert [found.get_xlabel().endswith("logarithmic") for found in axes] == [scale == "log"] * 2


def test_an_odd_number_of_panels_leaves_no_empty_one() -> None:
    alone = Run("alone", [without(epoch(), "comm.")], {"fc": 4})
    one_panel = plot_run.draw([alone._replace(epochs=[without(epoch(), "comm.", "val.")])])
    three_panels = plot_run.draw([alone, Run("others", [without(epoch(), "val.")], {})])
    for figure, panels in ((one_panel, 1), (three_panels, 3)):
        found = [axes for axes in figure.findobj(Axes) if axes.get_title().startswith(("loss", "top-1"))]
        assert len(found) == panels
        assert all(axes.get_title() or axes.texts or axes.get_label() == "<colorbar>" for axes in figure.findobj(Axes))


def test_runs_of_different_models_have_a_row_each() -> None:
    runs = [Run("a", [epoch()], {"conv": 2, "fc": 4}), Run("b", [epoch()], {}), Run("c", [epoch()], {"conv": 8})]
    figure = plot_run.draw(runs)
    [bits] = [image.get_array() for image in figure.findobj(AxesImage)]
    np.testing.assert_array_equal(bits.filled(0), [[2, 4], [8, 0]])


def test_the_command_writes_a_png(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", [epoch(0), epoch(1)]), write(tmp_path / "other", [epoch()])
    plot_run.main([str(one), f"by its name={other}", "-o", str(tmp_path / "runs.png")])
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_called_by_its_workspace_or_by_a_name(tmp_path: Path) -> None:
    path = write(tmp_path / "lr=0.1", [epoch()])
    assert plot_run.named(str(path)) == ("lr=0.1", path)
    assert plot_run.named(f"slow={path}") == ("slow", path)


# What is wrong


def test_a_raport_without_an_epoch_of_training_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, [{"val.top1": 90.0}])
    said = stop(path, "-o", tmp_path / "runs.png")
    assert said == f"{path} holds no metrics to draw; choose the raport file of a training run"
    assert not (tmp_path / "runs.png").exists()


def test_a_raport_without_counts_of_steps_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, [epoch(), without(epoch(), "step.count")])
    said = stop(path, "-o", tmp_path / "runs.png")
    assert said == f"{path} tells no step.count and step.time of each epoch; choose a run of this version"


def test_a_run_whose_first_epochs_are_elsewhere_is_named(tmp_path: Path) -> None:
    raport = logs.Raport(tmp_path / "late.json", start=(3, 0))
    for number in (3, 4):
        raport.log((number,), epoch(number))
    raport.close()
    said = stop(tmp_path / "late.json", "-o", tmp_path / "runs.png")
    assert said == (
        f"{tmp_path / 'late.json'} lacks epochs before 4, and sums are from epoch 0 on; "
        "resume in the workspace that the run began in"
    )


def test_names_and_numbers_of_runs_that_cannot_be_told_apart(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one" / "run", [epoch()]), write(tmp_path / "other" / "run", [epoch()])
    said = stop(one, other, "-o", tmp_path / "runs.png")
    assert said == "runs are told apart by their names, and 2 are called 'run'; give NAME=RAPORT"
    nine = [f"{number}={one}" for number in range(9)]
    said = stop(*nine, "-o", tmp_path / "runs.png")
    assert said == "one picture tells up to 8 runs apart, got 9; draw several pictures"


def test_runs_without_any_number_to_draw(tmp_path: Path) -> None:
    path = write(tmp_path, [epoch(train_loss=None, val_loss=float("nan"), val_top1=None)])
    said = stop(path, "-o", tmp_path / "runs.png")
    assert said == "no epoch of any run has a loss or top-1 that is a number; choose runs that did not diverge"


def test_a_file_that_is_not_there_or_damaged(tmp_path: Path) -> None:
    assert "No such file" in stop(tmp_path / "none.json", "-o", tmp_path / "runs.png")
    path = write(tmp_path, [epoch()], search=True)
    (tmp_path / "adapt_logs").mkdir()
    (tmp_path / "adapt_logs" / "search_0.json").write_text("{")
    assert "search_0.json: the file holds no JSON" in stop(path, "-o", tmp_path / "runs.png")
