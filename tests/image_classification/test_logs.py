"""Logs: every record is one line, a resumed run writes none twice, and what is truncated is left out."""

import json
import math
import os
import resource
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from image_classification import logs

METRICS_OF_THE_PROGRAM = [
    "train.loss", "train.compute_ips", "train.total_ips", "train.data_time", "train.compute_time", "lr",
    "step.count", "step.time", "step.data_time", "step.compute_time", "step.exchange_time",
    "val.top1", "val.top5", "val.loss", "val.compute_ips", "val.total_ips", "val.data_time",
    "val.compute_latency", "val.compute_latency_at95", "val.compute_latency_at99",
    "val.compute_latency_at100", "best.top1", "comm.bytes_sent", "comm.bytes_dense", "comm.ratio",
    "comm.host_bytes", "comm.host_bytes_dense", "comm.host_ratio", "comm.time", "codec.time", "comm.exposed_time",
]


def steps(path):
    return [tuple(record["step"]) for record in logs.records(path) if isinstance(record["step"], list)]


def run(path, start, epochs, iterations=3, stop_before=None):
    """Log as a training does, from a step on; a `stop_before` step kills it."""
    raport = logs.Raport(path, start)
    raport.parameters({"epochs": epochs})
    for epoch in range(start[0], epochs):
        first = start[1] if epoch == start[0] else 0
        for step in [(epoch, i) for i in range(first + 1, iterations + 1)] + [(epoch,)]:
            if step == stop_before:
                raport.close()
                return
            raport.log(step, {"train.loss": 1.0})
    raport.log((), {"val.top1": 50.0})
    raport.close()


def test_every_record_is_a_prefixed_json_line_with_all_fields(tmp_path):
    path = tmp_path / "made" / "raport.json"
    raport = logs.Raport(path)
    raport.parameters({"arch": "resnet18", "seed": None, "given": ("data",)})
    raport.log((0, 10), {"train.loss": 2.5, "lr": 0.1})
    raport.log((0,), {"val.top1": 12.5, "note": "text"})
    raport.log((), {"val.top1": 12.5})
    raport.close()
    lines = path.read_text().splitlines()
    assert all(line.startswith("DLLL {") for line in lines)
    parsed = [json.loads(line.removeprefix("DLLL ")) for line in lines]
    for record in parsed:
        assert {"timestamp", "datetime", "elapsedtime", "type", "step", "data"} <= set(record)
        assert float(record["timestamp"]) == datetime.fromisoformat(record["datetime"]).timestamp()
        assert 0 <= float(record["elapsedtime"]) < 60
    assert [(r["type"], r["step"], r["data"]) for r in parsed if r["type"] == "LOG"] == [
        ("LOG", "PARAMETER", {"arch": "resnet18", "seed": None, "given": ["data"]}),
        ("LOG", [0, 10], {"train.loss": 2.5, "lr": 0.1}),
        ("LOG", [0], {"val.top1": 12.5, "note": "text"}),
        ("LOG", [], {"val.top1": 12.5}),
    ]
    assert logs.records(path) == parsed


def test_the_raport_gives_the_unit_of_every_metric(tmp_path):
    logs.Raport(tmp_path / "raport.json").close()
    units = {r["metric"]: r["metadata"] for r in logs.records(tmp_path / "raport.json") if r["type"] == "METADATA"}
    assert list(units) == METRICS_OF_THE_PROGRAM
    assert units["train.total_ips"] == {"unit": "images/s"}
    assert units["val.top1"] == {"unit": "%"}
    assert units["comm.bytes_sent"] == {"unit": "bytes/step"}


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    raport = logs.Raport(tmp_path / "raport.json")
    raport.log((0,), {"train.loss": math.nan, "comm.ratio": math.inf, "lr": 0.1})
    raport.close()
    last = (tmp_path / "raport.json").read_text().splitlines()[-1].removeprefix("DLLL ")
    assert json.loads(last, parse_constant=pytest.fail)["data"] == {"train.loss": None, "comm.ratio": None, "lr": 0.1}


def test_each_record_is_in_the_file_as_soon_as_it_is_logged(tmp_path):
    raport = logs.Raport(tmp_path / "raport.json")
    raport.log((0, 1), {"train.loss": 1.0})
    assert steps(tmp_path / "raport.json") == [(0, 1)]
    raport.close()


ALL_STEPS = [step for epoch in range(3) for step in [(epoch, 1), (epoch, 2), (epoch, 3), (epoch,)]]


