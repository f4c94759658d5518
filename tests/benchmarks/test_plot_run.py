"""Plots of runs: one picture from any number of raport files, and one line where a file has nothing to draw."""

import pytest

from benchmarks import plot_run
from image_classification import logs


def log(path, loss):
    raport = logs.Raport(path)
    for epoch in range(3):
        raport.log((epoch, 5), {"train.loss": 9.0, "lr": 0.1})
        raport.log((epoch,), {"train.loss": loss / (epoch + 1), "val.top1": 10.0 * epoch})
    raport.log((), {"val.top1": 99.0})
    raport.close()
    return str(path)


def test_an_epoch_counts_with_its_last_record_and_the_summary_does_not(tmp_path):
    raport = logs.records(tmp_path / log(tmp_path / "a.json", 6.0))
    assert plot_run.by_epoch(raport, "train.loss") == {1: 6.0, 2: 3.0, 3: 2.0}
    assert plot_run.by_epoch(raport, "val.top1") == {1: 0.0, 2: 10.0, 3: 20.0}
    assert plot_run.by_epoch(raport, "comm.bytes_sent") == {}


def test_several_runs_make_one_png(tmp_path):
    picture = tmp_path / "runs.png"
    plot_run.main([log(tmp_path / "a.json", 6.0), log(tmp_path / "b.json", 7.0), "-o", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_raport_without_metrics_is_named(tmp_path):
    path = tmp_path / "empty.json"
    logs.Raport(path).close()
    with pytest.raises(SystemExit) as stopped:
        plot_run.main([str(path), "-o", str(tmp_path / "runs.png")])
    assert stopped.value.code == (
        f"plot_run.py: error: {path} holds no metrics to draw; choose a raport file of a training run"
    )
    assert not (tmp_path / "runs.png").exists()
