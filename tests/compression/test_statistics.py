"""Gradient statistics: exact, blind to nothing, of the gradient alone, and the training none the wiser."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

import compression
from compression import Solo
from compression.averagers import Dense, StatisticsAverager
from compression.gradients import Gradients
from compression.statistics import BINS, PROBABILITIES, JsonLines, Statistics, TensorBoard, measure, to_all

floats = hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(width=32, allow_nan=True, allow_infinity=True))


@settings(deadline=None, max_examples=150)
@given(values=floats)
def test_every_value_is_counted_where_it_belongs(values: np.ndarray) -> None:
    seen, finite = measure(torch.from_numpy(values)), values[np.isfinite(values)].astype(np.float64)
    assert seen.count == len(values)
    assert seen.nonfinite == len(values) - len(finite)
    assert sum(seen.counts) == len(finite)
    if not len(finite):
        assert math.isnan(seen.mean)
        assert seen.edges == ()
        return
    assert (seen.minimum, seen.maximum) == (finite.min(), finite.max())
    assert seen.zeros == (finite == 0).mean()
    assert seen.probabilities == PROBABILITIES
    assert np.allclose(seen.quantiles, np.quantile(finite, PROBABILITIES), rtol=1e-6, atol=1e-300)
    assert len(seen.edges) == BINS + 1
    assert (seen.edges[0], seen.edges[-1]) == (finite.min(), finite.max())
    if finite.min() < finite.max() and len(set(seen.edges)) == BINS + 1:
        assert list(seen.counts) == np.histogram(finite, np.array(seen.edges))[0].tolist()


@settings(deadline=None, max_examples=50)
@given(
    values=hnp.arrays(np.float32, st.integers(2, 200), elements=st.floats(-1000, 1000, width=32)),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_moments_are_those_of_scipy(values: np.ndarray, scale: float) -> None:
    values = (values * np.float32(scale)).astype(np.float32)
    exact = values.astype(np.float64)
    seen = measure(torch.from_numpy(values))
    assert seen.mean == pytest.approx(exact.mean(), rel=1e-9, abs=1e-12 * scale)
    assert seen.variance == pytest.approx(exact.var(), rel=1e-6, abs=1e-18 * scale**2)
    if exact.std() > 1e-6 * np.abs(exact).max():
        assert seen.skewness == pytest.approx(scipy.stats.skew(exact), rel=1e-5, abs=1e-5)
        assert seen.kurtosis == pytest.approx(scipy.stats.kurtosis(exact, fisher=False), rel=1e-5)


def test_a_constant_has_no_shape() -> None:
    seen = measure(torch.full((10,), 0.1))
    assert seen.variance == 0
    assert math.isnan(seen.skewness)
    assert math.isnan(seen.kurtosis)


# The averager

SHAPES = {"weight": (40, 30), "bias": (40,)}


def told(bound: StatisticsAverager, values: Tensor, step: int, loss_scale: float = 1.0) -> dict[str, Statistics]:
    seen: dict[str, Statistics] = {}
    bound.sink = lambda at, layer, statistics: seen.__setitem__(f"{at} {layer}", statistics)
    bound.average_(Gradients(values.clone(), tuple(SHAPES), (0, 1200), loss_scale), step)
    return seen


def observing() -> StatisticsAverager:
    return StatisticsAverager(Solo(), {"weight": 1200, "bias": 40})


def test_every_fiftieth_step_is_told_layer_by_layer() -> None:
    values = torch.randn(1240, generator=torch.Generator().manual_seed(0))
    steps = [step for step in range(120) if told(observing(), values, step)]
    assert steps == [0, 50, 100]
    seen = told(observing(), values, 50)
    assert seen == {"50 weight": measure(values[:1200]), "50 bias": measure(values[1200:])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_scale_is_not_part_of_the_gradient(dtype: torch.dtype) -> None:
    values = torch.randn(1240, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert told(observing(), values * 8, 0, loss_scale=8.0) == told(observing(), values, 0)


def test_without_a_sink_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compression.averagers.observed.measure", None)
    values = torch.ones(1240)
    observing().average_(Gradients(values, tuple(SHAPES), (0, 1200)), 0)
    assert torch.equal(values, torch.ones(1240))


def train(name: str, sink: Any, steps: int = 60) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
    exchange = compression.attach(model, compression.build(name))
    if sink is not None:
        assert isinstance(exchange.averager, StatisticsAverager)
        exchange.averager.sink = sink
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        images = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
        exchange.begin_step(1024.0)
        optimizer.zero_grad()
        (1024 * nn.functional.cross_entropy(model(images), images[:, :5].argmax(1))).backward()
        assert exchange.finish()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= 1024
        optimizer.step()
        exchange.settle(torch.tensor(True))
    exchange.close()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_is_bit_identical_to_training_without_compression(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "gradient_stats.jsonl")
    assert torch.equal(train("stats", sink), train("none", None))
    lines = [json.loads(line) for line in (tmp_path / "gradient_stats.jsonl").read_text().splitlines()]
    assert {(line["step"], line["layer"]) for line in lines} == {
        (step, layer) for step in (0, 50) for layer in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    assert all(abs(line["maximum"]) < 2 for line in lines)  # the loss scale of 1,024 is not in them


# The sinks


def test_the_file_holds_every_field_and_null_for_what_is_not_a_number(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "stats.jsonl")
    sink(50, "fc.weight", measure(torch.tensor([1.0, 2.0, 4.0, math.inf])))
    sink(50, "fc.bias", measure(torch.tensor([math.nan])))
    first, second = (json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines())
    assert first["step"] == 50
    assert first["layer"] == "fc.weight"
    assert (first["count"], first["nonfinite"]) == (4, 1)
    assert first["quantiles"][PROBABILITIES.index(0.5)] == 2.0
    assert first["mean"] == pytest.approx(7 / 3)
    assert second["mean"] is None
    assert second["quantiles"] == [None] * len(PROBABILITIES)


@pytest.mark.parametrize("truncated", ['{"step": 1', '{"step": 60}'], ids=["within a record", "before its newline"])
def test_a_resumed_run_goes_on_in_the_file_and_a_new_one_begins_it_anew(truncated: str, tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    seen = measure(torch.ones(3))
    sink = JsonLines(path)
    for step in (0, 50):
        sink(step, "fc", seen)
    path.write_text(path.read_text() + truncated)
    resumed = JsonLines(path, first_step=80)
    resumed(100, "fc", seen)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 50, 100]
    JsonLines(path)
    assert path.read_text() == ""


def test_an_averager_that_measures_is_observed_and_any_other_is_left_alone(tmp_path: Path) -> None:
    path, curves = tmp_path / "stats.jsonl", []

    class Writer:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            curves.append((name, step))

        def add_histogram_raw(self, *fields: Any) -> None:
            pass

    assert not compression.observe(Dense(Solo()), path)
    assert not path.exists()
    averager = observing()
    assert compression.observe(averager, path, writers=[Writer()])
    averager.average_(Gradients(torch.ones(1240), tuple(SHAPES), (0, 1200)), 50)
    assert [json.loads(line)["layer"] for line in path.read_text().splitlines()] == ["weight", "bias"]
    assert ("gradient_mean/bias", 50) in curves


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*stats.jsonl: No such file or directory; make room or choose"):
        JsonLines(tmp_path / "missing" / "stats.jsonl")


def test_tensorboard_gets_histograms_and_curves_without_holes(tmp_path: Path) -> None:
    writer_module = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = writer_module.SummaryWriter(tmp_path)
    told_too: list[int] = []
    sink = to_all([TensorBoard(writer), lambda step, layer, statistics: told_too.append(step)])
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    sink(50, "fc", measure(values))
    sink(100, "fc", measure(torch.tensor([math.nan])))
    writer.close()
    assert told_too == [50, 100]
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    (histogram,) = events.Histograms("gradient/fc")
    assert histogram.step == 50
    assert histogram.histogram_value.num == 500
    assert histogram.histogram_value.sum_squares == pytest.approx(float((values.double() ** 2).sum()))
    assert [event.step for event in events.Scalars("gradient_quantile_0.5/fc")] == [50]
    assert [event.value for event in events.Scalars("gradient_nonfinite/fc")] == [0, 1]