@settings(deadline=None, max_examples=40)
@given(kill=st.sampled_from(ALL_STEPS), checkpoint=st.sampled_from([(e, i) for e in range(3) for i in range(3)]))
def test_a_resumed_run_has_every_step_once_and_in_order(tmp_path_factory, kill, checkpoint):
    assume((*kill, math.inf)[:2] > checkpoint)  # what a checkpoint holds was logged before it
    path = tmp_path_factory.mktemp("resumed") / "raport.json"
    run(path, logs.START, 3, stop_before=kill)
    run(path, checkpoint, 3)
    assert steps(path) == [*ALL_STEPS, ()]
    os.remove(path)


def test_a_longer_run_replaces_the_summary_of_the_shorter_one(tmp_path):
    run(tmp_path / "raport.json", logs.START, 1)
    run(tmp_path / "raport.json", (1, 0), 2)
    assert steps(tmp_path / "raport.json") == [*ALL_STEPS[:8], ()]
    flags = [r["data"]["epochs"] for r in logs.records(tmp_path / "raport.json") if r["step"] == "PARAMETER"]
    assert flags == [1, 2]
    assert sum(r["type"] == "METADATA" for r in logs.records(tmp_path / "raport.json")) == len(logs.METRICS)


def test_appending_keeps_all_and_a_new_run_keeps_nothing(tmp_path):
    path = tmp_path / "raport.json"
    run(path, logs.START, 1)
    before = path.read_text()
    raport = logs.Raport(path, logs.END)
    raport.log((), {"val.top1": 1.0})
    raport.close()
    assert path.read_text().startswith(before)
    assert steps(path) == [*ALL_STEPS[:4], (), ()]
    logs.Raport(path).close()
    assert steps(path) == []


def test_a_truncated_line_is_left_out(tmp_path):
    path = tmp_path / "raport.json"
    run(path, logs.START, 2, stop_before=(1, 2))
    os.truncate(path, path.stat().st_size - 7)
    assert steps(path) == ALL_STEPS[:4]
    run(path, (1, 0), 2)
    assert steps(path) == [*ALL_STEPS[:8], ()]


def test_a_raport_may_go_to_a_device_which_stays_one():
    reader, writer = os.pipe()
    for start in (logs.START, logs.END):
        raport = logs.Raport(Path(f"/proc/self/fd/{writer}"), start)
        raport.log((0, 1), {"lr": 0.1})
        raport.close()
        assert os.read(reader, 100_000).splitlines()[-1].startswith(b"DLLL {")
    os.close(reader)
    os.close(writer)


def test_lines_that_are_no_records_are_left_out(tmp_path):
    (tmp_path / "notes.json").write_text('{"a": 1}\n[3]\n3\ntext\n\nDLLL {"step": [0], "data": {}}\n')
    assert logs.records(tmp_path / "notes.json") == [{"step": [0], "data": {}}]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "raport.json"
    raport = logs.Raport(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            raport.log((0, 1), {"train.loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == f"cannot write {path}: File too large; make room or choose another file"
    raport.close()


def test_a_folder_in_the_raports_place_is_an_error_that_names_it(tmp_path):
    with pytest.raises(OSError, match=rf"^cannot write {tmp_path}: Is a directory; make room or choose another file$"):
        logs.Raport(tmp_path)


def test_plain_lines_show_every_record_with_units_as_far_as_it_can_be_read():
    shown = []
    terminal = logs.Terminal(20, shown.append, bar=False)
    terminal.parameters({"arch": "vgg16", "seed": 1})
    terminal.log((0, 10), {"train.loss": 2.5, "train.total_ips": 1234.56, "train.data_time": 0.1})
    terminal.log((0,), {"val.top1": 12.5, "comm.bytes_sent": 1234567.8, "best.top1": 12.5})
    terminal.log((), {"val.top1": 12.5, "stopped": "early"})
    terminal.line("a sentence")
    terminal.close()
    assert shown == [
        "epoch 0 iteration 10/20 | train.loss 2.5000 | train.total_ips 1234.6 images/s",
        "epoch 0 | val.top1 12.50 % | comm.bytes_sent 1,234,568 bytes/step | best.top1 12.50 %",
        "summary | val.top1 12.50 % | stopped early",
        "a sentence",
    ]


def step(total, **parts):
    """The metrics of a step, in seconds, of milliseconds."""
    return {f"step.{name}_time": ms / 1000 for name, ms in parts.items()} | {"step.time": total / 1000}


BESIDE = {"codec.time": 0.0961, "comm.time": 0.21}


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (
            step(412.4, data=3.4, compute=370.6, exchange=38.4) | BESIDE,
            "step 412 ms = data 3 + compute 371 + exchange not hidden 38 (codec 96, network 210)",
        ),
        (step(412.4, data=3.4, compute=409) | BESIDE, "step 412 ms = data 3 + compute 409"),
        (step(251, data=0.2, compute=250.4, exchange=0.4) | {"codec.time": 0, "comm.time": 0}, "step 250 ms = compute "
         "250"),
        (step(12.5, data=0.06, compute=12.44), "step 12.5 ms = data 0.1 + compute 12.4"),
        (step(1.51, data=0.01, compute=1.5), "step 1.51 ms = data 0.01 + compute 1.50"),
    ],
)  # fmt: skip
def test_an_epochs_line_ends_with_the_parts_of_a_step(data, shown):
    lines = []
    terminal = logs.Terminal(20, lines.append, bar=False)
    terminal.log((0,), {"val.top1": 12.5, **data})
    terminal.log((), {"val.top1": 12.5, **data})
    assert lines == [f"epoch 0 | val.top1 12.50 % | {shown}", "summary | val.top1 12.50 %"]


@given(st.lists(st.floats(0, 10), min_size=3, max_size=3), st.booleans())
def test_the_parts_that_are_shown_add_up_to_the_step_that_is_shown(seconds, exchanges):
    parts = dict(zip(("step.data_time", "step.compute_time", "step.exchange_time"), seconds, strict=True))
    if not exchanges:
        del parts["step.exchange_time"]
    shown = logs.parts_of_step(parts | {"step.time": sum(parts.values())})
    total, _, terms = shown.removeprefix("step ").partition(" ms = ")
    numbers = [term.split()[-1] for term in terms.split(" + ") if term]
    assert sum(map(Decimal, numbers)) == Decimal(total)
    assert float(total) == pytest.approx(1000 * sum(parts.values()), rel=0.03, abs=0.03)
    assert all(float(number) > 0 for number in numbers)


@pytest.mark.parametrize(
    ("sent", "ratio", "shown"),
    [
        (0.0, 1.0, ""),
        (0.0, 0.13, " | comm.bytes_sent 0 bytes/step | comm.ratio 0.1300"),
        (8.0, 1.0, " | comm.bytes_sent 8 bytes/step | comm.ratio 1.0000"),
    ],
)
def test_traffic_is_shown_where_there_is_some_or_something_is_encoded(sent, ratio, shown):
    lines = []
    logs.Terminal(20, lines.append, bar=False).log((0, 1), {"lr": 1.0, "comm.bytes_sent": sent, "comm.ratio": ratio})
    assert lines == [f"epoch 0 iteration 1/20 | lr 1{shown}"]


def test_a_terminal_shows_a_bar_with_rate_and_time_left(capsys):
    shown = []
    terminal = logs.Terminal(20, shown.append, bar=True)
    terminal.log((3, 5), {"train.loss": 2.5})
    terminal.log((3, 10), {"train.loss": 1.5})
    terminal.log((3,), {"val.top1": 12.5})
    terminal.log((4, 20), {"train.loss": 0.5})
    terminal.close()
    assert shown == ["epoch 3 | val.top1 12.50 %"]
    states = capsys.readouterr().err.split("\r")
    assert any("epoch 3:  50%" in s and "10/20" in s and "it/s" in s and "train.loss 1.5000" in s for s in states)
    assert any("epoch 4: 100%" in state for state in states)


def test_a_logger_passes_everything_to_all_sinks_and_without_any_to_nobody():
    class Recording(logs.Sink):
        def __init__(self):
            self.seen = []

        def __getattribute__(self, name):
            if name == "seen":
                return super().__getattribute__(name)
            return lambda *args: self.seen.append((name, *args))

    sinks = [Recording(), Recording()]
    for logger in (logs.Logger(*sinks), logs.Logger()):
        logger.parameters({"arch": "vgg16"})
        logger.log((0,), {"lr": 0.1})
        logger.detail((0,), {"bits.conv1": 4})
        logger.line("a sentence")
        logger.close()
    for sink in sinks:
        assert sink.seen == [
            ("parameters", {"arch": "vgg16"}),
            ("log", (0,), {"lr": 0.1}),
            ("detail", (0,), {"bits.conv1": 4}),
            ("line", "a sentence"),
            ("close",),
        ]


def test_tensorboard_counts_iterations_over_all_epochs_and_hides_what_is_written_again(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def log(start, steps):
        board = logs.TensorBoard(tmp_path, iterations=10, start=start)
        board.parameters({"arch": "vgg16"})
        for step in steps:
            board.log(step, {"train.loss": float(len(step)), "note": "text"})
        board.detail((1,), {"bits.layer1.conv1": 4})
        board.close()

    log(logs.START, [(0, 5), (0,), (1, 5), (1, 10), ()])
    log((1, 5), [(1, 10), (1,)])
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(5, 2), (10, 1), (15, 2), (20, 2), (20, 1)]
    assert read.Scalars("bits/layer1.conv1")[-1].value == 4
